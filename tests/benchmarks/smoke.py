"""What a stranger asks first: how long until it runs, what it holds in memory, how many chunks a second.

Each rate stands beside a baseline of the same run: the bare provider asked for the same texts without Kafka, cache,
ledger and results. Left out: more than one worker, and a backlog larger than a minute's work.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processor.adapters import topics
from processor.adapters.catalogue import load_catalogue
from processor.adapters.providers import open_provider
from processor.domain import Chunk, EmbeddingFunction, InputType, Request, Truncate
from processor.ports import EmbeddingProvider
from processor.settings import Settings
from tests.support.brokers import Servers
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic

PARTITIONS = 4
CALL_TEXTS = 512
CALLS_IN_FLIGHT = 4
LOCAL_TEXTS = 1000
SERVER_TEXTS = 10_000
TEXTS_PER_REQUEST = 20
BASE_MS, PER_TEXT_MS = 100, 1

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Start-up and idle memory of a worker, and its rate with the local model and with the test provider."""
    servers = Servers()
    try:
        broker, redis_url = servers.broker(), servers.redis_url()
        for line in servers.report:
            say(line)
        relaxed = {} if broker.is_apache_kafka else RELAXED
        with (
            tempfile.TemporaryDirectory() as folder,
            ProviderProcess("--base-ms", str(BASE_MS), "--per-text-ms", str(PER_TEXT_MS)) as server,
        ):
            local = {"EMBEDDING_PROVIDER": "local"}
            remote = {
                "EMBEDDING_PROVIDER": "openai",
                "EMBEDDING_OPENAI_BASE_URL": server.base_url,
                "EMBEDDING_OPENAI_API_KEY": "tests",
            }
            figures: dict[str, Any] = {"broker": broker.kind}
            for name, provider, count in (("local", local, LOCAL_TEXTS), ("provider", remote, SERVER_TEXTS)):
                where = Path(folder) / name
                where.mkdir()
                environment = {
                    "EMBEDDING_REDIS_URL": redis_url,
                    "EMBEDDING_COMMIT_INTERVAL_S": "0.1",
                    **provider,
                    **relaxed,
                }
                with Stack(where, f"smoke-{uuid.uuid4().hex[:8]}", broker.bootstrap_servers, **environment) as stack:
                    figures |= await _measure(name, stack, _texts(count), say)
            return figures
    finally:
        servers.close()


RELAXED = {"EMBEDDING_PRODUCER_IDEMPOTENT": "false", "EMBEDDING_REQUIRE_LOG_APPEND_TIME": "false"}


def _texts(count: int) -> list[str]:
    """About 600 bytes each, all different."""
    phrase = "the stream of chunks is cut into windows and every window into few and full calls"
    words = phrase.split(" ")
    return [f"chunk {i}: " + " ".join(words[(i + j) % len(words)] for j in range(115)) for i in range(count)]


async def _measure(name: str, stack: Stack, texts: Sequence[str], say: Say) -> dict[str, Any]:
    settings = stack.settings()
    await topics.create(settings, partitions=PARTITIONS, replication=1)
    started = time.monotonic()
    worker = stack.spawn("worker")
    await until(worker.ready, within_s=60, what="the worker is ready", every_s=0.02)
    startup_s = time.monotonic() - started
    await asyncio.sleep(2)
    idle_mb = _resident_mb(worker)
    async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
        await traffic.send(_requests(["warm up"]))
        await until(traffic.all_committed, within_s=60, what="the worker is warm")
        started = time.monotonic()
        await traffic.send(_requests(texts))

        # The offset of a request is committed once all its results are acknowledged.
        await until(traffic.all_committed, within_s=300, what="every request is committed", every_s=0.05)
        rate = len(texts) / (time.monotonic() - started)
    peak_mb = _resident_mb(worker)
    worker.stop()
    bare = await _bare_rate(settings, texts)
    say(f"{name}: {rate:.0f} chunks/s, bare provider {bare:.0f} chunks/s, ratio {rate / bare:.2f}")
    return {
        f"{name}_startup_seconds": round(startup_s, 2),
        f"{name}_idle_rss_mb": round(idle_mb),
        f"{name}_busy_rss_mb": round(peak_mb),
        f"{name}_chunks_per_s": round(rate, 1),
        f"{name}_bare_chunks_per_s": round(bare, 1),
        f"{name}_ratio_to_bare": round(rate / bare, 2),
    }


def _requests(texts: Sequence[str]) -> list[Request]:
    return [
        Request(
            tenant_id="bench",
            correlation_id=f"r{start}-{len(texts)}",
            action="generate",
            collection="bench",
            document_id=f"d{start}",
            chunks=[Chunk(f"c{i}", text) for i, text in enumerate(texts[start : start + TEXTS_PER_REQUEST])],
        )
        for start in range(0, len(texts), TEXTS_PER_REQUEST)
    ]


async def _bare_rate(settings: Settings, texts: Sequence[str]) -> float:
    """The same texts through the same adapter: full calls, as many in flight as the worker has."""
    catalogue = load_catalogue(settings)
    provider: EmbeddingProvider = open_provider(settings, catalogue)
    spec = catalogue.find(catalogue.default_model)
    assert spec is not None
    function = EmbeddingFunction(spec, spec.space(spec.dimensions[0]), InputType.DOCUMENT, "", Truncate.ERROR)
    room = asyncio.Semaphore(CALLS_IN_FLIGHT)

    async def call(start: int) -> None:
        async with room:
            await provider.embed(texts[start : start + CALL_TEXTS], function, f"bare-{start}")

    try:
        started = time.monotonic()
        await asyncio.gather(*(call(start) for start in range(0, len(texts), CALL_TEXTS)))
        return len(texts) / (time.monotonic() - started)
    finally:
        await provider.close()


def _resident_mb(child: Child) -> float:
    for line in Path(f"/proc/{child.process.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")
