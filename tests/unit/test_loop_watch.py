"""The longest that one piece of work keeps everybody else of the loop waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from processor.adapters.loop_watch import TICK_S, WINDOW_S, LoopWatch
from tests.support.engines import until


class Time:
    """A monotonic clock that work moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def watched() -> AsyncIterator[tuple[LoopWatch, Time]]:
    time = Time()
    watch = LoopWatch(monotonic=time)
    watch.start()
    yield watch, time
    watch.stop()


async def pass_time(watch: LoopWatch, time: Time, seconds: float, *, held: bool) -> None:
    """One piece of work takes so long, or none does; then the loop has its next tick."""
    time.now += seconds
    if not held:
        watch._due += seconds
    timer = watch._timer
    await until(lambda: watch._timer is not timer, "a tick")


async def test_the_longest_hold_stands_for_a_window(watched: tuple[LoopWatch, Time]) -> None:
    """A shorter one does not hide it, and an old one is forgotten."""
    watch, time = watched
    await pass_time(watch, time, TICK_S, held=True)
    assert watch.longest_s == pytest.approx(0)
    await pass_time(watch, time, TICK_S + 0.5, held=True)
    await pass_time(watch, time, TICK_S + 0.2, held=True)
    assert watch.longest_s == pytest.approx(0.5)
    await pass_time(watch, time, WINDOW_S, held=False)
    assert watch.longest_s == pytest.approx(0.5)
    await pass_time(watch, time, WINDOW_S, held=False)
    assert watch.longest_s == pytest.approx(0)
