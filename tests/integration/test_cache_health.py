"""What a worker says of a shared cache that it can't use, and that it works without it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from processor.adapters import topics
from processor.adapters.embedded import ChildServer, answers_redis, redis_command
from processor.cli.doctor import examine
from processor.settings import DEFAULT_CACHE_SECRET, load
from tests.support.brokers import Broker
from tests.support.redis_variants import program
from tests.support.stack import Stack, free_port, until
from tests.support.world import PATIENT

HOST = "127.0.0.1"


async def test_a_worker_that_redis_refuses_is_ready_and_says_why(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """A wrong password is named at start and in health, and so is a secret that everybody knows."""
    port = free_port()
    server = ChildServer(
        "a Redis with a password",
        [*redis_command(program(), port=port), "--requirepass", "canary-1d"],
        answers=lambda: not answers_redis(HOST, port) and _listens(port),
        start_timeout_s=60,
    )
    environment = {
        "EMBEDDING_PROVIDER": "openai",
        "EMBEDDING_OPENAI_API_KEY": "tests",
        "EMBEDDING_REDIS_URL": f"redis://{HOST}:{port}/0",
        "EMBEDDING_REDIS_PASSWORD": "canary-2e",
        "EMBEDDING_CACHE_SECRET": DEFAULT_CACHE_SECRET,
        **PATIENT,
    }
    with server, Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
        await topics.create(stack.settings(), partitions=1, replication=1)
        child = stack.spawn("worker")
        await until(child.ready, within_s=300, what="the worker is ready")
        health = await child.report("/health/detailed")
        assert child.stop() == 0
        log = child.log.read_text()
    assert "EMBEDDING_REDIS_PASSWORD" in health["cache"]["redis"]
    assert health["cache"]["goes_without"] == {"reads": False, "writes": False}  # nothing was looked up yet
    warnings = [line for line in map(json.loads, log.splitlines()) if line["event"] == "cache"]
    assert [line["level"] for line in warnings] == ["warning", "warning"]
    assert "EMBEDDING_REDIS_PASSWORD" in warnings[0]["redis"]
    assert "EMBEDDING_CACHE_SECRET_FILE" in warnings[1]["fix"]
    assert "canary" not in f"{log}{health}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@pytest.mark.parametrize("secret, state", [("", "warning"), ("embedding-processor", "warning"), ("our own", "ok")])
async def test_the_doctor_warns_of_a_secret_that_everybody_knows(redis_url: str, secret: str, state: str) -> None:
    """With the default, or none at all, whoever reads Redis could tell whether a text was embedded."""
    settings = load(
        redis_url=redis_url,
        redis_timeout_ms=3_000,
        cache_secret=secret,
        bootstrap_servers=f"{HOST}:1",
        openai_api_key=None,
    )
    checks = {check.name: check async for check in examine(settings)}
    assert checks["cache"].state == state
    assert ("EMBEDDING_CACHE_SECRET_FILE" in checks["cache"].fix) is (state == "warning")
