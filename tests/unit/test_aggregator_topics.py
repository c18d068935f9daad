"""The aggregator when a topic is no longer the one that was folded: made again, grown, expired."""

from __future__ import annotations

import pytest

from processor.errors import StoreError
from tests.support.aggregation import (
    DAY_MS,
    PARTITIONS,
    TOPICS,
    Bench,
    Event,
    History,
    a_bench,
    append,
    recomputed,
)


async def folded_once(bench: Bench) -> int:
    history = History()
    append(bench.log, history, [Event(0, n, 1, 1_000, 0) for n in range(3)])
    await bench.run()
    return history[0][0].partition


@pytest.mark.parametrize("again", [0, 1, 3, 5])
async def test_a_usage_topic_made_again_stops_the_aggregator(again: int) -> None:
    """A topic that ends before the folded offset, or holds another record there, names the rebuild."""
    with a_bench() as bench:
        await folded_once(bench)
        bench.log.remake(TOPICS.usage)
        append(bench.log, [], [Event(0, 7, 2, 1_000, 0)] * again)
        with pytest.raises(StoreError, match="usage rebuild"):
            await bench.run()


async def test_a_usage_topic_made_again_is_found_even_without_a_store() -> None:
    """Published totals that count offsets the usage topic does not have name the rebuild."""
    with a_bench() as bench:
        await folded_once(bench)
        bench.log.remake(TOPICS.usage)
        bench.lose_store()
        with pytest.raises(StoreError, match="usage rebuild"):
            await bench.run()


async def test_a_usage_topic_made_again_and_longer_than_before_is_found_without_a_store() -> None:
    """Charges below an old last_offset would be passed over: the charge that a total names must be the one there."""
    with a_bench() as bench:
        await folded_once(bench)
        bench.log.remake(TOPICS.usage)
        bench.lose_store()
        bench.log.now_ms += DAY_MS
        append(bench.log, [], [Event(0, n, 2, 1_000, 0) for n in range(8)])
        with pytest.raises(StoreError, match="usage rebuild --forget-totals"):
            await bench.run()


async def test_forgotten_totals_begin_anew_with_the_log() -> None:
    """After a null value for every bucket, without a store, the totals are those of the log that is there now."""
    with a_bench() as bench:
        await folded_once(bench)
        bench.log.remake(TOPICS.usage)
        bench.lose_store()
        bench.log.forget_totals()
        history = History()
        append(bench.log, history, [Event(0, n, 2, 1_000, 0) for n in range(2)])
        await bench.run(run_length=1)
        bench.lose_store()  # once more: old, deleted and new records of a key are read together
        append(bench.log, history, [Event(0, 5, 1, 1_000, 0)])
        await bench.run()

        assert await bench.log.totals() == recomputed(history)


async def test_a_grown_usage_topic_stops_the_aggregator() -> None:
    """More partitions than were folded name the rebuild, since keys have moved."""
    with a_bench() as bench:
        await folded_once(bench)
        bench.log.partitions[TOPICS.usage] = PARTITIONS + 1
        with pytest.raises(StoreError, match="usage rebuild"):
            await bench.run()


async def test_a_topic_whose_last_folded_record_has_expired_is_still_the_same() -> None:
    """Retention that removes folded records stops nobody."""
    with a_bench() as bench:
        partition = await folded_once(bench)
        bench.log.expire(TOPICS.usage, partition, 3)
        assert await bench.run() is not None
