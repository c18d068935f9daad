"""What stock Faust gets wrong with acknowledgements: each fault shown to happen there, and not to happen here.

The controls run Faust as it comes: as a process on the real broker, or its own consumer and producer classes with
nothing behind them. Ours runs on the real broker.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from faust.transport.producer import ProducerBuffer
from faust.types import TP, Message

from processor.adapters import topics
from processor.adapters.faust_engine import Engine
from processor.domain import ReceivedResult
from processor.identity import request_id
from processor.ports import Run
from tests.support import audit
from tests.support.brokers import Broker, create_topic
from tests.support.engines import Group, Handler, engine_settings, finishing, group_of, log_ends, produce, running
from tests.support.engines import until as until_true
from tests.support.provider_server import ProviderProcess
from tests.support.stack import ROOT, Stack, until
from tests.support.traffic import Traffic, small_requests

RECORDS = 20
PLACE = TP("records", 0)


@pytest.fixture
async def topic(kafka: Broker, unique: str) -> str:
    """A topic of one partition; its group has the same name."""
    await create_topic(kafka.bootstrap_servers, unique)
    return unique


# --- the controls --------------------------------------------------------------------------------------------


class StockConsumer:
    """Faust's consumer and its books of one partition. What it commits is kept instead of sent."""

    def __init__(self) -> None:
        self.app = faust.App("control", broker="kafka://127.0.0.1:1", datadir=os.devnull, autodiscover=False)
        self.app.topics._acking_topics.add(PLACE.topic)  # type: ignore[attr-defined]
        consumer: Any = self.app.consumer
        consumer.assignment = lambda: {PLACE}
        consumer._commit = self._commit
        self.consumer = consumer
        self.committed: int | None = None

    async def _commit(self, offsets: dict[TP, int]) -> bool:
        self.committed = offsets[PLACE]
        return True

    def fetch(self, *offsets: int) -> list[Message]:
        """Records that are delivered and not acknowledged."""
        messages: list[Any] = [_message(offset) for offset in offsets]
        for message in messages:
            self.consumer.track_message(message)
        return messages


def _message(offset: int) -> Any:
    return Message(PLACE.topic, PLACE.partition, offset, 0.0, 0, None, None, b"", None, tp=PLACE)


@pytest.fixture
async def stock() -> AsyncIterator[StockConsumer]:
    """Its thread is never started; only the loop that it made for it is closed."""
    stock = StockConsumer()
    yield stock
    stock.consumer._thread.thread_loop.close()


@asynccontextmanager
async def stock_process(kafka: Broker, mode: str, topic: str) -> AsyncIterator[None]:
    """A process of stock Faust; killed at the end."""
    arguments = ["-m", "tests.support.stock_faust", mode, kafka.bootstrap_servers, topic]
    quiet = asyncio.subprocess.DEVNULL
    child = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT, stdout=quiet, stderr=quiet)
    try:
        yield
        assert child.returncode is None, "the control ended by itself"
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def all_committed(group: Group) -> None:
    async def done() -> bool:
        try:
            return (await group.committed()).get(0) == RECORDS
        except GroupCoordinatorNotAvailableError:  # the broker has just started
            return False

    await until(done, within_s=60, what="stock Faust commits it all")


# --- take() --------------------------------------------------------------------------------------------------


async def test_stock_take_loses_the_batch_whose_body_fails(kafka: Broker, topic: str) -> None:
    """Control: every batch fails, and all of them are committed."""
    await produce(kafka.bootstrap_servers, topic, 1, RECORDS)
    async with group_of(kafka.bootstrap_servers, topic) as group, stock_process(kafka, "take", topic):
        await all_committed(group)


async def test_a_body_that_fails_loses_nothing(kafka: Broker, topic: str) -> None:
    """What the failing handler had in its hands is not committed: a successor gets all of it."""
    await produce(kafka.bootstrap_servers, topic, 1, RECORDS)

    async def fail(run: Run) -> None:
        raise RuntimeError("the body fails")

    broken, successor = Handler(fail), Handler()
    settings = engine_settings(kafka.bootstrap_servers)
    engine = Engine(settings, app_id=topic, topics=[topic], handler=broken)
    await engine.start()
    try:
        with pytest.raises(RuntimeError, match="the body fails"):
            await engine.wait()
    finally:
        await engine.stop()
    assert broken.seen
    async with running(settings, topic, successor):
        await until_true(lambda: len(successor.finished) == RECORDS, "all records again")


# --- acknowledgements out of order (issue #606) --------------------------------------------------------------


async def test_stock_commits_past_an_unfinished_offset_0(stock: StockConsumer) -> None:
    """Control: with nothing committed yet, whatever is acknowledged first is taken for the beginning."""
    messages = stock.fetch(*range(5))
    stock.consumer.ack(messages[1])
    await stock.consumer.force_commit()
    assert stock.committed == 2


