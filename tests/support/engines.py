"""Engines for tests: tiny handlers, and what the log and the group hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from processor.adapters.faust_engine import Engine
from processor.ports import Lease, Run
from processor.settings import Settings
from tests.support import brokers, stack
from tests.support.brokers import ends_of
from tests.support.plain_engine import PlainEngine

ENGINES: Mapping[str, type[Engine]] = {"faust": Engine, "plain": PlainEngine}

Place = tuple[int, int]
"""(partition, offset)"""


def engine_settings(bootstrap_servers: str, /, **overrides: Any) -> Settings:
    """Quick to notice, quick to commit; the session outlives a machine that stands still for seconds."""
    return Settings(
        **{
            "bootstrap_servers": bootstrap_servers,
            "session_timeout_s": 30.0,
            "heartbeat_interval_s": 0.5,
            "lease_margin_s": 1.0,
            "revoke_budget_s": 2.0,
            "commit_interval_s": 0.1,
            **overrides,
        }
    )


class Handler:
    """A `RunHandler` that notes what it gets and finishes it at once, unless told otherwise."""

    def __init__(self, on_run: Callable[[Run], Awaitable[None]] | None = None) -> None:
        self.seen: Counter[Place] = Counter()
        self.finished: set[Place] = set()
        self.runs: list[Run] = []
        self.revoked: list[Lease] = []
        self.stands_still = False
        self.stored: dict[tuple[str, int], int] = {}
        self._on_run = on_run or self.finish_all

    async def on_run(self, run: Run) -> None:
        self.runs.append(run)
        self.seen.update((record.source.partition, record.source.offset) for record in run.records)
        await self._on_run(run)

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        self.revoked += leases

    def waiting(self) -> bool:
        return self.stands_still

    async def positions(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        return self.stored

    async def finish_all(self, run: Run) -> None:
        for record in run.records:
            self.finish(run, record.source.offset)

    def finish(self, run: Run, offset: int) -> None:
        """Counted as finished only if the lease still stands: otherwise somebody else does it again."""
        if not run.lease.revoked:
            run.lease.finish(offset)
            self.finished.add((run.lease.partition, offset))


def finishing(which: Callable[[int], bool]) -> Handler:
    """A handler that finishes only the offsets for which this holds."""

    async def on_run(run: Run) -> None:
        for record in run.records:
            if which(record.source.offset):
                handler.finish(run, record.source.offset)

    handler = Handler(on_run)
    return handler


@asynccontextmanager
async def running(
    settings: Settings, topic: str, handler: Handler, *, kind: type[Engine] = Engine, **options: Any
) -> AsyncIterator[Engine]:
    """An engine of the group named like the topic."""
    engine = kind(settings, app_id=topic, topics=[topic], handler=handler, **options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


def unfinished(engine: Engine) -> int:
    """How many records it has handed out and not seen finished."""
    assert engine._consumer is not None
    return sum(len(lease.watermark) for lease in (engine._consumer.leases or {}).values())


async def steal(engine: Engine) -> Mapping[TopicPartition, Sequence[Any]]:
    """Fetch behind its back: what this gets, the engine's own next fetch does not."""
    member = engine._consumer
    assert member is not None
    assert member.leases is not None
    if isinstance(engine, PlainEngine):
        return await member._fetched(member.leases)
    return await member._thread.run(member._thread.fetch(member.leases))


async def until(condition: Callable[[], bool], what: str, *, within_s: float = stack.PATIENCE_S) -> None:
    """Wait for a condition; fails with what was waited for."""
    await stack.until(condition, within_s=within_s, what=what, every_s=0.01)


async def create_topic(bootstrap_servers: str, topic: str, partitions: int) -> None:
    await brokers.create_topic(bootstrap_servers, topic, partitions=partitions)


async def produce(bootstrap_servers: str, topic: str, partitions: int, count: int) -> None:
    """`count` small records, spread evenly over the partitions."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=5) as producer:
        await producer.partitions_for(topic)
        sent = [await producer.send(topic, b"%d" % n, partition=n % partitions) for n in range(count)]
        await asyncio.gather(*sent)


@asynccontextmanager
async def flowing(bootstrap_servers: str, topic: str, partitions: int) -> AsyncIterator[None]:
    """Small records flow into every partition, at most 2,000 a second, for as long as the context lasts."""
    over = asyncio.Event()

    async def flow() -> None:
        while not over.is_set():
            sent = [await producer.send(topic, b"%d" % n, partition=n % partitions) for n in range(200)]
            await asyncio.gather(*sent, asyncio.sleep(0.1))

    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=5) as producer:
        task = asyncio.create_task(flow())
        try:
            yield
        finally:
            over.set()
            await task


async def log_ends(bootstrap_servers: str, topic: str, partitions: int) -> dict[int, int]:
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap_servers) as consumer:
        return await ends_of(consumer, topic, partitions)


class Group:
    """What a group has committed of a topic; the group is named like the topic."""

    def __init__(self, admin: AIOKafkaAdminClient, topic: str) -> None:
        self._admin = admin
        self._topic = topic

    async def committed(self) -> dict[int, int]:
        """Partition to committed offset; one without a commit is left out."""
        offsets = await self._admin.list_consumer_group_offsets(self._topic)
        return {partition.partition: each.offset for partition, each in offsets.items() if each.offset >= 0}

    async def until_committed(self, offsets: Mapping[int, int]) -> None:
        """Wait until this is committed, and nothing else."""

        async def stands() -> bool:
            return await self.committed() == offsets

        await stack.until(stands, within_s=stack.PATIENCE_S, what=f"{offsets} committed", every_s=0.05)


@asynccontextmanager
async def group_of(bootstrap_servers: str, topic: str) -> AsyncIterator[Group]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        yield Group(admin, topic)
    finally:
        await admin.close()
