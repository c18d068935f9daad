"""Workers come, go, die and freeze while records flow: every record has one outcome, and no commit runs ahead.

REBALANCE_RECORDS sets how many records flow while workers come and go: 40,000 if unset, about two minutes. The law is
to be shown with `REBALANCE_RECORDS=200000 ./run faults -k rebalances`: two to six minutes on two busy cores.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from processor.adapters import topics
from processor.adapters.faust_engine import Engine
from processor.errors import SettingsError
from tests.support import audit
from tests.support.brokers import Broker, create_topic
from tests.support.engines import Handler, engine_settings, produce, running
from tests.support.engines import until as until_true
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic, check_samples, small_requests

RECORDS = int(os.environ.get("REBALANCE_RECORDS", "40000"))
COMINGS = 20
FREEZES = 4
PARTITIONS = 6
DIMENSIONS = 8
SECONDS_A_COMING = 5
KILLED = 5
"""Every so many goings is a SIGKILL; the others are SIGTERMs."""

Tell = Callable[[str], None]


class Fleet:
    """One worker that stays, others that come and go; sampled all the time."""

    def __init__(self, stack: Stack, traffic: Traffic) -> None:
        self.stack = stack
        self.traffic = traffic
        self.working: list[Child] = []

    async def come(self) -> Child:
        worker = self.stack.spawn("worker")
        self.working.append(worker)
        await until(worker.ready, within_s=60, what=f"{worker.name} is ready")
        return worker

    async def go(self, worker: Child) -> None:
        self.working.remove(worker)
        assert await asyncio.to_thread(worker.stop) == 0, worker.tail()

    def kill(self, worker: Child) -> None:
        self.working.remove(worker)
        worker.kill()

    async def moved(self, by: int) -> None:
        """Wait until results flow."""
        before = await self.traffic.results()

        async def more() -> bool:
            return await self.traffic.results() >= before + by or await self.traffic.all_committed()

        await until(more, within_s=60, what="results flow")

    async def watch(self) -> None:
        """Sample what is committed; a worker that ends by itself ends this."""
        while True:
            for worker in self.working:
                worker.check()
            await self.traffic.sample()
            await asyncio.sleep(0.2)

    async def finish(self) -> tuple[audit.Books, int]:
        """Wait for the end of the work, stop everybody, hold the books against the laws. The books, and the copies."""
        await until(self.traffic.all_committed, within_s=120, what="every record is committed")
        await self.traffic.sample()
        for worker in list(self.working):
            await self.go(worker)
        books = await audit.read_books(self.stack.settings(), [])
        assert len(books.requests) == self.traffic.sent
        copies = audit.check_outcomes(books, vector_of=functools.cache(expected_vector), dimensions=DIMENSIONS)
        audit.check_charges(books)
        check_samples(self.traffic.samples, books)
        return books, copies


@pytest.fixture
async def fleet(kafka: Broker, unique: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """With its first worker ready."""
    with ProviderProcess("--base-ms", "1", "--per-text-ms", "0", "--jitter", "0.01") as provider:
        environment = {
            "EMBEDDING_PROVIDER": "openai",
            "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
            "EMBEDDING_OPENAI_API_KEY": "tests",
            "EMBEDDING_DEFAULT_MODEL": "text-embedding-3-small",
            "EMBEDDING_COMMIT_INTERVAL_S": "0.2",
        }
        with Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
            settings = stack.settings()
            await topics.create(settings, partitions=PARTITIONS, replication=1)
            async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
                fleet = Fleet(stack, traffic)
                await fleet.come()
                yield fleet


@asynccontextmanager
async def flowing(fleet: Fleet, records: int, *, over_s: float) -> AsyncIterator[None]:
    """Records flow and are watched meanwhile; the first of these tasks to break breaks the test."""
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(fleet.watch())
        flow = tasks.create_task(fleet.traffic.flow(small_requests(records), per_s=records / over_s))
        yield
        await flow
        watching.cancel()


async def test_workers_that_come_and_go_lose_nothing(fleet: Fleet, tell: Tell) -> None:
    """A second and a third worker join and leave twenty times, one in five by SIGKILL: one outcome for each record."""
    dice = random.Random(20)
    started = time.monotonic()
    gone = 0
    async with flowing(fleet, RECORDS, over_s=COMINGS * SECONDS_A_COMING):
        await fleet.come()
        for coming in range(1, COMINGS):
            goer = fleet.working[1]
            joining = asyncio.create_task(fleet.come())
            await asyncio.sleep(dice.random() * 3)  # in the midst of the other's start, or of its join
            if coming % KILLED == 0:
                fleet.kill(goer)
            else:
                await fleet.go(goer)
            gone += 1
            await joining
            await fleet.moved(100)
        await fleet.go(fleet.working[1])
    books, copies = await fleet.finish()
    tell(
        f"{len(books.requests)} records, {COMINGS} joins, {gone + 1} leaves of which {gone // KILLED} kills: {copies} "
        f"copies, {len(fleet.traffic.samples)} samples, {time.monotonic() - started:.0f} s"
    )


async def test_a_worker_frozen_past_its_session_and_woken_loses_nothing(fleet: Fleet, tell: Tell) -> None:
    """Whatever it had in its hands when it froze, its successor does; what it still sends changes no outcome."""
    async with flowing(fleet, RECORDS // 2, over_s=FREEZES * 12):
        await fleet.come()
        for freeze in range(FREEZES):
            frozen, other = fleet.working[freeze % 2], fleet.working[1 - freeze % 2]
            await until(lambda: _held(frozen) == PARTITIONS // 2, within_s=60, what="both work")  # noqa: B023
            await fleet.moved(100)
            frozen.process.send_signal(signal.SIGSTOP)
            try:
                await until(lambda: _held(other) == PARTITIONS, within_s=60, what="the other took over")  # noqa: B023
                await fleet.moved(100)
            finally:
                frozen.process.send_signal(signal.SIGCONT)
    books, copies = await fleet.finish()
    tell(f"{len(books.requests)} records, {FREEZES} freezes past the session: {copies} copies")


async def test_a_stop_does_not_wait_for_a_join(fleet: Fleet) -> None:
    """A newcomer and a worker wait for one that was killed, until its session is over: a stop meanwhile is at once."""
    fleet.stack.environment["EMBEDDING_SESSION_TIMEOUT_S"] = "120"
    killed, stopped = await fleet.come(), await fleet.come()
    fleet.kill(killed)
    newcomer = fleet.stack.spawn("worker")
    await until(lambda: not stopped.ready(), within_s=60, what="a rebalance begins")
    started = time.monotonic()
    await fleet.go(stopped)
    assert time.monotonic() - started < 30
    newcomer.kill()


async def test_two_processes_under_one_instance_id_do_not_fight(kafka: Broker, unique: str) -> None:
    """The first one ends with a word about the setting; the other one has its partitions and keeps them."""
    await create_topic(kafka.bootstrap_servers, unique, partitions=2)
    settings = engine_settings(kafka.bootstrap_servers, group_instance_id="worker-0")
    first, second = Handler(), Handler()
    engine = Engine(settings, app_id=unique, topics=[unique], handler=first)
    await engine.start()
    try:
        await until_true(lambda: engine.status()["state"] == "consuming", "the first works")
        async with running(settings, unique, second) as twin:
            with pytest.raises(SettingsError, match="EMBEDDING_GROUP_INSTANCE_ID"):
                await engine.wait()
            await produce(kafka.bootstrap_servers, unique, 2, 100)
            await until_true(lambda: len(second.finished) == 100, "the second works")
            assert twin.status()["leases_held"]
    finally:
        await engine.stop()
    assert not first.finished


def _held(worker: Child) -> int:
    """How many partitions it works on; fails when it ended."""
    worker.check()
    health = worker.get("/health/detailed") or {}
    return len(health.get("kafka", {}).get("partitions", ()))
