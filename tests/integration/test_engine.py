"""The engine on Apache Kafka: nothing is lost, nothing unfinished is committed, whoever comes and goes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from processor.adapters.faust_engine import Engine
from processor.errors import StoreError
from processor.ports import Lease, Run
from tests.support import engines
from tests.support.brokers import Broker
from tests.support.engines import (
    ENGINES,
    Handler,
    Place,
    create_topic,
    engine_settings,
    finishing,
    flowing,
    group_of,
    log_ends,
    produce,
    steal,
    unfinished,
    until,
)

PARTITIONS = 4
Running = Callable[..., AbstractAsyncContextManager[Engine]]


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> type[Engine]:
    """Each law holds on Faust, and on the experiment without it."""
    return ENGINES[request.param]


@pytest.fixture
def running(kind: type[Engine]) -> Running:
    """`engines.running` of that kind."""
    return partial(engines.running, kind=kind)


@pytest.fixture
async def topic(kafka: Broker, unique: str) -> str:
    """A topic of four partitions; its group has the same name."""
    await create_topic(kafka.bootstrap_servers, unique, PARTITIONS)
    return unique


async def test_runs_arrive_in_order_and_are_committed(kafka: Broker, topic: str, running: Running) -> None:
    """Every record comes once, in offset order per partition, and stopping leaves the log's end committed."""
    await produce(kafka.bootstrap_servers, topic, PARTITIONS, 4_000)
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler):
        await until(lambda: len(handler.seen) == 4_000, "4,000 records")
    assert set(handler.seen.values()) == {1}
    for partition in range(PARTITIONS):
        offsets = [
            record.source.offset for run in handler.runs if run.lease.partition == partition for record in run.records
        ]
        assert offsets == list(range(1_000))
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert await group.committed() == dict.fromkeys(range(PARTITIONS), 1_000)


async def test_a_run_says_how_many_records_are_behind_it(kafka: Broker, topic: str, running: Running) -> None:
    """Who knows that more is to come waits for it; after the last one in the log nobody does."""
    await produce(kafka.bootstrap_servers, topic, PARTITIONS, 4_000)
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler):
        await until(lambda: len(handler.seen) == 4_000, "4,000 records")
    assert [run.behind for run in handler.runs] == [999 - run.records[-1].source.offset for run in handler.runs]


@pytest.mark.parametrize("at_most", [7, 3_000])
async def test_a_run_is_as_long_as_its_handler_takes_them(
    at_most: int, kafka: Broker, topic: str, running: Running
) -> None:
    """A handler that works on many at once gets them, and one that wants few gets no more."""
    await produce(kafka.bootstrap_servers, topic, PARTITIONS, 4_000)
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler, records_per_fetch=at_most):
        await until(lambda: len(handler.seen) == 4_000, "4,000 records")
    longest = max(len(run.records) for run in handler.runs)
    assert longest == 7 if at_most == 7 else 500 < longest <= at_most


class OddName(str):
    """A header's name as careless producers write it: in Latin-1."""

    def encode(self, *_: str) -> bytes:
        return b"caf\xe9"


async def test_a_header_name_that_is_no_text_stops_nobody(
    kafka: Broker, topic: str, monkeypatch: pytest.MonkeyPatch, running: Running
) -> None:
    """A record of such a header, and those around it in its batch and its partition, come once and in order."""
    monkeypatch.setattr(fetcher, "MemoryRecords", fetcher.MemoryRecords)  # put back what the engine exchanges
    await produce(kafka.bootstrap_servers, topic, 1, 10)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, compression_type="gzip") as producer:
        await producer.partitions_for(topic)
        batch = producer.create_batch()
        batch._builder = _DefaultRecordBatchBuilderPy(
            magic=2,
            compression_type=1,
            is_transactional=0,
            producer_id=-1,
            producer_epoch=-1,
            base_sequence=-1,
            batch_size=100_000,
        )
        for value, headers in ((b"10", []), (b"11", [(OddName("odd"), b"header")]), (b"12", [])):
            assert batch.append(key=None, value=value, timestamp=1, headers=headers) is not None
        batch.close()
        await (await producer.send_batch(batch, topic, partition=0))
    await produce(kafka.bootstrap_servers, topic, 1, 10)
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler):
        await until(lambda: len(handler.seen) == 23, "23 records")
    records = [record for run in handler.runs for record in run.records]
    assert [record.source.offset for record in records] == list(range(23))
    assert [record.headers for record in records if record.headers] == [(("caf\\xe9", b"header"),)]


