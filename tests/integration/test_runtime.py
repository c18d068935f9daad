"""What a process runs on, as it tells whoever looks: loops, compiled extensions, garbage collection."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from processor.adapters import topics
from tests.support.brokers import Broker
from tests.support.stack import Child, Stack, until


async def _looked_at(
    role: str, kafka: Broker, unique: str, folder: Path, **environment: str
) -> tuple[Mapping[str, Any], dict[str, float], list[dict[str, Any]]]:
    """The runtime in the health of a started process, the metric of each extension, and the log after its end."""
    ours = {"EMBEDDING_PROVIDER": "openai", "EMBEDDING_OPENAI_API_KEY": "tests"}
    with Stack(folder, unique, kafka.bootstrap_servers, **ours) as stack:
        await topics.create(stack.settings(), partitions=1, replication=1)
        child = stack.spawn(role, **environment)
        await until(child.ready, within_s=60, what=f"{role} is ready")
        runtime: dict[str, Any] = {}

        async def has_started() -> bool:
            """It joins its group before the last steps of its start."""
            runtime.update((await child.report("/health/detailed"))["runtime"])
            return runtime["gc"]["frozen_objects"] > 0  # type: ignore[no-any-return]

        await until(has_started, within_s=60, what="the end of its start")
        metrics = await asyncio.to_thread(_extension_metrics, child)
        assert child.stop() == 0, child.tail()
        return runtime, metrics, [json.loads(line) for line in child.log.read_text().splitlines()]


def _extension_metrics(child: Child) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{child.port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.removeprefix("embedding_extension_loaded{name=") for line in lines)
    return {name.split('"')[1]: float(name.split()[-1]) for name in found if name.startswith('"')}


@pytest.mark.parametrize("role", ["worker", "aggregator"])
async def test_a_process_runs_on_what_is_fast(role: str, kafka: Broker, unique: str, tmp_path: Path) -> None:
    """uvloop runs the main loop, every extension is loaded, what start has made is frozen; the log says which loops."""
    runtime, metrics, log = await _looked_at(role, kafka, unique, tmp_path)
    assert runtime["loops"] == {"main": "uvloop", "consumer": "asyncio.unix_events"}
    assert set(runtime["extensions"].values()) == {True}
    assert metrics == dict.fromkeys(runtime["extensions"], 1.0)
    assert runtime["gc"]["frozen_objects"] > 10_000
    assert runtime["gc"]["threshold"] > 700
    joined = next(line for line in log if line["event"] == "joined")
    assert (joined["main"], joined["consumer"]) == ("uvloop", "asyncio.unix_events")
    assert not any("extensions" in line["event"] for line in log)


async def test_missing_extensions_are_told_loudly(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """A warning with the fix at start, the metric and the health; the worker works all the same."""
    runtime, metrics, log = await _looked_at(
        "worker", kafka, unique, tmp_path, NO_CYTHON="1", AIOKAFKA_NO_EXTENSIONS="1"
    )
    assert set(runtime["extensions"].values()) == {False}
    assert metrics == dict.fromkeys(runtime["extensions"], 0.0)
    warning = next(line for line in log if "extensions are not loaded" in line["event"])
    assert warning["level"] == "warning"
    assert set(warning["of"]) == set(metrics)
    assert "NO_CYTHON" in warning["fix"]
