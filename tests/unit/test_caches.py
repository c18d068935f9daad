"""L1's bounds and the pause after a fault of L2, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.adapters.cache_entry import decode, encode
from processor.adapters.eviction import Lru
from processor.adapters.memory_cache import ENTRIES_A_TURN, ENTRY_OVERHEAD_BYTES, MemoryCache
from processor.adapters.tiered_cache import TieredCache
from processor.domain import Entry, Item, TokenSource
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


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 400), st.booleans()), max_size=60))
async def test_l1_never_exceeds_its_bytes(steps: list[tuple[str, int, bool]]) -> None:
    """Whatever is put, read or expired, the size is that of what is kept, and within the bound."""
    now = [0.0]
    cache = MemoryCache(max_bytes=4000, ttl_s=10, monotonic=lambda: now[0])
    for name, dimensions, later in steps:
        entry = Entry(np.ones(dimensions, np.float32), 1, Item("r", 0), "a", TokenSource.PROVIDER)
        await cache.put_many({name.encode(): entry})
        await cache.get_many(keys("a", "b"), dimensions)
        now[0] += 6 * later
        assert cache.size_bytes <= 4000
    now[0] += 100
    await cache.get_many(keys(*"abcdefgh"), D)
    assert (len(cache), cache.size_bytes) == (0, 0)


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
    l2.go.set()
    assert await probe == {}


@pytest.mark.parametrize("tokens", [0, 2**32 - 1])
def test_a_share_of_any_size_is_kept(tokens: int) -> None:
    """Up to four bytes' worth of tokens."""
    found = decode(b"k", encode(b"k", an_entry(tokens)), D)
    assert found is not None
    assert found.tokens == tokens
