"""Redis killed, frozen, slow, flushed, full, its values corrupted: the work goes on without, and the bill adds up.

L1 is off, so that every look-up is Redis's business; windows are small, so that there are look-ups enough to go wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import cast

import pytest
from redis.asyncio import Redis

from processor.adapters.embedded import ChildServer
from processor.domain import Request
from tests.support.redis_server import SlowProxy, freeze, own_redis
from tests.support.stack import Child, until
from tests.support.traffic import hard_requests
from tests.support.world import Begin, World

CHUNKS = 5
REQUESTS = 200
WAVES = 4
"""Of requests while Redis is not well."""
SLOW_S = 10.0
TIMEOUT_S = 2.5
"""More than a window takes on a busy machine, or than it pauses; where a bucket of the histogram ends."""
SMALL = {
    "EMBEDDING_L1_BYTES": "0",
    "EMBEDDING_WINDOW_MAX_TEXTS": "16",
    "EMBEDDING_REDIS_TIMEOUT_MS": str(int(TIMEOUT_S * 1000)),
    "EMBEDDING_SESSION_TIMEOUT_S": "30",
}

Tell = Callable[[str], None]


@dataclass
class Server:
    """The Redis under test, at `url` or through the proxy."""

    process: ChildServer
    url: str
    admin: Redis
    proxy: SlowProxy


Fault = Callable[[Server], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def killed(server: Server) -> AsyncIterator[None]:
    """Connections are refused; it comes back empty."""
    await asyncio.to_thread(server.process.kill)
    yield
    await asyncio.to_thread(server.process.start)


@asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    """Connections stand, nobody answers."""
    with freeze(server.process):
        yield


@asynccontextmanager
async def slow(server: Server) -> AsyncIterator[None]:
    """Each answer is later than a look-up may take."""
    server.proxy.delay_s = SLOW_S
    yield
    server.proxy.delay_s = 0.0


@asynccontextmanager
async def full(server: Server) -> AsyncIterator[None]:
    """Nothing is evicted, and every write is refused."""
    await server.admin.config_set("maxmemory-policy", "noeviction")
    await server.admin.config_set("maxmemory", "1")
    yield
    await server.admin.config_set("maxmemory", "0")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    process, url = own_redis()
    with process, SlowProxy(url) as proxy:
        admin = Redis.from_url(url)
        yield Server(process, url, admin, proxy)
        await admin.aclose()


@pytest.mark.faults
@pytest.mark.parametrize("fault", [killed, frozen, slow, full])
async def test_a_redis_that_is_not_well_is_gone_without(fault: Fault, begin: Begin, server: Server, tell: Tell) -> None:
    """Every request made meanwhile ends well and soon, metrics and health say so, then the cache is used again."""
    url = server.proxy.url if fault is slow else server.url
    async with begin("--base-ms", "5", EMBEDDING_REDIS_URL=url, **SMALL) as world:
        worker = await world.a_worker()
        await _used(world, worker)
        before = _figures(worker)
        async with fault(server):
            for wave in range(WAVES):
                await _carried(world, hard_requests(REQUESTS, chunks=CHUNKS, seed=2 + wave))
            during = {name: value - before[name] for name, value in _figures(worker).items()}
            health = (await worker.report("/health/detailed"))["cache"]
            if fault is killed:
                await world.a_worker()  # starts without Redis as well
        await _used(world, worker)
        _, residuals, _ = await world.finish_and_audit()
    tell(f"Redis {fault.__name__}: {during}, health {health}, {residuals.rework} tokens of rework")
    assert during["not_stored"] > 0
    assert health["goes_without"] == {"reads": fault is not full, "writes": True}
    if fault is full:
        assert during["hits"] > 0, "it refuses writes, not reads"
        assert during["unavailable"] == 0
    else:
        assert during["hits"] == 0
        assert during["unavailable"] > 0
        assert health["redis"] != "ok"
    # One look-up at a time tries it, once in a while: the others must not wait for the same time-out.
    assert during["slow_windows"] < during["windows"] / 2
    assert residuals.total == residuals.rework


@pytest.mark.faults
async def test_values_that_are_broken_or_anothers_are_never_delivered(begin: Begin, server: Server, tell: Tell) -> None:
    """Random bytes, cut off, empty, another key's: each is counted and made anew, and no vector is wrong."""
    requests = hard_requests(REQUESTS, chunks=CHUNKS)
    async with begin("--base-ms", "5", EMBEDDING_REDIS_URL=server.url, **SMALL) as world:
        worker = await world.a_worker()
        await _carried(world, requests)
        broken = await _corrupt(server.admin)
        before = _figures(worker)
        await _carried(world, requests)
        met = _figures(worker)
        await _carried(world, requests)
        after = _figures(worker)
        _, residuals, _ = await world.finish_and_audit()
    newly_met = met["corrupt"] - before["corrupt"]
    tell(f"Redis corrupted: {broken} values, {newly_met:.0f} met, {residuals.rework} tokens of rework")
    assert broken > REQUESTS
    assert newly_met >= broken, "a broken value passed for a good one"
    # Texts that come twice may find what was made anew for the first one, but only those.
    assert met["misses"] - before["misses"] >= broken, "there was none left that is good"
    assert after["corrupt"] == met["corrupt"], "what was broken was not replaced"
    assert after["hits"] > met["hits"]
    assert residuals.total == residuals.rework


