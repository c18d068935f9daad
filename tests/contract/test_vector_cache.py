"""What every VectorCache promises: L1 with each policy, Redis and a Cluster of it, and both in a row."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from processor.adapters.cache_entry import decode, encode
from processor.adapters.embedded import EmbeddedCache
from processor.adapters.eviction import Lru, S3Fifo
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.redis_cache import KEYS_A_TURN, RedisCache
from processor.adapters.redis_client import RedisAccess
from processor.adapters.redis_quota import RedisQuota
from processor.adapters.tiered_cache import PAUSE_S, TieredCache
from processor.domain import CacheLevel, Entry, Item, TokenSource
from processor.errors import CacheUnavailable, QuotaUnavailable, SettingsError
from processor.ports import Events, QuotaAsk, VectorCache
from tests.support.redis_variants import Cluster, own_cluster
from tests.support.timers import ENDS_WITHIN_S, settled, skip

TTL_S = 600
BUDGET_S = 60.0
"""Of a trip to Redis."""
D = 8


class Seconds:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counted:
    """Events that add up."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}
        self.events = Events(self._count)

    def _count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        key = (name, *labels.values())
        self.sums[key] = self.sums.get(key, 0) + value


@dataclass
class Case:
    cache: VectorCache
    level: CacheLevel
    expire: Callable[[], Awaitable[Any]]
    """Lets TTL_S pass for all that was put so far."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes, for this file."""
    with own_cluster() as nodes:
        yield nodes


