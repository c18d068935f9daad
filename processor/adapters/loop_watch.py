"""How long the event loop's other work was kept waiting by one piece of it, for the metric of that name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.005
WINDOW_S = 60.0


class LoopWatch:
    """A timer that notes how late it comes; it costs a thousandth of a CPU. `monotonic` gives seconds."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._due = self._window_ends = 0.0
        self._longest_s = self._longest_before_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def longest_s(self) -> float:
        """Of the last one to two minutes. What holds the loop for less than TICK_S is seen only by chance."""
        return max(self._longest_s, self._longest_before_s)

    def start(self) -> None:
        """Call within the running loop."""
        self._window_ends = self._monotonic() + WINDOW_S
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._due = self._monotonic() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        now = self._monotonic()
        if now >= self._window_ends:
            self._longest_before_s, self._longest_s = self._longest_s, 0.0
            self._window_ends = now + WINDOW_S
        self._longest_s = max(self._longest_s, now - self._due)
        self._wait()
