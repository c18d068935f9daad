"""What the aggregator forgets, part by part, and what it keeps since a copy or a charge may still come."""

from __future__ import annotations

import uuid
from contextlib import closing

from processor.accounts import LedgerSummary
from processor.adapters.sqlite_store import SqliteStore
from processor.aggregator import Aggregator
from processor.ports import Run
from tests.support.aggregation import (
    DAY_MS,
    PARTITIONS,
    TOPICS,
    Bench,
    Event,
    History,
    Steps,
    a_bench,
    a_bill,
    a_charge,
    append,
)
from tests.support.steps import FakeLease


async def pruned(bench: Bench, store: SqliteStore, *, minutes: int = 256) -> tuple[Aggregator, LedgerSummary]:
    """The aggregator once all is folded and a part was pruned each minute, by default all; its ledger before that."""
    aggregator = bench.aggregator(store, Steps(None))
    places = [(topic, partition) for topic in (TOPICS.usage, TOPICS.calls) for partition in range(PARTITIONS)]
    await aggregator.positions(places)
    for topic, partition in places:
        if records := bench.log.after(topic, partition, 0):
            await aggregator.on_run(Run(FakeLease(topic, partition), records))
    summary = aggregator.ledger_summary()
    for _ in range(minutes):
        bench.clock.now_s += 61
        await aggregator.on_run(Run(FakeLease(TOPICS.usage, 0), []))
    return aggregator, summary


async def test_no_clock_of_ours_makes_an_attempt_old() -> None:
    """Where it stands a year ahead, an attempt that may still be charged is kept."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        a_bill(bench.log, "young", tokens=5, outcome=None)
        bench.clock.now_s = 365 * DAY_MS / 1000
        await pruned(bench, store)
        assert len(store.open_attempts()) == 1


async def test_a_partition_whose_records_have_all_expired_holds_up_no_pruning() -> None:
    """It is no backlog: nothing of it will ever be folded."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log = bench.log
        a_bill(log, "old", tokens=5, outcome=None)
        append(log, [], [Event(0, 0, 1, 72 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        for partition in range(PARTITIONS):
            if not log.after(TOPICS.usage, partition, 0):
                log.begins[TOPICS.usage, partition] = log.ends[TOPICS.usage, partition] = 5
        await pruned(bench, store)
        assert store.open_attempts() == []


async def test_an_attempt_whose_charges_are_in_a_backlog_is_not_forgotten() -> None:
    """However old it is: nothing is judged by the clock while charges are still to be read."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log = bench.log
        a_bill(log, "a")
        a_charge(log, "a")
        log.now_ms += 72 * DAY_MS
        bench.clock.now_s = 72 * DAY_MS / 1000
        a_bill(log, "b", outcome=None)
        aggregator = bench.aggregator(store, Steps(None))
        places = [(topic, partition) for topic in (TOPICS.calls, TOPICS.usage) for partition in range(PARTITIONS)]
        await aggregator.positions(places)
        for topic, partition in places:
            if topic == TOPICS.usage:
                for _ in range(256):
                    bench.clock.now_s += 61
                    await aggregator.on_run(Run(FakeLease(topic, partition), []))
            if records := log.after(topic, partition, 0):
                await aggregator.on_run(Run(FakeLease(topic, partition), records))
        sums = aggregator.ledger_summary().sums
        assert (sums.attributed_tokens, sums.uncharged_tokens, sums.unmatched_tokens) == (3, 0, 0)


async def test_a_charge_that_is_read_before_its_call_is_not_forgotten() -> None:
    """The ledger of calls may be behind: what a charge names is as young as the charge."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        a_charge(bench.log, "a")
        aggregator, before = await pruned(bench, store)
        assert before.sums.unmatched_tokens == 3
        a_bill(bench.log, "a")
        for partition in range(PARTITIONS):
            if records := bench.log.after(TOPICS.calls, partition, 0):
                await aggregator.on_run(Run(FakeLease(TOPICS.calls, partition), records))
        sums = aggregator.ledger_summary().sums
        assert (sums.attributed_tokens, sums.uncharged_tokens, sums.unmatched_tokens) == (3, 0, 0)


async def test_a_process_that_never_lives_long_forgets_all_that_is_old() -> None:
    """Started again every hour, it comes to every part of the keys within a day."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        for number in range(20):
            a_bill(bench.log, str(uuid.uuid5(uuid.NAMESPACE_OID, str(number))), outcome=None)
        append(bench.log, [], [Event(0, 0, 1, 72 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        for _ in range(24):
            await pruned(bench, store, minutes=60)
        assert store.open_attempts() == []


async def test_pruning_forgets_only_what_no_copy_can_repeat() -> None:
    """Old keys and attempts go, the ledger keeps their sums, and a copy within two horizons is still a duplicate."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log, history = bench.log, History()
        a_bill(log, "old", tokens=5, outcome=None)
        append(log, history, [Event(0, 0, 1, 0, 0), Event(0, 1, 1, 2 * DAY_MS, 0), Event(0, 2, 1, 70 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        aggregator, summary = await pruned(bench, store)

        partition = history[0][0].partition
        kept = store.seen(partition, [usage.request_id for _, usage in history])
        assert set(kept) == {history[1][1].request_id, history[2][1].request_id}
        assert store.open_attempts() == []
        assert aggregator.ledger_summary() == summary
        assert summary.sums.unconfirmed_max_tokens == 5
