"""A process that can't start says why in one line of its log, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from processor.client import Client
from processor.errors import BrokerUnavailable
from processor.settings import Settings
from tests.support.brokers import Broker
from tests.support.stack import Stack, until


async def last_words(role: str, **settings: str) -> dict[str, Any]:
    """The last line in the log of a process that ends by itself with 1; every line is JSON."""
    ours = {f"EMBEDDING_{name.upper()}": value for name, value in settings.items()}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "processor", role),
        env=os.environ | {"EMBEDDING_PROVIDER": "local", "EMBEDDING_HTTP_PORT": "0"} | ours,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, err = await asyncio.wait_for(child.communicate(), 120)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 1
    lines: list[dict[str, Any]] = [json.loads(line) for line in err.decode().splitlines()]
    assert not any("exception" in line for line in lines)
    return lines[-1]


async def test_brokers_out_of_reach_are_said_with_their_address() -> None:
    """A start waits for them no longer than it should; then the operator reads which setting to look at."""
    said = await last_words("worker", bootstrap_servers="127.0.0.1:1", broker_wait_s="1")
    assert (said["level"], said["error"]) == ("critical", "BrokerUnavailable")
    assert "127.0.0.1:1 " in said["why"]
    assert "EMBEDDING_BOOTSTRAP_SERVERS" in said["why"]


@pytest.mark.parametrize("role", ["worker", "aggregator"])
async def test_a_start_that_waits_for_brokers_is_live_and_not_ready(role: str, tmp_path: Path) -> None:
    """So no probe ends it for waiting, nothing is rolled out behind it, and a stop need not wait for brokers."""
    with Stack(tmp_path, "waiting", "127.0.0.1:1", EMBEDDING_PROVIDER="local") as stack:
        child = stack.spawn(role)
        await until(lambda: "waiting for the brokers" in child.tail(), within_s=60, what="it waits")
        assert await child.report("/health/live") == {"live": True}
        assert not (await child.report("/health/detailed"))["ready"]
        assert not child.ready()
        assert child.stop() == 0, child.tail()


@pytest.mark.parametrize("role", ["worker", "aggregator"])
async def test_missing_topics_are_said_with_the_command(role: str, kafka: Broker, unique: str, tmp_path: Path) -> None:
    """Every one of them, and how to make them."""
    said = await last_words(
        role,
        bootstrap_servers=kafka.bootstrap_servers,
        topic_prefix=f"{unique}.",
        aggregator_store=str(tmp_path / "store"),
    )
    assert said["error"] == "TopicsError"
    assert said["why"].count("embedding-processor topics create") >= 8


async def test_a_broker_that_knows_no_idempotent_producer_is_said_with_its_setting(embedded_broker: Broker) -> None:
    """Who points a client of the demo's broker at it without its setting is told so."""
    with pytest.raises(BrokerUnavailable, match="EMBEDDING_PRODUCER_IDEMPOTENT=false"):
        async with Client(Settings(bootstrap_servers=embedded_broker.bootstrap_servers)):
            pass


async def test_a_port_in_use_is_said_by_its_setting() -> None:
    """Two processes on one machine need two ports."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = await last_words("worker", http_port=str(taken.getsockname()[1]))
    assert said["error"] == "SettingsError"
    assert "EMBEDDING_HTTP_PORT" in said["why"]
