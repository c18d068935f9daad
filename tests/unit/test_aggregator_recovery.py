"""The aggregator that begins without its store or with an old one, over a log whose head may have expired."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import UsageTotal
from processor.domain import Usage
from tests.support.aggregation import (
    DAY_MS,
    HORIZON_MS,
    PARTITIONS,
    TOPICS,
    Bench,
    Event,
    History,
    a_bench,
    append,
    charges,
    recomputed,
)
from tests.support.lives import FAR


@settings(max_examples=60, deadline=None)
@given(before=FAR, after=FAR, quiet_days=st.sampled_from([0, 40, 200]))
async def test_a_rebuild_from_a_log_whose_head_has_expired_changes_no_total(
    before: list[Event], after: list[Event], quiet_days: int
) -> None:
    """A store lost after the head of the log has expired neither forgets a charge nor counts one twice."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, before)
        await bench.run()
        log.now_ms += quiet_days * DAY_MS
        retention_ms = 2 * HORIZON_MS + 30 * DAY_MS
        for partition in range(PARTITIONS):
            young = (
                record.source.offset
                for record in log.after(TOPICS.usage, partition, 0)
                if record.source.append_ms >= log.now_ms - retention_ms
            )
            log.expire(TOPICS.usage, partition, next(young, log.ends[TOPICS.usage, partition]))
        log.compact(TOPICS.totals)
        bench.lose_store()
        for event in after:  # one by one: the aggregator is never thirty days behind
            append(log, history, [event])
            await bench.run()

        assert await log.totals() == recomputed(charges(history))


async def test_a_rebuild_quarantines_no_late_charge_again() -> None:
    """Somebody settles them by hand: what was acknowledged before its offset was committed is not sent once more."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(0, n, 1, 0, HORIZON_MS + 1) for n in range(2)])
        await bench.run()
        bench.lose_store()
        append(log, history, [Event(0, 2, 1, 0, HORIZON_MS + 1)])
        await bench.run()

        quarantined = [usage.request_id for _, usage in await log.contents("late", Usage)]
        assert sorted(quarantined) == sorted(usage.request_id for _, usage in history)


async def test_a_charge_in_a_quiet_partition_is_counted_after_a_rebuild() -> None:
    """Where the whole log but young records has expired, the young ones are charges and not only seen."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        await bench.run()
        partition = history[0][0].partition
        log.expire(TOPICS.usage, partition, 1)
        bench.lose_store()
        append(log, history, [Event(0, 1, 1, 200 * DAY_MS, 0)])
        await bench.run()

        assert await log.totals() == recomputed(history)


async def test_a_log_whose_first_offset_is_no_record_has_lost_none() -> None:
    """Other services may write in transactions: an aborted one at offset 0 is not a head that has expired."""
    with a_bench() as bench:
        log, history = bench.log, History()
        for partition in range(PARTITIONS):
            log.ends[TOPICS.usage, partition] = 1
        append(log, history, [Event(0, 0, 1, 0, 0)])
        log.now_ms += 31 * DAY_MS
        await bench.run()

        assert await log.totals() == recomputed(history)


async def test_a_store_that_is_behind_takes_what_another_published_meanwhile() -> None:
    """A standby with an old store never publishes a bucket at a lower last_offset than is published already."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(n % 4, n, 1, 1_000, 0) for n in range(4)])
        await bench.run()
        assert {source.partition for source, _ in history} == set(range(PARTITIONS))  # one that is empty hides it
        standby = bench.path.with_name("standby.sqlite")
        bench.copy_store(standby)
        append(log, history, [Event(n % 4, n, 1, 1_000, 0) for n in range(8)])
        await bench.run()
        before = len(log.all_of(TOPICS.totals))
        append(log, history, [Event(0, 9, 1, 1_000, 0)])
        await Bench(log, standby).run(run_length=1)

        assert await log.totals() == recomputed(charges(history))
        again = await log.contents("totals", UsageTotal)
        assert len(again) - before == len(recomputed(history[-1:]))