@pytest.fixture(params=["lru", "lfu", "redis", "cluster", "tiered"])
async def case(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[Case]:
    seconds = Seconds()
    eviction = Lru() if request.param == "lru" else S3Fifo()
    memory = MemoryCache(max_bytes=1_000_000, ttl_s=TTL_S, eviction=eviction, monotonic=seconds)

    async def expire_memory() -> None:
        seconds.now += TTL_S

    if request.param in {"lru", "lfu"}:
        yield Case(memory, CacheLevel.L1, expire_memory)
        return

    if request.param == "cluster":
        access = RedisAccess(request.getfixturevalue("cluster").url, cluster=True)
    else:
        access = RedisAccess(request.getfixturevalue("redis_url"))
    redis = RedisCache(access, timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    client: Any = access.open(timeout_s=BUDGET_S, retries=1)

    async def expire_both() -> None:
        await expire_memory()
        for key in [key async for key in client.scan_iter(match=f"{unique}*")]:
            assert 0 < await client.ttl(key) <= TTL_S
            await client.expire(key, 0)

    if request.param == "tiered":
        yield Case(TieredCache(memory, redis, monotonic=seconds), CacheLevel.L1, expire_both)
    else:
        yield Case(redis, CacheLevel.L2, expire_both)
    await redis.close()
    await client.aclose()


def an_entry(seed: int = 1, dimensions: int = D, **overrides: Any) -> Entry:
    fields: dict[str, Any] = {
        "vector": np.random.default_rng(seed).standard_normal(dimensions, dtype=np.float32),
        "tokens": seed,
        "leader": Item(f"request-{seed}", seed),
        "attempt_id": f"attempt-{seed}",
        "token_source": TokenSource.PROVIDER,
        "cut_tokens": 0,
    }
    return Entry(**(fields | overrides))


def same(one: Entry, other: Entry) -> bool:
    return (
        one.vector.dtype == other.vector.dtype
        and np.array_equal(one.vector, other.vector, equal_nan=True)
        and (one.tokens, one.leader, one.attempt_id, one.token_source, one.cut_tokens)
        == (other.tokens, other.leader, other.attempt_id, other.token_source, other.cut_tokens)
    )


@pytest.mark.parametrize("source", TokenSource)
@pytest.mark.parametrize("cut_tokens", [0, 7_000])
async def test_what_was_put_is_found_to_the_bit(case: Case, source: TokenSource, cut_tokens: int) -> None:
    """Vector, share, leader and attempt come back as they were, with the level that had them."""
    entries = {
        b"a" * 20: an_entry(1, token_source=source, cut_tokens=cut_tokens),
        b"b" * 20: an_entry(0, leader=Item("naïve", 2**31), vector=np.array([np.nan, -0.0] * 4, np.float32)),
    }
    await case.cache.put_many(entries)
    found = await case.cache.get_many([b"b" * 20, b"unknown", b"a" * 20], D)
    assert set(found) == set(entries)
    assert all(same(found[key].entry, entry) for key, entry in entries.items())
    assert {hit.level for hit in found.values()} == {case.level}


async def test_the_first_entry_stands_until_it_expires(case: Case) -> None:
    """Storing again never changes who paid, and neither extends the life of what is there."""
    await case.cache.put_many({b"k": an_entry(1)})
    await case.cache.put_many({b"k": an_entry(2)})
    assert same((await case.cache.get_many([b"k"], D))[b"k"].entry, an_entry(1))

    await case.expire()
    assert await case.cache.get_many([b"k"], D) == {}
    await case.cache.put_many({b"k": an_entry(2)})
    assert same((await case.cache.get_many([b"k"], D))[b"k"].entry, an_entry(2))


async def test_nothing_in_is_nothing_out(case: Case) -> None:
    """Empty input is fine."""
    await case.cache.put_many({})
    assert await case.cache.get_many([], D) == {}


async def test_a_key_twice_is_a_key_once(case: Case) -> None:
    """Duplicates in a look-up do no harm."""
    await case.cache.put_many({b"k": an_entry()})
    assert set(await case.cache.get_many([b"k", b"x", b"k", b"x"], D)) == {b"k"}


async def test_other_dimensions_are_not_served(case: Case) -> None:
    """An entry of another size is as good as none."""
    await case.cache.put_many({b"k": an_entry(dimensions=D)})
    assert await case.cache.get_many([b"k"], D + 1) == {}


async def test_what_lies_under_a_former_key_is_kept_under_the_present_one(case: Case) -> None:
    """It is found with its payer, and from then on without the former key; one that was stored since stands."""
    l2 = case.cache if case.level is CacheLevel.L2 else None
    await case.cache.put_many({b"old-a": an_entry(1), b"old-b": an_entry(2), b"new-b": an_entry(3)})
    asked = {b"new-a": b"old-a", b"new-b": b"old-b", b"new-c": b"old-c"}
    found = await case.cache.get_many(list(asked), D, asked)
    if l2 is None and not isinstance(case.cache, TieredCache):
        assert set(found) == {b"new-b"}  # a process has one secret all its life
        return
    assert {key: hit.entry.tokens for key, hit in found.items()} == {b"new-a": 1, b"new-b": 3}
    assert same((await case.cache.get_many([b"new-a"], D))[b"new-a"].entry, an_entry(1))


async def test_a_vector_in_the_cache_is_nobodys_to_change(case: Case) -> None:
    """Neither the payer's array nor a reader's can alter what the next one finds."""
    entry = an_entry()
    await case.cache.put_many({b"k": entry})
    entry.vector[:] = 0
    found = (await case.cache.get_many([b"k"], D))[b"k"].entry
    with pytest.raises(ValueError, match="read-only"):
        found.vector[:] = 0
    assert same((await case.cache.get_many([b"k"], D))[b"k"].entry, an_entry())


async def test_the_vectors_of_a_full_call_are_kept_and_found(case: Case) -> None:
    """However many go at once, all of them."""
    entries = {b"%d" % i: an_entry(i) for i in range(2 * KEYS_A_TURN + 1)}
    await case.cache.put_many(entries)
    found = await case.cache.get_many(list(entries), D)
    assert all(same(found[key].entry, entry) for key, entry in entries.items())


# --- Redis alone


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: b"",
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: bytes([value[0] + 1]) + value[1:],
        lambda value: value[:40] + bytes([value[40] ^ 1]) + value[41:],
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value: os.urandom(len(value)),
    ],
)
async def test_a_spoilt_value_is_counted_deleted_and_a_miss(
    spoil: Callable[[bytes], bytes], redis_url: str, unique: str
) -> None:
    """No bit of a vector or of its payer can flip unseen; the next payer may store again."""
    counted = Counted()
    cache = RedisCache(
        RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode(), events=counted.events
    )
    client = Redis.from_url(redis_url)
    await cache.put_many({b"k": an_entry(), b"ok": an_entry(2)})
    name = unique.encode() + b"k"
    value = await client.get(name)
    assert isinstance(value, bytes)
    await client.set(name, spoil(value))

    assert set(await cache.get_many([b"k", b"ok"], D)) == {b"ok"}
    assert counted.sums == {("cache_faults", "corrupt"): 1}
    assert await client.get(name) is None
    await cache.close()
    await client.aclose()


