"""The cache at d=1536: a look-up in Redis beside a bare MGET, a look-up in memory, what each policy finds, and sizes.

`ratio` is the time of a bare redis-py pipeline with one MGET of a window's 256 keys, divided by that of our look-up
of the window's texts: keys derived, L1 missed, values checked and decoded. Median of rounds that take turns, on one
server of our own. The Zipf(1.0) trace has 1,000,000 look-ups of 100,000 keys, for a cache of 1,000; its optimum is
Belady's MIN, which knows the future and may pass an entry by. Left out: a network between us and Redis.
"""

from __future__ import annotations

import gc
import heapq
import random
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from redis.asyncio import Redis

from processor.adapters.eviction import Eviction, Lru, S3Fifo
from processor.adapters.memory_cache import ENTRY_OVERHEAD_BYTES, MemoryCache
from processor.adapters.redis_cache import KEY_PREFIX, RedisCache
from processor.adapters.redis_client import RedisAccess
from processor.adapters.tiered_cache import TieredCache
from processor.cache import CacheKeys
from processor.domain import Entry, Item, TokenSource
from tests.support.folds import a_function
from tests.support.redis_server import own_redis

DIMENSIONS = 1536
VECTOR_BYTES = 4 * DIMENSIONS
WINDOW = 256
WINDOWS = 16
ROUNDS = 40
BATCH = 500
TRACE, TRACE_KEYS, TRACE_SHARE = 1_000_000, 100_000, 0.01
RATIO, L1_LOOKUP_US = 0.3, 2.0
L1_BYTES = 64 * 1024 * 1024
FUNCTION = a_function(dimensions=(DIMENSIONS,))

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Ratios, microseconds, hit rates and bytes."""
    figures: dict[str, Any] = {}
    server, url = own_redis()
    with server:
        figures |= await against_bare(url, say)
    figures |= await in_memory(say)
    trace = zipf_trace()
    for name, eviction in (("lru", Lru()), ("lfu", S3Fifo())):
        figures[f"zipf_hit_rate_{name}"] = round(await hit_rate(trace, eviction), 4)
    figures["zipf_optimum"] = round(optimum(trace, int(TRACE_KEYS * TRACE_SHARE)), 4)
    say(" ".join(f"{name}={value}" for name, value in figures.items() if name.startswith("zipf")))
    bars = {"ratio": figures["ratio"] >= RATIO, "l1_lookup_us": figures["l1_lookup_us"] <= L1_LOOKUP_US}
    return figures | {"bars": bars}


async def against_bare(url: str, say: Say) -> dict[str, Any]:
    """Pairs of a bare pipeline and our look-up, each window in turn."""
    keys = CacheKeys(b"a secret")
    texts = [[f"{window}-{number} {'hello world ' * 50}" for number in range(WINDOW)] for window in range(WINDOWS)]
    cache, bare = RedisCache(RedisAccess(url), timeout_s=60, ttl_s=86_400), Redis.from_url(url, protocol=2)
    tiered = TieredCache(MemoryCache(max_bytes=0, ttl_s=3600), cache)

    def derive(some: Sequence[str]) -> list[bytes]:
        return [keys.present("acme", FUNCTION, text, None) for text in some]

    async def ours(some: Sequence[str]) -> None:
        found = await tiered.get_many(derive(some), DIMENSIONS)
        assert len(found) == WINDOW

    async def mget(names: Sequence[bytes]) -> None:
        pipeline: Any = bare.pipeline(transaction=False)
        (values,) = await pipeline.mget(names).execute()
        assert None not in values

    try:
        names = [[KEY_PREFIX + key for key in derive(some)] for some in texts]
        for number, some in enumerate(texts):
            await cache.put_many({key: an_entry(number) for key in derive(some)})
        pairs: list[tuple[float, float]] = []
        gc.collect()
        gc.freeze()
        for number in range(ROUNDS):
            window = number % WINDOWS
            first, second = (ours, texts[window]), (mget, names[window])
            if number % 2:
                took_ours, took_bare = await timed(*first), await timed(*second)
            else:
                took_bare, took_ours = await timed(*second), await timed(*first)
            pairs.append((took_bare, took_ours))
        stats = await cache.stats()
    finally:
        await cache.close()
        await bare.aclose()
    bare_ms, ours_ms = (statistics.median(each) * 1000 for each in zip(*pairs, strict=True))
    ratio = statistics.median(bare / ours for bare, ours in pairs)
    say(f"{stats.server}: {WINDOW} vectors in {ours_ms:.2f} ms, bare {bare_ms:.2f} ms, ratio {ratio:.2f} (bar {RATIO})")
    return {
        "ratio": round(ratio, 3),
        "l2_lookup_ms": round(ours_ms, 2),
        "l2_bare_ms": round(bare_ms, 2),
        "l2_bytes_per_vector": stats.entry_bytes,
        "server": stats.server,
    }


async def timed(work: Callable[[Any], Awaitable[None]], of: Any) -> float:
    began = time.perf_counter()
    await work(of)
    return time.perf_counter() - began


async def in_memory(say: Say) -> dict[str, Any]:
    """A full L1 of the default size: what a hit takes, and what it takes up."""
    figures: dict[str, Any] = {}
    for name, make in (("lru", Lru), ("lfu", S3Fifo)):
        tracemalloc.start()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        cache = MemoryCache(max_bytes=L1_BYTES, ttl_s=3600, ttl_jitter=0.1, eviction=make())
        keys: list[bytes] = []
        for number in range(2 * L1_BYTES // VECTOR_BYTES):  # twice what it holds: so the policies' own tables are full
            keys.append(random.randbytes(32))
            await cache.put_many({keys[-1]: an_entry(number)})
            for key in keys[-2:]:
                cache.peek(key, DIMENSIONS)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before - sum(map(len, keys)) - 41 * len(keys)
        tracemalloc.stop()
        kept = [key for key in keys if cache.peek(key, DIMENSIONS) is not None]
        random.shuffle(kept)
        us = statistics.median(peeks_us(cache, kept[at : at + BATCH]) for at in range(0, len(kept) - BATCH, BATCH))
        figures |= {f"l1_lookup_us_{name}": round(us, 2), f"l1_bytes_per_vector_{name}": round(taken / len(kept))}
        say(f"L1 {name}: {us:.2f} us a hit of {len(kept)} (bar 2), {taken / len(kept):.0f} bytes an entry")
    figures["l1_lookup_us"] = max(figures["l1_lookup_us_lru"], figures["l1_lookup_us_lfu"])
    figures["bytes_per_vector"] = max(figures["l1_bytes_per_vector_lru"], figures["l1_bytes_per_vector_lfu"])
    figures["l1_bytes_counted"] = VECTOR_BYTES + ENTRY_OVERHEAD_BYTES
    return figures


def peeks_us(cache: MemoryCache, keys: Sequence[bytes]) -> float:
    """CPU time of a hit; a key is never the very object that is kept."""
    asked = [bytes(bytearray(key)) for key in keys]
    peek = cache.peek
    began = time.thread_time_ns()
    for key in asked:
        peek(key, DIMENSIONS)
    return (time.thread_time_ns() - began) / len(asked) / 1000


def zipf_trace() -> list[int]:
    weights = 1 / np.arange(1, TRACE_KEYS + 1)
    drawn = np.random.default_rng(1).choice(TRACE_KEYS, size=TRACE, p=weights / weights.sum())
    trace: list[int] = drawn.tolist()
    return trace


async def hit_rate(trace: Sequence[int], eviction: Eviction) -> float:
    """Of an L1 that is put what it does not find."""
    entry = an_entry(0, dimensions=1)
    cache = MemoryCache(
        max_bytes=int(TRACE_KEYS * TRACE_SHARE) * (4 + ENTRY_OVERHEAD_BYTES), ttl_s=3600, eviction=eviction
    )
    hits = 0
    for number in trace:
        key = number.to_bytes(32, "big")
        if cache.peek(key, 1) is None:
            await cache.put_many({key: entry})
        else:
            hits += 1
    assert len(cache) == TRACE_KEYS * TRACE_SHARE
    return hits / len(trace)


def optimum(trace: Sequence[int], entries: int) -> float:
    """Belady's MIN: of those kept and the new one, the one that is wanted last goes."""
    never = len(trace)
    next_at = [never] * len(trace)
    last: dict[int, int] = {}
    for at in range(len(trace) - 1, -1, -1):
        next_at[at] = last.get(trace[at], never)
        last[trace[at]] = at
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hits = 0
    for at, key in enumerate(trace):
        hits += key in kept
        kept[key] = next_at[at]
        heapq.heappush(furthest, (-next_at[at], key))
        while len(kept) > entries:
            wanted_at, candidate = heapq.heappop(furthest)
            if kept.get(candidate) == -wanted_at:
                del kept[candidate]
    return hits / len(trace)


def an_entry(number: int, dimensions: int = DIMENSIONS) -> Entry:
    vector = np.random.default_rng(number).standard_normal(dimensions, dtype=np.float32)
    leader = Item(f"00000000-0000-5000-8000-{number:012}", 300 + number)
    return Entry(vector, 300 + number, leader, f"01900000-0000-7000-8000-{number:012}", TokenSource.PROVIDER)