async def test_stock_commits_past_the_record_at_the_committed_offset(stock: StockConsumer) -> None:
    """Control: off by one: the first record after the committed offset may be missing, and is."""
    stock.consumer._committed_offset[PLACE] = 10
    _, second = stock.fetch(10, 11)
    stock.consumer.ack(second)
    await stock.consumer.force_commit()
    assert stock.committed == 12


async def test_stock_takes_the_record_after_a_gap_for_a_part_of_it(stock: StockConsumer) -> None:
    """Control: offsets 5 to 8 are not in the log; record 9 behind them counts as acknowledged with them."""
    stock.consumer._committed_offset[PLACE] = 4
    before, _unfinished, after = stock.fetch(4, 9, 10)
    await stock.consumer._add_gap(PLACE, 5, 9)  # as its reading loop calls it before it delivers 9
    stock.consumer.ack(before)
    stock.consumer.ack(after)
    await stock.consumer.force_commit()
    assert stock.committed == 11


@pytest.mark.parametrize("seed", range(3))
async def test_a_hundred_in_flight_finish_in_any_order(seed: int, kafka: Broker, topic: str) -> None:
    """Offset 0 is among them; whatever is committed meanwhile, everything below it is finished, and in the end all."""
    held: list[Run] = []
    handler = Handler(_keep(held))
    await produce(kafka.bootstrap_servers, topic, 1, 100)
    settings = engine_settings(kafka.bootstrap_servers, commit_interval_s=0.05)
    async with group_of(kafka.bootstrap_servers, topic) as group, running(settings, topic, handler):
        await until_true(lambda: len(handler.seen) == 100, "a hundred in flight")
        pending = [(run, record.source.offset) for run in held for record in run.records]
        random.Random(seed).shuffle(pending)
        for number, (run, offset) in enumerate(pending):
            handler.finish(run, offset)
            if number % 7 == 0:
                committed = (await group.committed()).get(0, 0)
                assert handler.finished >= {(0, below) for below in range(committed)}
                await asyncio.sleep(settings.commit_interval_s)
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert await group.committed() == {0: 100}


async def test_the_record_after_a_gap_is_finished_before_it_is_committed(kafka: Broker, topic: str) -> None:
    """A transaction's marker leaves a hole in the log: the commit stops before the record behind it."""
    held: list[Run] = []
    handler = Handler(_keep(held))
    settings = engine_settings(kafka.bootstrap_servers, commit_interval_s=0.05)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=topic) as producer:
        for number in range(2):
            async with producer.transaction():
                await producer.send_and_wait(topic, b"%d" % number, partition=0)
    async with group_of(kafka.bootstrap_servers, topic) as group, running(settings, topic, handler):
        await until_true(lambda: len(handler.seen) == 2, "both records")
        assert sorted(handler.seen) == [(0, 0), (0, 2)]
        handler.finish(held[0], 0)

        async def committed() -> bool:
            return bool(await group.committed())

        await until(committed, within_s=60, what="a commit")
        await asyncio.sleep(3 * settings.commit_interval_s)
        assert (await group.committed())[0] <= 2


def _keep(held: list[Run]) -> Any:
    async def keep(run: Run) -> None:
        held.append(run)

    return keep


# --- sends that are pending or refused -----------------------------------------------------------------------


async def test_stock_flush_gives_up_with_sends_pending() -> None:
    """Control: after a tenth of a second without progress it returns as if all had been sent; the commit follows."""
    buffer = ProducerBuffer()
    buffer.app = SimpleNamespace(conf=SimpleNamespace(producer_threaded=False))  # type: ignore[assignment]
    room = asyncio.Event()

    class Full:
        async def publish_message(self, fut: Any, wait: bool = False) -> None:
            await room.wait()

    for _ in range(3):
        buffer.put(SimpleNamespace(message=SimpleNamespace(channel=Full())))  # type: ignore[arg-type]
    await buffer.start()
    try:
        async with asyncio.timeout(60):
            await buffer.flush()
        assert buffer.size > 0
    finally:
        room.set()
        await buffer.flush()
        await buffer.stop()


async def test_stock_commits_what_the_broker_refused(kafka: Broker, topic: str) -> None:
    """Control: not one answer was taken by the broker; all records are committed."""
    await create_topic(kafka.bootstrap_servers, f"{topic}-out", configs={"max.message.bytes": "1000"})
    await produce(kafka.bootstrap_servers, topic, 1, RECORDS)
    async with group_of(kafka.bootstrap_servers, topic) as group, stock_process(kafka, "unsent", topic):
        await all_committed(group)
    assert await log_ends(kafka.bootstrap_servers, f"{topic}-out", 1) == {0: 0}


