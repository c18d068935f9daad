"""L1's bounds and the pause after a fault of L2, without a server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.adapters.cache_entry import decode, encode
from processor.adapters.eviction import MOST_LOOKS, Lru, S3Fifo, Slot
from processor.adapters.memory_cache import ENTRIES_A_TURN, ENTRY_OVERHEAD_BYTES, KEYS_A_TURN, MemoryCache
from processor.adapters.tiered_cache import TieredCache
from processor.domain import CacheLevel, Entry, Item, TokenSource
from processor.errors import CacheUnavailable
from processor.ports import NO_FORMER, Found

D = 4
SIZE = D * 4 + ENTRY_OVERHEAD_BYTES


def an_entry(tokens: int = 1) -> Entry:
    return Entry(np.ones(D, np.float32), tokens, Item("r", 0), "a", TokenSource.PROVIDER)


def keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


async def test_l1_lets_the_least_recently_used_go() -> None:
    """A look-up is a use; a store that changes nothing is none."""
    cache = MemoryCache(max_bytes=3 * SIZE, ttl_s=60, eviction=Lru())
    for name in "abc":
        await cache.put_many({name.encode(): an_entry()})
    await cache.get_many(keys("a"), D)
    await cache.put_many({b"b": an_entry(2)})
    await cache.put_many({b"d": an_entry()})
    assert set(await cache.get_many(keys("a", "b", "c", "d"), D)) == {b"a", b"c", b"d"}


@pytest.mark.parametrize("eviction", [Lru, S3Fifo])
@given(steps=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 400), st.booleans()), max_size=60))
async def test_l1_never_exceeds_its_bytes(eviction: type[Lru | S3Fifo], steps: list[tuple[str, int, bool]]) -> None:
    """Whatever is put, read, purged or expired, the size is that of what is kept, and within the bound."""
    now = [0.0]
    cache = MemoryCache(max_bytes=5000, ttl_s=10, eviction=eviction(), monotonic=lambda: now[0])
    for name, dimensions, later in steps:
        entry = Entry(np.ones(dimensions, np.float32), 1, Item("r", 0), "a", TokenSource.PROVIDER)
        await cache.put_many({name.encode(): entry})
        await cache.get_many(keys("a", "b"), dimensions)
        await cache.drop([b"c"])
        now[0] += 6 * later
        assert cache.size_bytes <= 5000
        assert cache.peek(b"c", dimensions) is None
    now[0] += 100
    await cache.get_many(keys(*"abcdefgh"), D)
    assert (len(cache), cache.size_bytes) == (0, 0)


async def test_what_is_asked_for_again_outlives_what_is_not() -> None:
    """With lfu a stream of texts that come once passes by what was used twice; with lru it sweeps it away."""
    kept = {}
    for name, eviction in (("lru", Lru()), ("lfu", S3Fifo())):
        cache = MemoryCache(max_bytes=20 * SIZE, ttl_s=60, eviction=eviction)
        wanted = [b"wanted%d" % number for number in range(10)]
        for key in wanted:
            await cache.put_many({key: an_entry()})
            await cache.get_many([key], D)
            await cache.get_many([key], D)
        for number in range(200):
            await cache.put_many({b"once%d" % number: an_entry()})
        kept[name] = len(await cache.get_many(wanted, D))
    assert kept == {"lru": 0, "lfu": 10}


def added(queues: S3Fifo, name: str, uses: int = 0) -> Slot:
    slot = Slot(name.encode(), Found(an_entry(), CacheLevel.L1), D, 0.0)
    queues.added(slot)
    for _ in range(uses):
        queues.used(slot)
    return slot


@pytest.mark.parametrize("eviction", [Lru, S3Fifo])
async def test_a_vector_larger_than_the_memory_sweeps_nothing_away(eviction: type[Lru | S3Fifo]) -> None:
    """It is not kept, and all else is."""
    cache = MemoryCache(max_bytes=10 * SIZE, ttl_s=60, eviction=eviction())
    await cache.put_many({b"%d" % number: an_entry() for number in range(10)})
    large = Entry(np.ones(10 * SIZE // 4, np.float32), 1, Item("r", 0), "a", TokenSource.PROVIDER)
    await cache.put_many({b"large": large})
    assert (len(cache), cache.peek(b"large", large.vector.size)) == (10, None)


def test_two_uses_are_more_than_one() -> None:
    """With lfu what was used once while it was new goes as what never was; what was used twice is kept."""
    queues = S3Fifo()
    once, twice, never = added(queues, "once", uses=1), added(queues, "twice", uses=2), added(queues, "never")
    assert [queues.victim(), queues.victim(), queues.victim()] == [once, never, twice]


def test_what_is_no_longer_asked_for_goes_in_the_end() -> None:
    """With lfu an old favourite does not stay for ever: each round counts one of its uses down."""
    queues = S3Fifo()
    slots = [added(queues, f"first{number}", uses=2) for number in range(20)]
    assert queues.victim() is slots[0]
    old = slots[1]
    for _ in range(1000):
        queues.used(old)
    rounds = 1
    while added(queues, f"later{rounds}", uses=2) and queues.victim() is not old:
        rounds += 1
        assert rounds < 100
    assert rounds > 20, "it was asked for: it outlives those that came with it"


def test_a_full_cache_that_is_all_in_use_is_not_searched_through() -> None:
    """The search for what goes is bounded: everybody else waits for it."""
    queues = S3Fifo()
    slots = [added(queues, f"{number}", uses=3) for number in range(3 * MOST_LOOKS)]
    for _ in range(2):
        uses = [slot.uses for slot in slots]
        gone = queues.victim()
        assert 0 < sum(slot.uses != before for slot, before in zip(slots, uses, strict=True)) < MOST_LOOKS
        for slot in slots:
            if slot is not gone:
                queues.used(slot)
        slots.remove(gone)


def test_who_comes_back_soon_is_believed() -> None:
    """With lfu the key of a text that was let go is remembered: the second time it is kept before new ones."""
    queues = S3Fifo()
    for number in range(9):
        added(queues, f"main{number}", uses=2)
    back = added(queues, "back")
    assert queues.victim() is back
    back, new = added(queues, "back"), added(queues, "new")
    for number in range(20):
        new, before = added(queues, f"new{number}"), new
        assert queues.victim() is before
    queues.removed(back)


async def test_what_is_remembered_of_keys_shrinks_with_the_cache() -> None:
    """With lfu the keys of what was let go are no more than what is kept: of large vectors after small ones, few."""
    queues = S3Fifo()
    cache = MemoryCache(max_bytes=2000 * SIZE, ttl_s=60, eviction=queues)
    for number in range(2000):
        await cache.put_many({b"kept%d" % number: an_entry()})
        for _ in range(3):
            cache.peek(b"kept%d" % number, D)
    for number in range(3000):
        await cache.put_many({b"small%d" % number: an_entry()})
    assert len(queues._gone) > 1000
    large = Entry(np.ones(100 * SIZE // 4, np.float32), 1, Item("r", 0), "a", TokenSource.PROVIDER)
    for number in range(2000):
        await cache.put_many({b"large%d" % number: large})
    assert len(queues._gone) <= len(cache) < 300


@pytest.mark.parametrize("eviction", [Lru, S3Fifo])
async def test_lives_are_spread(eviction: type[Lru | S3Fifo]) -> None:
    """What was stored together expires over the jitter, none of it after the TTL."""
    now = [0.0]
    chances = itertools.cycle([0.0, 0.5, 0.999])
    cache = MemoryCache(
        max_bytes=10 * SIZE,
        ttl_s=100,
        ttl_jitter=0.2,
        eviction=eviction(),
        monotonic=lambda: now[0],
        chance=lambda: next(chances),
    )
    await cache.put_many({name: an_entry() for name in keys("a", "b", "c")})
    left = []
    for now[0] in (79.0, 81.0, 91.0, 100.0):
        left.append(set(await cache.get_many(keys("a", "b", "c"), D)))
    assert left == [{b"a", b"b", b"c"}, {b"a", b"b"}, {b"a"}, set()]


async def test_dropping_many_gives_everybody_else_a_turn() -> None:
    """A full memory is not searched in one piece, and what is put meanwhile does no harm."""
    cache = MemoryCache(max_bytes=3 * KEYS_A_TURN * SIZE, ttl_s=60)
    entry = an_entry()
    await cache.put_many({b"tenant-%d" % (i % 2) + b"%d" % i: entry for i in range(2 * KEYS_A_TURN)})
    dropping = asyncio.create_task(cache.drop([b"tenant-1"]))
    await asyncio.sleep(0)
    assert len(cache) == 2 * KEYS_A_TURN - KEYS_A_TURN // 2
    await cache.put_many({b"tenant-0x": entry})
    assert await dropping == KEYS_A_TURN
    assert len(cache) == KEYS_A_TURN + 1


async def test_storing_many_gives_everybody_else_a_turn() -> None:
    """The vectors of a full call are not copied in one piece."""
    cache = MemoryCache(max_bytes=2048 * SIZE, ttl_s=60)
    storing = asyncio.create_task(cache.put_many({b"%d" % i: an_entry() for i in range(2048)}))
    looks = [0]
    while not storing.done():
        await asyncio.sleep(0)
        looks.append(len(cache))
    assert looks[-1] == 2048
    assert max(after - before for before, after in pairwise(looks)) <= ENTRIES_A_TURN


async def test_l1_of_no_bytes_keeps_nothing() -> None:
    """0 turns it off."""
    cache = MemoryCache(max_bytes=0, ttl_s=60)
    await cache.put_many({b"k": an_entry()})
    assert await cache.get_many([b"k"], D) == {}


@given(st.binary(max_size=80), st.integers(0, 79), st.integers(1, 255))
def test_a_stored_value_survives_no_change(junk: bytes, position: int, flip: int) -> None:
    """Random bytes, and any one byte changed, decode to nothing and raise nothing."""
    assert decode(b"k", junk, D) is None
    value = bytearray(encode(b"k", an_entry()))
    value[position % len(value)] ^= flip
    assert decode(b"k", bytes(value), D) is None


class Flaky:
    """An L2 that hangs until it is let go, then fails."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = asyncio.Event()

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        return None

    async def get_many(
        self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
    ) -> Mapping[bytes, Found]:
        self.calls += 1
        await self.go.wait()
        raise CacheUnavailable("test")

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        raise CacheUnavailable("test")


async def test_one_call_at_a_time_tries_a_broken_l2() -> None:
    """While one tries, others go without at once instead of waiting for the same time-out."""
    now = [0.0]
    l2 = Flaky()
    l2.go.set()
    cache = TieredCache(MemoryCache(max_bytes=0, ttl_s=1), l2, monotonic=lambda: now[0])
    await cache.get_many([b"k"], D)
    l2.go.clear()
    now[0] += 1.5
    probe = asyncio.create_task(cache.get_many([b"k"], D))
    await asyncio.sleep(0)
    assert await cache.get_many([b"k"], D) == {}
    assert l2.calls == 2
    assert cache.goes_without == {"reads": True, "writes": False}
    l2.go.set()
    assert await probe == {}


@pytest.mark.parametrize("tokens", [0, 2**32 - 1])
def test_a_share_of_any_size_is_kept(tokens: int) -> None:
    """Up to four bytes' worth of tokens."""
    found = decode(b"k", encode(b"k", an_entry(tokens)), D)
    assert found is not None
    assert found.tokens == tokens