async def test_a_good_value_stored_meanwhile_is_not_deleted(redis_url: str, unique: str) -> None:
    """A spoilt value goes only while it is still there: another worker may have embedded the text since."""
    name = unique.encode() + b"k"
    with SyncRedis.from_url(redis_url) as client:
        events = Events(lambda *_: client.set(name, encode(b"k", an_entry(2))) and None)
        cache = RedisCache(
            RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode(), events=events
        )
        client.set(name, b"spoilt")
        assert await cache.get_many([b"k"], D) == {}
        assert same((await cache.get_many([b"k"], D))[b"k"].entry, an_entry(2))
        await cache.close()


async def test_a_new_secret_gives_no_entry_a_longer_life(redis_url: str, unique: str) -> None:
    """Under its present key it expires when it would have under the former one."""
    cache = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=1000, prefix=unique.encode())
    await cache.put_many({b"old": an_entry()})
    with SyncRedis.from_url(redis_url) as client:
        client.expire(unique.encode() + b"old", 500)
        await cache.get_many([b"new"], D, {b"new": b"old"})
        left_s = client.ttl(unique.encode() + b"new")
    await cache.close()
    assert isinstance(left_s, int)
    assert 400 < left_s <= 500


async def test_who_only_looks_changes_nothing(redis_url: str, unique: str) -> None:
    """A quote neither deletes what is spoilt nor keeps under the new secret what it found under the former one."""
    options: dict[str, Any] = {"timeout_s": BUDGET_S, "ttl_s": TTL_S, "prefix": unique.encode()}
    cache, quote = (RedisCache(RedisAccess(redis_url), read_only=each, **options) for each in (False, True))
    await cache.put_many({b"old": an_entry()})
    with SyncRedis.from_url(redis_url) as client:
        client.set(unique.encode() + b"spoilt", b"spoilt")
        assert set(await quote.get_many([b"new", b"spoilt"], D, {b"new": b"old"})) == {b"new"}
        left = {name.decode().removeprefix(unique) for name in client.scan_iter(f"{unique}*")}
    assert left == {"old", "spoilt"}
    await cache.close()
    await quote.close()


async def test_what_was_stored_under_the_new_secret_meanwhile_stands(redis_url: str, unique: str) -> None:
    """The first entry of a key stands, also when an older one is found under the former secret."""
    new = unique.encode() + b"new"
    with SyncRedis.from_url(redis_url) as client:
        events = Events(lambda *_: client.set(new, encode(b"new", an_entry(2))) and None)  # between read and store
        cache = RedisCache(
            RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode(), events=events
        )
        await cache.put_many({b"old": an_entry(1)})
        client.set(unique.encode() + b"spoilt", b"spoilt")
        await cache.get_many([b"new", b"spoilt"], D, {b"new": b"old"})
        assert same((await cache.get_many([b"new"], D))[b"new"].entry, an_entry(2))
        await cache.close()


