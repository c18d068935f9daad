"""Fixtures of every suite: servers of the run, unique names, a watch for leaked tasks and lost errors."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.brokers import Broker, Servers

SERVERS = pytest.StashKey[Servers]()
FIGURES = pytest.StashKey[list[str]]()
NOT_RUN = "NOT RUN, needs Apache Kafka: "

# No law is about how fast a busy machine makes examples.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """One set of servers for the run."""
    config.stash[SERVERS] = Servers()
    config.stash[FIGURES] = []


def pytest_unconfigure(config: pytest.Config) -> None:
    """They end with the run."""
    config.stash[SERVERS].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what talks to a server by the fixtures it asks for, and watch the tasks of each coroutine."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        fixtures = set(item.fixturenames)
        if "servers" in fixtures:
            item.add_marker("integration")
        if "kafka" in fixtures:
            item.add_marker("kafka")
        if inspect.iscoroutinefunction(item.function):
            item.fixturenames.insert(0, "no_leaked_tasks")


def pytest_collection_finish() -> None:
    """Imported modules need no second look by the collections of `nothing_swallowed`."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which servers were used, and loudly what was not run for want of one."""
    servers = config.stash[SERVERS]
    if servers.report:
        terminalreporter.section("servers")
        for line in servers.report:
            terminalreporter.write_line(line)
    if config.stash[FIGURES]:
        terminalreporter.section("figures")
        for line in config.stash[FIGURES]:
            terminalreporter.write_line(line)
    skipped = [
        report
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple) and NOT_RUN in report.longrepr[2]
    ]
    if skipped:
        terminalreporter.section("tests that need Apache Kafka were NOT RUN", sep="!", red=True)
        for report in skipped:
            terminalreporter.write_line(report.nodeid)


@pytest.fixture(scope="session")
def servers(pytestconfig: pytest.Config) -> Servers:
    """The servers of this run; each starts when it is first asked for."""
    return pytestconfig.stash[SERVERS]


@pytest.fixture(scope="session")
def broker(servers: Servers) -> Broker:
    """The most real broker to be had here."""
    return servers.broker()


@pytest.fixture(scope="session")
def kafka(servers: Servers) -> Broker:
    """A broker that keeps what Kafka promises; the test skips where there is only the embedded one."""
    broker = servers.broker()
    if not broker.is_apache_kafka:
        pytest.skip(NOT_RUN + "; ".join(servers.report))
    return broker


@pytest.fixture(scope="session")
def embedded_broker(servers: Servers) -> Broker:
    """The embedded broker, whatever else there is."""
    return servers.broker_of("embedded")


@pytest.fixture(scope="session")
def redis_url(servers: Servers) -> str:
    """A Redis-protocol cache, shared by the run: keep to `unique` key prefixes, flush nothing."""
    return servers.redis_url()


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Prints a line of figures at the end of the run."""
    return pytestconfig.stash[FIGURES].append


@pytest.fixture
def unique() -> str:
    """A name that no other test and no earlier run has used: for topics, groups, key prefixes."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def nothing_swallowed() -> Iterator[None]:
    """Fail a test in which asyncio reported an exception nobody retrieved, or a pending task destroyed."""
    lost: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if "never retrieved" in message or "destroyed but it is pending" in message:
                lost.append(message)

    listener = Listener()
    logger = logging.getLogger("asyncio")
    logger.addHandler(listener)
    try:
        yield
        gc.collect()
    finally:
        logger.removeHandler(listener)
    assert not lost, "swallowed: " + "; ".join(lost)


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a coroutine test that leaves a task behind, once what it cancelled has had the time to end."""
    before = asyncio.all_tasks() | {asyncio.current_task()}
    yield
    before.add(asyncio.current_task())
    for _ in range(10):
        if not asyncio.all_tasks() - before:
            return
        await asyncio.sleep(0)
    # Their last words may go to another process.
    if told := {task for task in asyncio.all_tasks() - before if task.cancelling()}:
        await asyncio.wait(told, timeout=30)
    left = asyncio.all_tasks() - before
    if not left:
        return
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    pytest.fail("leaked tasks: " + "; ".join(repr(task.get_coro()) for task in left))