async def delete_topic(bootstrap_servers: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([topic])

        async def gone() -> bool:
            return topic not in await admin.list_topics()

        await until(gone, within_s=30, what="the topic is gone")
    finally:
        await admin.close()


async def test_a_worker_commits_nothing_while_its_results_are_not_acknowledged(
    kafka: Broker, unique: str, tmp_path: Path
) -> None:
    """Neither on time nor when it stops with sends pending; once the broker takes them, every record is answered."""
    requests = list(small_requests(RECORDS))
    with ProviderProcess("--base-ms", "1", "--per-text-ms", "0") as provider:
        environment = {
            "EMBEDDING_PROVIDER": "openai",
            "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
            "EMBEDDING_OPENAI_API_KEY": "tests",
            "EMBEDDING_DEFAULT_MODEL": "text-embedding-3-small",
            "EMBEDDING_COMMIT_INTERVAL_S": "0.1",
            "EMBEDDING_REVOKE_BUDGET_S": "1",
        }
        with Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
            settings = stack.settings()
            await topics.create(settings, partitions=1, replication=1)
            async with Traffic(settings, partitions=1, group=f"{settings.group_id}-bulk") as traffic:
                worker = stack.spawn("worker")
                await until(worker.ready, within_s=60, what="the worker is ready")
                await delete_topic(kafka.bootstrap_servers, settings.topic(topics.topics()["results"].name))
                await traffic.flow(requests, per_s=1_000)
                calls = settings.topic(topics.topics()["calls"].name)

                async def embedded() -> bool:
                    return sum((await log_ends(kafka.bootstrap_servers, calls, 1)).values()) >= 2

                await until(embedded, within_s=60, what="an intent and its receipt")
                await asyncio.sleep(1)
                assert sum((await traffic.committed()).values()) == 0
                assert await asyncio.to_thread(worker.stop) == 0, worker.tail()
                assert sum((await traffic.committed()).values()) == 0
                await topics.create(settings, partitions=1, replication=1)
                successor = stack.spawn("worker")
                await until(traffic.all_committed, within_s=60, what="all is committed")
                results = [result async for _, result in audit.read_topic(settings, "results", ReceivedResult)]
                assert {result.request_id for result in results} == {request_id(each) for each in requests}
                assert await asyncio.to_thread(successor.stop) == 0, successor.tail()


# --- revocation before a commit ------------------------------------------------------------------------------


async def test_stock_forgets_at_a_revocation_what_is_finished(stock: StockConsumer) -> None:
    """Control: ten records are finished and not yet committed; the revocation commits none of them."""
    messages = stock.fetch(*range(10))
    for message in messages:
        stock.consumer.ack(message)
    stock.consumer._on_partitions_revoked = _commit_of(stock)
    await stock.consumer.on_partitions_revoked({PLACE})
    assert stock.committed is None


async def test_stock_commits_at_a_revocation_past_what_is_unfinished(stock: StockConsumer) -> None:
    """Control: with its books thrown away first, an acknowledgement that comes during the revocation is taken for the
    beginning: what is still worked on before it is committed past.
    """
    messages = stock.fetch(*range(10))
    stock.consumer._committed_offset[PLACE] = 0
    during = messages[5]

    async def finish_and_commit(revoked: set[TP]) -> None:
        stock.consumer.ack(during)
        await stock.consumer.force_commit()

    stock.consumer._on_partitions_revoked = finish_and_commit
    await stock.consumer.on_partitions_revoked({PLACE})
    assert stock.committed == 6


def _commit_of(stock: StockConsumer) -> Any:
    async def commit(revoked: set[TP]) -> None:
        await stock.consumer.force_commit()

    return commit


async def test_a_revocation_commits_what_is_finished_and_nothing_else(kafka: Broker, unique: str) -> None:
    """Without a commit on time: a newcomer gets its partition from the first unfinished record on."""
    await create_topic(kafka.bootstrap_servers, unique, partitions=2)
    await produce(kafka.bootstrap_servers, unique, 2, 200)

    handler, newcomer = finishing(lambda offset: offset < 50 or offset == 75), Handler()
    settings = engine_settings(kafka.bootstrap_servers, commit_interval_s=3600)
    async with running(settings, unique, handler):
        await until_true(lambda: len(handler.seen) == 200, "200 records")
        async with running(settings, unique, newcomer):
            await until_true(lambda: len(newcomer.seen) == 50, "the rest of its partition")
            partitions = {partition for partition, _ in newcomer.seen}
            assert len(partitions) == 1
            assert {offset for _, offset in newcomer.seen} == set(range(50, 100))