async def test_offsets_are_committed_by_count_too(kafka: Broker, topic: str, running: Running) -> None:
    """However long the interval, no more than so many finished records are delivered again after a crash."""
    handler = Handler()
    settings = engine_settings(kafka.bootstrap_servers, commit_interval_s=3600, commit_records=50)
    async with running(settings, topic, handler), group_of(kafka.bootstrap_servers, topic) as group:
        await produce(kafka.bootstrap_servers, topic, 1, 49)
        await until(lambda: len(handler.finished) == 49, "49 records")
        assert not any((await group.committed()).values())
        await produce(kafka.bootstrap_servers, topic, 1, 1)
        await group.until_committed({0: 50})


async def test_what_is_finished_out_of_order_waits_for_what_came_before(
    kafka: Broker, topic: str, running: Running
) -> None:
    """The first record of a log, offset 0, holds the commit back until it is finished; then all is committed."""
    await produce(kafka.bootstrap_servers, topic, 1, 100)
    held: list[Run] = []

    async def finish_all_but_the_first(run: Run) -> None:
        held.append(run)
        for record in reversed(run.records):
            if (run.lease.partition, record.source.offset) != (0, 0):
                handler.finish(run, record.source.offset)

    handler = Handler(finish_all_but_the_first)
    settings = engine_settings(kafka.bootstrap_servers)
    async with group_of(kafka.bootstrap_servers, topic) as group, running(settings, topic, handler) as engine:
        await until(lambda: len(handler.finished) == 99, "99 finished records")
        await engine.producer.send_and_wait(topic, b"of a later commit", partition=1)
        await group.until_committed({1: 1})
        handler.finish(held[0], 0)
        await group.until_committed({0: 100, 1: 1})
        assert engine.status()["state"] == "consuming"


async def test_a_successor_begins_where_the_commit_stands(kafka: Broker, topic: str, running: Running) -> None:
    """Giving up commits what is finished: the next owner gets the rest, from the first unfinished record on."""
    await produce(kafka.bootstrap_servers, topic, 1, 200)

    handler, successor = finishing(lambda offset: offset < 100 or offset == 150), Handler()
    settings = engine_settings(kafka.bootstrap_servers, commit_interval_s=3600)
    async with running(settings, topic, handler):
        await until(lambda: len(handler.seen) == 200, "200 records")
    async with running(settings, topic, successor):
        await until(lambda: len(successor.seen) == 100, "the rest")
    assert set(successor.seen) == {(0, offset) for offset in range(100, 200)}
    assert sorted(lease.partition for lease in handler.revoked) == list(range(PARTITIONS))
    assert all(lease.revoked and not lease.held() for lease in handler.revoked)


class Slow(Handler):
    """Finishes each record in its own time, in any order, until its lease is revoked. Shares what is finished."""

    def __init__(self, finished: set[Place], randomness: random.Random) -> None:
        super().__init__(self.begin)
        self.finished = finished
        self._random = randomness
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, run: Run) -> None:
        if len(self._tasks) > 8:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._work(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, run: Run) -> None:
        records = list(run.records)
        self._random.shuffle(records)
        for begin in range(0, len(records), 50):
            await asyncio.sleep(self._random.random() * 0.02)
            for record in records[begin : begin + 50]:
                self.finish(run, record.source.offset)

    async def settle(self) -> None:
        await asyncio.gather(*self._tasks)