async def test_what_a_look_up_does_beside_reading_has_no_budget_of_its_own(
    unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is not held up for the sake of a spoilt value, and not lost for it."""
    with EmbeddedCache() as server, SyncRedis.from_url(server.url) as client:
        cache = RedisCache(RedisAccess(server.url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
        await cache.put_many({b"k": an_entry()})
        client.set(unique.encode() + b"spoilt", b"spoilt")
        read, values = asyncio.Event(), cache._values

        async def read_late(keys: Sequence[bytes]) -> list[bytes | None]:
            answer = await values(keys)
            skip(0.7 * BUDGET_S)
            os.kill(server.pid, signal.SIGSTOP)
            read.set()
            return answer

        monkeypatch.setattr(cache, "_values", read_late)
        looked_up = asyncio.create_task(cache.get_many([b"k", b"spoilt"], D))
        await asyncio.wait_for(read.wait(), ENDS_WITHIN_S)
        await settled()
        assert not looked_up.done(), "the spoilt value is being deleted"
        skip(0.3 * BUDGET_S)
        assert set(await asyncio.wait_for(looked_up, ENDS_WITHIN_S)) == {b"k"}
        os.kill(server.pid, signal.SIGCONT)
        await cache.close()


async def test_what_is_stored_together_does_not_expire_together(redis_url: str, unique: str) -> None:
    """Lives in Redis are spread over the jitter, and none is longer than the TTL."""
    access = RedisAccess(redis_url)
    cache = RedisCache(
        access, timeout_s=BUDGET_S, ttl_s=1000, ttl_jitter=0.5, prefix=unique.encode(), chance=random.Random(1).random
    )
    await cache.put_many({b"%d" % i: an_entry(i) for i in range(200)})
    least, median, greatest = (await cache.stats()).ttl_s or (0, 0, 0)
    await cache.close()
    assert 400 <= least < 600 < median < 900 < greatest <= 1000


async def test_a_look_up_is_one_round_trip(unique: str) -> None:
    """However many keys, and with those of the former secret among them."""
    with EmbeddedCache() as server:
        cache = RedisCache(RedisAccess(server.url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
        client = Redis.from_url(server.url)
        keys = [b"%d" % i for i in range(2 * KEYS_A_TURN + 1)]
        await cache.put_many(dict.fromkeys(keys, an_entry()))
        await cache.get_many(keys, D, {key: b"former" + key for key in keys})
        stats = await client.info("commandstats")
        await cache.close()
        await client.aclose()
    assert (stats["cmdstat_mget"]["calls"], "cmdstat_get" in stats) == (1, False)


async def test_a_value_under_another_key_is_a_miss(redis_url: str, unique: str) -> None:
    """A vector moved to another text's key, by whatever mishap, is not served."""
    cache = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    client = Redis.from_url(redis_url)
    await cache.put_many({b"mine": an_entry()})
    await client.rename(unique.encode() + b"mine", unique.encode() + b"yours")
    assert await cache.get_many([b"yours"], D) == {}
    await cache.close()
    await client.aclose()


async def test_a_refusal_of_redis_is_unavailable_and_names_no_secret() -> None:
    """Nobody listening, a wrong password: the class of the fault and nothing else."""
    with EmbeddedCache() as server:
        address = server.url.removeprefix("redis://")
        cache = RedisCache(RedisAccess(f"redis://user:canary-9f@{address}"), timeout_s=BUDGET_S, ttl_s=TTL_S)
        with pytest.raises(CacheUnavailable) as refused:
            await cache.get_many([b"k"], D)
        assert "EMBEDDING_REDIS_PASSWORD" in await cache.ping()
    with pytest.raises(CacheUnavailable) as gone:
        await cache.put_many({b"k": an_entry()})
    await cache.close()
    assert "canary-9f" not in f"{refused.value!r} {gone.value!r}"


NONSENSE = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b":1\r\n",
    b"+OK\r\n",
    b"$abc\r\n",
    b"$-5\r\n",
    b"*-1\r\n",
    b"*1\r\n:5\r\n",
    b"*1\r\n$3\r\nabc\r\n",
    b"*2\r\n$1\r\n\xff\r\n:5\r\n",
    b"*2\r\n*0\r\n*0\r\n",
    b"*3\r\n$-1\r\n$-1\r\n$-1\r\n",
    b"-MOVED\r\n",
    b"-ASK 1\r\n",
    b"*1\r\n" * 2000 + b":1\r\n",
]


@pytest.mark.parametrize("in_cluster", [False, True])
async def test_whatever_answers_it_is_at_most_unavailable(in_cluster: bool) -> None:
    """What is no Redis, or lies, ends no worker: neither its look-ups nor its leases."""
    answer = b""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100_000):
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for answer in NONSENSE:
            access = RedisAccess(f"redis://127.0.0.1:{port}/0", cluster=in_cluster)
            cache, quota = RedisCache(access, timeout_s=0.2, ttl_s=TTL_S), RedisQuota(access, timeout_s=0.2, pace=1.0)
            ask = QuotaAsk(1, None, None)
            trips = [
                cache.get_many([b"a", b"b"], D),
                cache.put_many({b"a": an_entry()}),
                cache.purged(),
                cache.ping(),
                quota.lease("a", ask, ask, 0.0),
            ]
            for ended in await asyncio.gather(*trips, return_exceptions=True):
                assert isinstance(ended, dict | str | CacheUnavailable | QuotaUnavailable | None), (answer, ended)
            await cache.close()
            await quota.close()