@pytest.mark.faults
async def test_a_flushed_redis_costs_money_and_nothing_else(begin: Begin, server: Server, tell: Tell) -> None:
    """What is sent again after a flush is embedded again, but charged once, and the cache is used again."""
    requests = hard_requests(REQUESTS, chunks=CHUNKS)
    async with begin("--base-ms", "5", EMBEDDING_REDIS_URL=server.url, **SMALL) as world:
        worker = await world.a_worker()
        for _ in range(WAVES):
            await world.traffic.send(requests[: REQUESTS // 2])
            await server.admin.flushall()
            await _carried(world, requests[REQUESTS // 2 :])
            await server.admin.flushall()
        await _used(world, worker)
        _, residuals, copies = await world.finish_and_audit()
    tell(f"Redis flushed: {copies} copies, {residuals.rework} tokens of rework")
    assert residuals.rework > 0, "nothing that was flushed was asked for again"
    assert residuals.total == residuals.rework


async def _carried(world: World, requests: list[Request]) -> None:
    await world.traffic.send(requests)
    await until(world.traffic.all_committed, within_s=60, what="every request is committed")


async def _used(world: World, worker: Child) -> None:
    """Ask for texts, some of them known, until some are found, and nothing is gone without any more."""
    before, seeds = _hits(worker), itertools.count(100)

    async def found() -> bool:
        await _carried(world, hard_requests(REQUESTS // 4, chunks=CHUNKS, seed=next(seeds)))
        health = await worker.report("/health/detailed")
        return _hits(worker) > before and not any(health["cache"]["goes_without"].values())

    await until(found, within_s=60, what="the cache is used", every_s=0.3)


async def _corrupt(redis: Redis) -> int:
    """Break every value in one of five ways; how many there were."""
    dice = random.Random(8)
    keys = [key async for key in redis.scan_iter(_type="string")]
    kept = dict(zip(keys, cast("list[bytes]", await redis.mget(keys)), strict=True))
    neighbours = [*kept.values()][1:] + [*kept.values()][:1]
    for way, (key, value), neighbour in zip((n % 5 for n in range(len(kept))), kept.items(), neighbours, strict=True):
        place = dice.randrange(len(value))
        flipped = value[:place] + bytes([value[place] ^ (1 << dice.randrange(8))]) + value[place + 1 :]
        await redis.set(key, [flipped, dice.randbytes(len(value)), value[:place], b"", neighbour][way])
    return len(kept)


def _figures(worker: Child) -> dict[str, float]:
    """What the worker has counted so far; a window is slow when it took as long as a look-up may."""
    windows = worker.metric("embedding_window_seconds_count") or 0
    quick = worker.metric(f'embedding_window_seconds_bucket{{le="{TIMEOUT_S}"}}') or 0
    faults = {
        kind: worker.metric(f'embedding_cache_faults_total{{kind="{kind}"}}') or 0
        for kind in ("unavailable", "not_stored", "corrupt")
    }
    misses = worker.metric('embedding_cache_lookups_total{level="l2",result="miss"}') or 0
    return faults | {"hits": _hits(worker), "misses": misses, "windows": windows, "slow_windows": windows - quick}


def _hits(worker: Child) -> float:
    return worker.metric('embedding_cache_lookups_total{level="l2",result="hit"}') or 0
