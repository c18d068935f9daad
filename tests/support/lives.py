"""What may befall an aggregator: copies that come, the moment at which it ends, and what is left of its store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

from tests.support.aggregation import DAY_MS, Bench, Event, History, append


def events(gaps: Sequence[int], ages: Sequence[int]) -> st.SearchStrategy[list[Event]]:
    return st.lists(
        st.builds(
            Event,
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from(gaps),
            st.sampled_from(ages),
        ),
        max_size=14,
    )


NEAR = events([0, 1_000, DAY_MS], [0, 5_000])
FAR = events([0, DAY_MS, 20 * DAY_MS, 69 * DAY_MS, 71 * DAY_MS], [0, DAY_MS, 34 * DAY_MS, 36 * DAY_MS])


class Life(NamedTuple):
    """What comes, where the process ends while it folds that, and what is left of its store."""

    coming: list[Event]
    crash_at: int | None
    store: str


def lives(coming: st.SearchStrategy[list[Event]]) -> st.SearchStrategy[list[Life]]:
    return st.lists(
        st.builds(
            Life, coming, st.one_of(st.none(), st.integers(0, 25)), st.sampled_from(["kept", "kept", "old", "lost"])
        ),
        min_size=1,
        max_size=4,
    )


async def live(bench: Bench, history: History, past: Sequence[Life]) -> None:
    """Go through these lives and then fold to the end."""
    for life in past:
        append(bench.log, history, life.coming)
        await bench.run(crash_at=life.crash_at)
        bench.leave_store(life.store)
    await bench.run()