@pytest.mark.parametrize("place, byte", [(1, 7), (-1, 0xFF)])
def test_a_value_that_somebody_else_has_summed_up_is_a_miss(place: int, byte: int) -> None:
    """A token source or an id that none can be, under a right checksum, is no entry and ends no worker."""
    value = bytearray(encode(b"k", an_entry()))
    value[place] = byte
    struct.pack_into("<I", value, 4, zlib.crc32(value[8:], zlib.crc32(value[:4], zlib.crc32(b"k"))))
    assert decode(b"k", bytes(value), D) is None


def test_an_address_that_is_none_is_told_at_start() -> None:
    """The setting is named."""
    with pytest.raises(SettingsError, match="EMBEDDING_REDIS_URL"):
        RedisCache(RedisAccess("localhost:6379"), timeout_s=1, ttl_s=1)


async def test_a_redis_that_hangs_costs_its_budget_and_never_mixes_up_answers(unique: str) -> None:
    """Late answers of a call that was given up are not taken for those of the next."""
    with EmbeddedCache() as server:
        cache = RedisCache(RedisAccess(server.url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
        await cache.put_many({b"a": an_entry(1), b"b": an_entry(2)})
        os.kill(server.pid, signal.SIGSTOP)
        looked_up = asyncio.create_task(cache.get_many([b"a"], D))
        await settled()
        skip(BUDGET_S)
        with pytest.raises(CacheUnavailable):
            await asyncio.wait_for(looked_up, ENDS_WITHIN_S)
        os.kill(server.pid, signal.SIGCONT)
        found = await cache.get_many([b"b"], D)
        assert same(found[b"b"].entry, an_entry(2))
        await cache.close()


# --- both


async def test_what_redis_knows_is_kept_in_l1(redis_url: str, unique: str) -> None:
    """A hit of L2 is a hit of L1 the next time."""
    counted = Counted()
    redis = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    await redis.put_many({b"k": an_entry()})
    cache = TieredCache(MemoryCache(max_bytes=10_000, ttl_s=TTL_S), redis, counted.events)
    levels = [(await cache.get_many([b"k", b"x"], D))[b"k"].level for _ in range(2)]
    await redis.close()

    assert levels == [CacheLevel.L2, CacheLevel.L1]
    assert counted.sums == {
        ("cache_lookups", "l1", "miss"): 3,
        ("cache_lookups", "l1", "hit"): 1,
        ("cache_lookups", "l2", "hit"): 1,
        ("cache_lookups", "l2", "miss"): 2,
    }


async def test_a_lost_redis_is_gone_without_and_found_again(unique: str) -> None:
    """L1 goes on; Redis is tried once a pause, and is back by itself when it is."""
    counted, seconds = Counted(), Seconds()
    server = EmbeddedCache()
    server.start()
    redis = RedisCache(RedisAccess(server.url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    cache = TieredCache(MemoryCache(max_bytes=10_000, ttl_s=TTL_S), redis, counted.events, monotonic=seconds)
    await cache.put_many({b"k": an_entry()})
    server.kill()

    assert set(await cache.get_many([b"k", b"x"], D)) == {b"k"}
    await cache.put_many({b"later": an_entry(2)})
    assert counted.sums["cache_faults", "unavailable"] == 1
    assert counted.sums["cache_faults", "not_stored"] == 1

    server.start()
    assert ("cache_lookups", "l2", "miss") not in counted.sums
    await cache.get_many([b"x"], D)
    assert ("cache_lookups", "l2", "miss") not in counted.sums, "left alone for the pause"
    seconds.now += PAUSE_S
    await cache.get_many([b"x"], D)
    assert counted.sums["cache_lookups", "l2", "miss"] == 1
    await cache.put_many({b"now": an_entry(3)})
    assert set(await redis.get_many([b"now"], D)) == {b"now"}
    await redis.close()
    server.stop()


async def test_a_full_redis_still_answers_reads(unique: str) -> None:
    """Refused writes do not close the way to what is there."""
    seconds = Seconds()
    with EmbeddedCache() as server:
        client = Redis.from_url(server.url)
        redis = RedisCache(RedisAccess(server.url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
        await redis.put_many({b"k": an_entry()})
        await client.config_set("maxmemory", "1")
        cache = TieredCache(MemoryCache(max_bytes=0, ttl_s=TTL_S), redis, monotonic=seconds)
        await cache.put_many({b"more": an_entry(2)})
        found = await cache.get_many([b"k", b"more"], D)
        await redis.close()
        await client.aclose()
    assert set(found) == {b"k"}
