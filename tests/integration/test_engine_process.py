"""The engine as a process: how it ends, and what it does when it was frozen."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from tests.support.brokers import Broker
from tests.support.engines import (
    ENGINES,
    Handler,
    create_topic,
    engine_settings,
    group_of,
    produce,
    running,
    until,
)
from tests.support.stack import PATIENCE_S


class Process:
    """A child engine and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.startswith(b"{"):
                self.events.append(json.loads(line))

    def said(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    @property
    def finished(self) -> int:
        """How many records its runs have finished."""
        return sum(each["records"] for each in self.said("run"))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()


Start = Callable[..., AbstractAsyncContextManager[Process]]


@pytest.fixture(params=ENGINES)
def process(request: pytest.FixtureRequest) -> Start:
    """How each law's child is started: on Faust, and on the experiment without it."""
    return partial(started, kind=request.param)


@asynccontextmanager
async def started(broker: Broker, topic: str, **options: Any) -> AsyncIterator[Process]:
    """A started child engine; killed at the end if it still runs."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.engine_process"),
        json.dumps({"bootstrap_servers": broker.bootstrap_servers, "topic": topic, **options}),
        stdout=asyncio.subprocess.PIPE,
    )
    seen = Process(child)
    listening = asyncio.create_task(seen.listen())
    try:
        yield seen
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        await listening


@pytest.fixture
async def topic(kafka: Broker, unique: str) -> str:
    """A topic of one partition with a hundred records."""
    await create_topic(kafka.bootstrap_servers, unique, 1)
    await produce(kafka.bootstrap_servers, unique, 1, 100)
    return unique


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_cleanly(
    kafka: Broker, topic: str, process: Start, number: signal.Signals
) -> None:
    """What is finished is committed, the hooks run, the group is left at once, the exit code is 0; uvloop ran it."""
    successor = Handler()
    times = {"commit_interval_s": 3600, "session_timeout_s": 1000}  # so long its successor would wait for its end
    async with process(kafka, topic, settings=times) as child:
        await until(lambda: child.finished == 100, "all records, in however many runs")
        await until(lambda: bool(child.said("started")), "the end of its start, which may come after its runs")
        assert child.said("started")[0]["loop"] == "uvloop"
        child.signal(number)
        assert await child.exit_code() == 0
    assert child.said("stopping")
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert await group.committed() == {0: 100}
    async with (
        asyncio.timeout(PATIENCE_S),
        running(engine_settings(kafka.bootstrap_servers), topic, successor) as engine,
    ):
        assert engine.status()["generation"] is not None


@pytest.mark.parametrize("after_s", [0, 0.3, 0.9])
async def test_a_signal_during_the_start_ends_the_process_cleanly(
    kafka: Broker, topic: str, process: Start, after_s: float
) -> None:
    """Whether it connects, joins or waits for an assignment: it stops and leaves."""
    async with process(kafka, topic) as child:
        await until(lambda: bool(child.said("starting")), "the beginning of its start")
        await asyncio.sleep(after_s)
        child.signal(signal.SIGTERM)
        assert await child.exit_code() == 0


async def test_a_broken_handler_ends_the_process_with_1(kafka: Broker, topic: str, process: Start) -> None:
    """Nothing is committed past the record at which it broke."""
    async with process(kafka, topic, break_at=50) as child:
        assert await child.exit_code() == 1
    assert child.said("broken")
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert (await group.committed()).get(0, 0) <= 50


async def test_a_broker_out_of_reach_ends_the_process_with_1(kafka: Broker, topic: str, process: Start) -> None:
    """Whoever restarts it sees that it does not run."""
    async with process(kafka, topic, settings={"bootstrap_servers": "127.0.0.1:1"}) as child:
        assert await child.exit_code() == 1
    assert child.said("starting")
    assert not child.said("started")


async def test_a_shutdown_that_hangs_is_ended(kafka: Broker, topic: str, process: Start) -> None:
    """The watchdog ends the process with 1 before whoever stops it would kill it."""
    async with process(kafka, topic, hang=True, settings={"shutdown_timeout_s": 1}) as child:
        await until(lambda: bool(child.said("run")), "a run")
        child.signal(signal.SIGTERM)
        assert await child.exit_code() == 1


async def test_a_frozen_worker_finds_its_lease_over_and_recovers(kafka: Broker, topic: str, process: Start) -> None:
    """Stopped for longer than its session and replaced, it may send nothing when it wakes; it joins again and gets
    the partition back when its successor leaves.
    """

    async def hold(run: Any) -> None:
        """Finish nothing, so that everything is left for whoever is next."""

    successor = Handler(hold)
    async with process(kafka, topic, hold=True, settings={"session_timeout_s": 6}) as frozen:
        await until(lambda: any(each["held"] for each in frozen.said("lease")), "a lease")
        frozen.signal(signal.SIGSTOP)
        async with running(engine_settings(kafka.bootstrap_servers), topic, successor):
            await until(lambda: bool(successor.runs), "the successor's run")
            assert successor.runs[0].lease.held()
            before = len(frozen.said("lease"))
            frozen.signal(signal.SIGCONT)
            await until(lambda: len(frozen.said("lease")) > before, "word from the frozen worker")
        woken = frozen.said("lease")[before:]
        assert woken[0]["frozen_s"] > 1
        assert not any(each["held"] for each in woken)
        await until(lambda: frozen.said("run")[-1]["generation"] > frozen.said("run")[0]["generation"], "its return")
        frozen.signal(signal.SIGTERM)
        assert await frozen.exit_code() == 0
