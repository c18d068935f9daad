"""Workers killed and joined while work flows: every chunk has its outcome, and the bill adds up per attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import redis.asyncio

from tests.support.stack import until
from tests.support.traffic import hard_requests
from tests.support.world import PATIENT, Begin

KILLS = 10
CHUNKS = 5

Tell = Callable[[str], None]


async def test_ten_kills_lose_nothing_and_the_bill_adds_up(begin: Begin, tell: Tell) -> None:
    """Laws 1 to 6 and section 5 per attempt, through ten SIGKILLs, a join mid-run and a flushed cache."""
    requests = hard_requests(1000, chunks=CHUNKS)
    per_wave = len(requests) // (KILLS + 1) + 1
    waves = [requests[i : i + per_wave] for i in range(0, len(requests), per_wave)]
    started = time.monotonic()
    async with begin("--base-ms", "60", "--per-text-ms", "2") as world:
        stack, traffic = world.stack, world.traffic
        workers = [await world.a_worker()]
        await traffic.send(waves[0])
        workers.append(await world.a_worker())
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
        books, residuals, copies = await world.finish_and_audit()
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
    async with begin("--base-ms", "20", "--per-text-ms", "0.2", **PATIENT) as world:
        await world.a_worker()
        await world.traffic.send(hard_requests(1000, chunks=CHUNKS, seed=2))
        books, residuals, _ = await world.finish_and_audit()
    tell(f"residuals without a kill: {asdict(residuals)}")
    assert residuals.total == 0
    assert residuals.recovered_attempts == 0
    first: dict[str, tuple[int, object]] = {}
    for _, usage in books.usage:
        parts = (usage.billed.tokens, tuple(usage.parts))
        assert first.setdefault(usage.request_id, parts) == parts


async def _flush(url: str) -> None:
    client = redis.asyncio.from_url(url)
    try:
        await client.flushall()
    finally:
        await client.aclose()