async def test_nothing_is_lost_while_members_come_and_go(kafka: Broker, topic: str, running: Running) -> None:
    """Records flow while a second member joins and leaves five times: all are seen and finished, the commit never
    passes an unfinished one and ends at the log's end.
    """
    finished: set[Place] = set()
    randomness = random.Random(1)
    settings = engine_settings(kafka.bootstrap_servers, revoke_budget_s=0.3)
    first, others = Slow(finished, randomness), [Slow(finished, randomness) for _ in range(5)]
    async with group_of(kafka.bootstrap_servers, topic) as group:

        async def nothing_unfinished_is_committed() -> None:
            for partition, end in (await group.committed()).items():
                assert {(partition, offset) for offset in range(end)} <= finished

        async with running(settings, topic, first):
            async with flowing(kafka.bootstrap_servers, topic, PARTITIONS):
                for other in others:
                    async with running(settings, topic, other):
                        await until(lambda other=other: len(other.seen) > 50, "records for the newcomer")  # type: ignore[misc]
                        await nothing_unfinished_is_committed()
                    await nothing_unfinished_is_committed()
            ends = await log_ends(kafka.bootstrap_servers, topic, PARTITIONS)
            await until(lambda: len(finished) == sum(ends.values()), "all finished")
            await group.until_committed(ends)
        await asyncio.gather(*(handler.settle() for handler in (first, *others)))
    seen = sum((handler.seen for handler in (first, *others)), Counter[Place]())
    assert seen.keys() == {(partition, offset) for partition, end in ends.items() for offset in range(end)}
    assert all(other.seen for other in others)


async def test_what_is_fetched_behind_the_engines_back_is_read_again(
    kafka: Broker, topic: str, running: Running
) -> None:
    """A hole between two runs that is ours is sought back to, not committed past."""
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler) as engine:
        await produce(kafka.bootstrap_servers, topic, 1, 10)
        await until(lambda: len(handler.finished) == 10, "the first ten")
        stealing = asyncio.create_task(steal(engine))
        stolen: Mapping[object, object] = {}
        for _ in range(50):  # the engine's own fetch waits too: who gets a record is chance
            await produce(kafka.bootstrap_servers, topic, 1, 10)
            stolen = await stealing
            if stolen:
                break
            stealing = asyncio.create_task(steal(engine))
        assert stolen
        await produce(kafka.bootstrap_servers, topic, 1, 10)
        end = (await log_ends(kafka.bootstrap_servers, topic, 1))[0]
        await until(lambda: len(handler.finished) == end, "every record")
    assert {offset for _, offset in handler.finished} == set(range(end))


async def test_offsets_that_are_not_in_the_log_are_passed_over(kafka: Broker, topic: str, running: Running) -> None:
    """Control records of transactions leave holes that are the log's own: reading goes on, and so does the commit."""
    handler = Handler()
    async with (
        running(engine_settings(kafka.bootstrap_servers), topic, handler),
        AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=topic) as producer,
    ):
        for number in range(5):
            async with producer.transaction():
                await producer.send_and_wait(topic, b"%d" % number, partition=0)
            await until(lambda number=number: len(handler.finished) == number + 1, "the record")  # type: ignore[misc]
    assert sorted(handler.finished) == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8)]
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert (await group.committed())[0] == 9


async def test_waiting_is_backpressure(kafka: Broker, topic: str, running: Running) -> None:
    """While the handler waits, little more than what it holds is fetched, and the group is not left."""
    await produce(kafka.bootstrap_servers, topic, PARTITIONS, 20_000)
    go = asyncio.Event()

    async def wait(run: Run) -> None:
        await go.wait()
        await handler.finish_all(run)

    handler = Handler(wait)
    settings = engine_settings(kafka.bootstrap_servers, session_timeout_s=10)
    async with running(settings, topic, handler) as engine:
        await until(lambda: bool(handler.runs), "a run")
        generation = engine.status()["generation"]
        await asyncio.sleep(settings.session_timeout_s + 1)
        assert engine.status()["generation"] == generation
        assert handler.runs[0].lease.held()
        assert len(handler.runs) == 1
        assert unfinished(engine) <= 2 * 500
        go.set()
        await until(lambda: len(handler.finished) == 20_000, "all 20,000")


