"""The aggregator and its lease: late, lost, revoked, and a store that another process has taken."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import closing, nullcontext

import pytest

from processor.adapters.sqlite_store import SqliteStore
from processor.errors import StoreTaken
from processor.ports import Run
from tests.support.aggregation import TOPICS, CrashingStore, Event, History, Steps, a_bench, append, recomputed
from tests.support.steps import FakeLease


@pytest.mark.parametrize("frozen", [True, False])
async def test_a_claimed_store_refuses_its_former_owner(frozen: bool) -> None:
    """A process that froze and wakes up after another took the store over saves nothing into it; one that still has its
    partitions shares the file with another group and ends, since it would stand still."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as successor:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        partition = history[0][0].partition
        lease = FakeLease(TOPICS.usage, partition)

        def wakes_up() -> None:
            lease.revoked = frozen

        with closing(CrashingStore(bench.path, wakes_up)) as store:
            aggregator = bench.aggregator(store, Steps(None))
            await aggregator.positions([(TOPICS.usage, partition)])
            successor.claim()
            with nullcontext() if frozen else pytest.raises(StoreTaken, match="a file each"):
                await aggregator.on_run(Run(lease, log.after(TOPICS.usage, partition, 0)))

        assert lease.finished == []
        assert successor.cursor(TOPICS.usage, partition) is None


@pytest.mark.parametrize("late_from", range(4))
async def test_a_lease_that_is_only_late_is_waited_for(late_from: int) -> None:
    """A heartbeat that is late, before a run or in the middle of publishing it, costs no charge."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log, history = bench.log, History()
        append(log, history, [Event(0, number, 1, 0, 0) for number in range(2)])
        partition = history[0][0].partition
        lease = FakeLease(TOPICS.usage, partition)
        moments = itertools.count()

        def step() -> None:
            lease.late = lease.late or next(moments) == late_from

        aggregator = bench.aggregator(store, step)
        await aggregator.positions([(TOPICS.usage, partition)])
        step()
        first, second = log.after(TOPICS.usage, partition, 0)
        folding = asyncio.ensure_future(aggregator.on_run(Run(lease, [first])))
        while not folding.done():
            for _ in range(20):
                await asyncio.sleep(0)
            lease.late = False
            bench.clock.wake_next()
        await aggregator.on_run(Run(lease, [second]))

        assert await log.totals() == recomputed(history)
        assert lease.finished == [0, 1]


async def test_a_late_lease_is_given_up_with_its_partition() -> None:
    """A revocation does not wait for a heartbeat: what is not folded is dropped within the budget."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        partition = history[0][0].partition
        lease = FakeLease(TOPICS.usage, partition)
        aggregator = bench.aggregator(store, Steps(None))
        await aggregator.positions([(TOPICS.usage, partition)])
        lease.late = True
        folding = asyncio.ensure_future(aggregator.on_run(Run(lease, log.after(TOPICS.usage, partition, 0))))
        await asyncio.sleep(0)
        giving_up = asyncio.ensure_future(aggregator.on_revoke([lease], 60.0))
        while not giving_up.done():
            await asyncio.sleep(0)
            bench.clock.wake_next()
        await folding

        assert lease.finished == []
        assert await log.totals() == {}


async def test_a_lost_lease_publishes_and_saves_nothing() -> None:
    """A run whose lease is gone is dropped whole."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        partition = history[0][0].partition
        aggregator = bench.aggregator(store, Steps(None))
        await aggregator.positions([(TOPICS.usage, partition)])
        lease = FakeLease(TOPICS.usage, partition)
        lease.revoked = True
        await aggregator.on_run(Run(lease, log.after(TOPICS.usage, partition, 0)))

        assert await log.totals() == {}
        assert store.cursor(TOPICS.usage, partition) is None
