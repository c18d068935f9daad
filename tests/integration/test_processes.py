"""`worker --processes 2` on a real broker: both work, and they end together."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from processor.adapters import topics
from processor.cli.processes import environment
from processor.settings import Settings
from tests.support.brokers import Broker
from tests.support.stack import Child, Stack, until
from tests.support.world import PATIENT

COUNT = 2


def _free_ports() -> int:
    """The first of two neighbours that are both free."""
    for first in range(20_000 + os.getpid() % 5_000, 32_000, COUNT):
        try:
            with socket.create_server(("127.0.0.1", first)), socket.create_server(("127.0.0.1", first + 1)):
                return first
        except OSError:
            continue
    raise AssertionError("no two free ports")


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class Pair:
    """The command, and the two workers behind it; `held`: the partitions of each once both have their share."""

    def __init__(self, command: Child) -> None:
        self.command = command
        self.held: list[list[str]] = []

    def health(self, place: int) -> dict[str, Any]:
        at = self.command.port
        self.command.port = at + place
        try:
            return self.command.get("/health/detailed") or {}
        finally:
            self.command.port = at

    def partitions(self) -> list[list[str]]:
        """What each of them holds."""
        held = [self.health(place).get("kafka", {}).get("partitions", []) for place in range(COUNT)]
        return [[each["partition"] for each in partitions] for partitions in held]

    def pids(self) -> list[int]:
        pid = self.command.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
async def pair(kafka: Broker, unique: str, tmp_path: Path) -> AsyncIterator[Pair]:
    """Both have joined and hold partitions."""
    ours = {"EMBEDDING_PROVIDER": "openai", "EMBEDDING_OPENAI_API_KEY": "tests", **PATIENT}
    with Stack(tmp_path, unique, kafka.bootstrap_servers, **ours) as stack:
        await topics.create(stack.settings(), partitions=4, replication=1)
        pair = Pair(stack.spawn("worker", "--processes", str(COUNT), EMBEDDING_HTTP_PORT=str(_free_ports())))

        def both_hold() -> bool:
            pair.command.check()
            pair.held = pair.partitions()
            return [len(held) for held in pair.held] == [2, 2]

        await until(both_hold, within_s=300, what="two partitions for each")
        yield pair
        pids = pair.pids() if pair.command.process.poll() is None else []
    await until(lambda: not any(map(_alive, pids)), within_s=120, what="no orphan")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_all_of_them_cleanly(pair: Pair, number: signal.Signals) -> None:
    """Each partition has one owner; told to stop, both leave the group and the command ends with 0."""
    first, second = pair.held
    assert len({*first, *second}) == 4
    pair.command.process.send_signal(number)
    assert pair.command.process.wait(120) == 0, pair.command.tail()
    assert pair.command.log.read_text().count('"event": "stopped"') == COUNT


async def test_one_that_dies_ends_all(pair: Pair) -> None:
    """Its exit code is the command's, so that whoever restarts it starts both; the other one stops cleanly."""
    killed, other = pair.pids()
    os.kill(killed, signal.SIGKILL)
    assert pair.command.process.wait(120) == 128 + signal.SIGKILL
    assert not _alive(other)
    assert pair.command.log.read_text().count('"event": "stopped"') == 1


async def test_none_outlives_the_command(pair: Pair) -> None:
    """Killed itself, it leaves no worker behind that nobody watches."""
    pids = pair.pids()
    pair.command.kill()
    await until(lambda: not any(map(_alive, pids)), within_s=120, what="no orphan")


def test_what_must_differ_between_processes_does() -> None:
    """Ports and static members would clash, and each local model would take every core."""
    settings = Settings(http_port=8080, group_instance_id="pod-1", local_threads=0)
    first, second = environment(settings, 0, 2), environment(settings, 1, 2)
    assert (first["EMBEDDING_HTTP_PORT"], second["EMBEDDING_HTTP_PORT"]) == ("8080", "8081")
    assert (first["EMBEDDING_GROUP_INSTANCE_ID"], second["EMBEDDING_GROUP_INSTANCE_ID"]) == ("pod-1-0", "pod-1-1")
    assert int(first["EMBEDDING_LOCAL_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    chosen = Settings(http_port=0, local_threads=3)
    assert environment(chosen, 1, 2) == {"EMBEDDING_HTTP_PORT": "0"}