async def test_a_run_that_waits_is_cancelled_with_its_lease(kafka: Broker, topic: str, running: Running) -> None:
    """A provider that is out for hours holds neither a rebalance nor a shutdown up."""
    await produce(kafka.bootstrap_servers, topic, 1, 10)
    cancelled = asyncio.Event()

    async def wait_for_ever(run: Run) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    handler, newcomer = Handler(wait_for_ever), Handler(wait_for_ever)
    settings = engine_settings(kafka.bootstrap_servers)
    async with running(settings, topic, handler):
        await until(lambda: bool(handler.runs), "a run")
        first = handler.runs[0]
        async with running(settings, topic, newcomer):
            await cancelled.wait()
            assert first.lease.revoked
            await until(
                lambda: any(run.lease.generation > first.lease.generation for run in handler.runs + newcomer.runs),
                "the run again, in a later generation",
            )
            again = next(run for run in handler.runs + newcomer.runs if run.lease.generation > first.lease.generation)
            assert again.records[0].source.offset == 0
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert await group.committed() == {}


class Reluctant(Handler):
    """Takes its time to give partitions up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        self.asked.set()
        await self.go.wait()


async def test_a_rebalance_waits_for_a_member_that_stops(
    kafka: Broker, topic: str, running: Running, kind: type[Engine]
) -> None:
    """A newcomer is assigned nothing while a stopping member still finishes under its leases."""
    reluctant = Reluctant()
    settings = engine_settings(kafka.bootstrap_servers, revoke_budget_s=10)
    async with running(settings, topic, reluctant) as engine:
        await until(lambda: engine.status()["state"] == "consuming", "the leases")
        stopping = asyncio.create_task(engine.stop())
        await reluctant.asked.wait()
        newcomer = kind(settings, app_id=topic, topics=[topic], handler=Handler())
        starting = asyncio.create_task(newcomer.start())
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(starting), timeout=3)
            reluctant.go.set()
            await stopping
            await starting
            await until(lambda: newcomer.status()["state"] == "consuming", "the newcomer's leases")
        finally:
            reluctant.go.set()
            await stopping
            await newcomer.stop()


async def run_until_crash(engine: Engine) -> None:
    """It may crash before its start is over."""
    try:
        await engine.start()
        await engine.wait()
    finally:
        await engine.stop()


async def test_a_broken_handler_ends_the_engine_and_nothing_is_committed_past(
    kafka: Broker, topic: str, kind: type[Engine]
) -> None:
    """An exception of the handler is told to whoever runs the engine; its lease is over, the commit stays."""
    await produce(kafka.bootstrap_servers, topic, 1, 100)

    async def break_at_50(run: Run) -> None:
        for record in run.records:
            if record.source.offset == 50:
                raise RuntimeError("broken")
            handler.finish(run, record.source.offset)

    handler = Handler(break_at_50)
    engine = kind(engine_settings(kafka.bootstrap_servers), app_id=topic, topics=[topic], handler=handler)
    with pytest.raises(RuntimeError, match="broken"):
        await run_until_crash(engine)
    assert engine.status() == {"state": "crashed", "reason": "RuntimeError"}
    assert not handler.runs[0].lease.held()
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert (await group.committed()).get(0, 0) <= 50


async def test_the_handlers_own_positions_win(kafka: Broker, topic: str, running: Running) -> None:
    """A store that knows better is read from where it stands, whatever is committed."""
    await produce(kafka.bootstrap_servers, topic, PARTITIONS, 400)
    handler, again = Handler(), Handler()
    settings = engine_settings(kafka.bootstrap_servers)
    async with running(settings, topic, handler):
        await until(lambda: len(handler.finished) == 400, "all 400")
    again.stored = {(topic, 0): 0, (topic, 1): 90}
    async with running(settings, topic, again):
        await until(lambda: len(again.seen) == 110, "what the store lacks")
    assert set(again.seen) == {(0, offset) for offset in range(100)} | {(1, offset) for offset in range(90, 100)}


async def test_what_is_committed_never_steps_back(kafka: Broker, topic: str, running: Running) -> None:
    """While a handler goes through the log again from its own position, the committed offset waits to be passed."""
    await produce(kafka.bootstrap_servers, topic, 1, 100)
    settings = engine_settings(kafka.bootstrap_servers)
    handler = Handler()
    async with running(settings, topic, handler):
        await until(lambda: len(handler.finished) == 100, "all 100")

    async def finish_the_first_half(run: Run) -> None:
        for record in run.records:
            if record.source.offset < 50:
                again.finish(run, record.source.offset)

    again = Handler(finish_the_first_half)
    again.stored = {(topic, 0): 0}
    async with group_of(kafka.bootstrap_servers, topic) as group:
        async with running(settings, topic, again) as engine:
            await until(lambda: len(again.finished) == 50, "the first half again")
            await engine.producer.send_and_wait(topic, b"of a later commit", partition=1)
            await group.until_committed({0: 100, 1: 1})
            await produce(kafka.bootstrap_servers, topic, 1, 1)
            await until(lambda: len(again.seen) == 102, "one more")
            for run in again.runs:
                await again.finish_all(run)
        assert await group.committed() == {0: 101, 1: 1}


async def test_a_position_beyond_the_log_is_refused(kafka: Broker, topic: str, kind: type[Engine]) -> None:
    """A store of a topic that was made again must not wait for offsets of the old one."""
    handler = Handler()
    handler.stored = {(topic, 0): 5}
    engine = kind(engine_settings(kafka.bootstrap_servers), app_id=topic, topics=[topic], handler=handler)
    with pytest.raises(StoreError, match="next offset 5 lies beyond the log's end 0"):
        await run_until_crash(engine)


async def test_one_owner_has_all_partitions_and_a_standby_takes_over(
    kafka: Broker, topic: str, running: Running
) -> None:
    """With `single_owner` a second member gets nothing until the first leaves; then it gets everything."""
    settings = engine_settings(kafka.bootstrap_servers)
    owner, standby = Handler(), Handler()
    async with (
        running(settings, topic, owner, single_owner=True) as first,
        running(settings, topic, standby, single_owner=True) as second,
    ):
        await until(
            lambda: (first.status()["state"], second.status()["state"]) == ("consuming", "standby"),
            "the first owns, the second stands by",
        )
        await produce(kafka.bootstrap_servers, topic, PARTITIONS, 40)
        await until(lambda: len(owner.finished) == 40, "all for the first")
        assert not standby.seen
        await first.stop()
        await produce(kafka.bootstrap_servers, topic, PARTITIONS, 40)
        await until(lambda: len(standby.finished) == 40, "all for the second")
    assert len(owner.seen) == 40


async def test_the_embedded_broker_serves_an_engine(embedded_broker: Broker, unique: str, running: Running) -> None:
    """Without an idempotent producer, for the demo alone: consumed, committed, produced."""
    await create_topic(embedded_broker.bootstrap_servers, unique, 1)
    await produce(embedded_broker.bootstrap_servers, unique, 1, 100)
    handler, successor = Handler(), Handler()
    # It keeps a member that left for the rest of its session.
    settings = engine_settings(embedded_broker.bootstrap_servers, producer_idempotent=False, session_timeout_s=6)
    async with running(settings, unique, handler) as engine:
        await engine.producer.send_and_wait(unique, b"one more", partition=0)
        await until(lambda: len(handler.finished) == 101, "101 records")
    async with running(settings, unique, successor) as engine:
        await engine.producer.send_and_wait(unique, b"and another", partition=0)
        await until(lambda: bool(successor.seen), "what came after the commit")
    assert set(successor.seen) == {(0, 101)}


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_records_compressed_in_any_way_are_read(codec: str, kafka: Broker, topic: str, running: Running) -> None:
    """Producers choose how they compress; one whose choice could not be read would stop its partition."""
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, compression_type=codec) as producer:
        for _ in range(10):
            await producer.send(topic, b"a text " * 100, partition=0)
    handler = Handler()
    async with running(engine_settings(kafka.bootstrap_servers), topic, handler):
        await until(lambda: len(handler.seen) == 10, "10 records")
