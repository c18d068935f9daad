"""Workers killed and joined while work flows: every chunk has its outcome, and the bill adds up per attempt."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import redis.asyncio

from processor.adapters import topics
from processor.adapters.embedded import EmbeddedCache
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic, check_samples, hard_requests

DIMENSIONS = 1536
PARTITIONS = 4
KILLS = 10
CHUNKS = 5

Tell = Callable[[str], None]


class World(NamedTuple):
    """Provider, cache and topics of one test, with an aggregator running."""

    provider: ProviderProcess
    cache_url: str
    stack: Stack
    traffic: Traffic


Begin = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def begin(kafka: Broker, unique: str, tmp_path: Path) -> Begin:
    """`begin("--base-ms", "60", EMBEDDING_RETRY_MAX_S="1")`: options of the provider, environment of the processes."""

    @asynccontextmanager
    async def world(*options: str, **environment: str) -> AsyncIterator[World]:
        with EmbeddedCache() as cache, ProviderProcess("--jitter", "0.01", *options) as provider:
            environment = {
                "EMBEDDING_PROVIDER": "openai",
                "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
                "EMBEDDING_OPENAI_API_KEY": "tests",
                "EMBEDDING_REDIS_URL": cache.url,
                "EMBEDDING_WINDOW_MAX_TEXTS": "64",
                "EMBEDDING_DEFAULT_MODEL": "text-embedding-3-small",
            } | environment
            with Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
                settings = stack.settings()
                await topics.create(settings, partitions=PARTITIONS, replication=1)
                stack.spawn("aggregator")
                async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
                    yield World(provider, cache.url, stack, traffic)

    return world


async def _a_worker(stack: Stack) -> Child:
    worker = stack.spawn("worker")
    await until(worker.ready, within_s=60, what=f"{worker.name} is ready")
    return worker


async def _finish_and_audit(world: World) -> tuple[audit.Books, audit.Residuals, int]:
    """Wait until all is committed and totalled, stop everybody cleanly, hold the books against the laws."""
    provider, _, stack, traffic = world
    settings = stack.settings()
    await until(traffic.all_committed, within_s=120, what="every request is committed")
    await traffic.sample()

    async def totalled() -> bool:
        return audit.totals_cover(await audit.read_books(settings, []))

    await until(totalled, within_s=60, what="the totals count every charge", every_s=1.0)
    for child in stack.children:
        if child.process.poll() is None:
            assert child.stop() == 0, child.tail()
    books = await audit.read_books(settings, provider.admin("ledger")["requests"])
    copies = audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS)
    audit.check_charges(books)
    residuals = audit.check_attempts(books)
    audit.check_totals(books)
    check_samples(traffic.samples, books)
    return books, residuals, copies


async def test_ten_kills_lose_nothing_and_the_bill_adds_up(begin: Begin, tell: Tell) -> None:
    """Laws 1 to 6 and section 5 per attempt, through ten SIGKILLs, a join mid-run and a flushed cache."""
    requests = hard_requests(1000, chunks=CHUNKS)
    per_wave = len(requests) // (KILLS + 1) + 1
    waves = [requests[i : i + per_wave] for i in range(0, len(requests), per_wave)]
    started = time.monotonic()
    async with begin("--base-ms", "60", "--per-text-ms", "2") as world:
        stack, traffic = world.stack, world.traffic
        workers = [await _a_worker(stack)]
        await traffic.send(waves[0])
        workers.append(await _a_worker(stack))
        for kill, wave in enumerate(waves[1 : KILLS + 1]):
            before = await traffic.results()
            await traffic.send(wave)

            async def moved(before: int = before) -> bool:
                await traffic.sample()
                return await traffic.results() >= before + 40

            await until(moved, within_s=90, what=f"results flow before kill {kill}")
            workers[kill % 2].kill()
            if kill == KILLS // 2:
                await _flush(world.cache_url)
            workers[kill % 2] = stack.spawn("worker")
        books, residuals, copies = await _finish_and_audit(world)
    report = asdict(residuals) | {
        "requests": len(books.requests),
        "chunks": sum(len(request.chunks) for request in books.accepted().values()),
        "result_copies": copies,
        "attempts": len(books.bills),
        "seconds": round(time.monotonic() - started),
    }
    tell(f"residuals after ten kills: {report}")


async def test_without_kills_nothing_is_billed_to_nobody(begin: Begin, tell: Tell) -> None:
    """U7: one worker, the cache kept, no zombies: residual 0 for every receipt, and copies are byte-equal."""
    async with begin("--base-ms", "20", "--per-text-ms", "0.2") as world:
        await _a_worker(world.stack)
        await world.traffic.send(hard_requests(1000, chunks=CHUNKS, seed=2))
        books, residuals, _ = await _finish_and_audit(world)
    tell(f"residuals without a kill: {asdict(residuals)}")
    assert residuals.total == 0
    assert residuals.recovered_attempts == 0
    first: dict[str, tuple[int, object]] = {}
    for _, usage in books.usage:
        parts = (usage.billed.tokens, tuple(usage.parts))
        assert first.setdefault(usage.request_id, parts) == parts


async def test_a_failing_provider_costs_retries_and_no_chunk(begin: Begin, tell: Tell) -> None:
    """A fifth of the calls fails in every way a provider can: each chunk gets its own vector, section 5 holds."""
    faults = ["500", "429", "503", "reset", "reset_billed", "hang_billed", "truncated_body", "broken_json", "200_error"]
    faults += ["wrong_count", "nan", "zero_vector", "wrong_dimension", "wrong_model", "duplicate_index", "shuffled"]
    quick = {"EMBEDDING_RETRY_INITIAL_S": "0.05", "EMBEDDING_RETRY_MAX_S": "0.5", "EMBEDDING_PROVIDER_TIMEOUT_S": "2"}
    async with begin("--base-ms", "5", "--per-text-ms", "0.1", EMBEDDING_WINDOW_MAX_TEXTS="16", **quick) as world:
        probabilities = dict.fromkeys(faults, 0.0135)
        world.provider.admin("faults", {"probabilities": probabilities, "retry_after": "0.1", "seed": 7})
        await _a_worker(world.stack)
        await world.traffic.send(hard_requests(1000, chunks=CHUNKS, seed=3))
        books, residuals, _ = await _finish_and_audit(world)
    met = {bill["fault"] for bill in books.bills if bill["fault"]}
    tell(f"residuals of a failing provider: {asdict(residuals)}; faults met: {len(met)}")
    assert len(met) >= len(faults) // 2, "the provider did not fail enough to prove anything"
    assert residuals.rework == residuals.unclaimed == 0


async def _flush(url: str) -> None:
    client = redis.asyncio.from_url(url)
    try:
        await client.flushall()
    finally:
        await client.aclose()
