"""L1: vectors that this process remembers, bounded in bytes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from processor.adapters.eviction import Eviction, Lru, S3Fifo
from processor.domain import CacheLevel, Entry
from processor.ports import NO_FORMER, SCOPE_TAG_BYTES, Found
from processor.settings import Settings

ENTRY_OVERHEAD_BYTES = 1_100
"""What an entry takes beside its vector, measured: key, ids, objects and their places in the tables."""

ENTRIES_A_TURN = 256
"""So many are stored before everybody else gets a turn: 1 ms at d=1536."""

KEYS_A_TURN = 10_000
"""So many are looked at for a tag before everybody else gets a turn: 2 ms."""


class _Kept(NamedTuple):
    found: Found
    expires_at: float


class MemoryCache:
    """Implements `ports.VectorCache`. A look-up or a store is O(1); an expired entry goes when it is met or evicted.

    `max_bytes` 0 keeps nothing. Entries live `ttl_s`, up to `ttl_jitter` of it shorter. `monotonic` gives seconds,
    `chance` 0 to 1.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        ttl_s: float,
        ttl_jitter: float = 0.0,
        eviction: Eviction | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._ttl_jitter = ttl_jitter
        self._eviction = eviction or S3Fifo()
        self._used = self._eviction.used
        self._monotonic = monotonic
        self._chance = chance
        self._kept: dict[bytes, _Kept] = {}
        self.size_bytes = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            max_bytes=settings.l1_bytes,
            ttl_s=settings.cache_ttl_s,
            ttl_jitter=settings.cache_ttl_jitter_percent / 100,
            eviction=Lru() if settings.l1_policy == "lru" else S3Fifo(),
        )

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        found, expires_at = kept
        if expires_at <= self._monotonic():
            self._remove(key)
            return None
        if found.entry.vector.size != dimensions:
            return None
        self._used(key)
        return found

    async def get_many(
        self,
        keys: Sequence[bytes],
        dimensions: int,
        former: Mapping[bytes, bytes] = NO_FORMER,  # noqa: ARG002  (this process never had another secret)
    ) -> Mapping[bytes, Found]:
        return {key: found for key in keys if (found := self.peek(key, dimensions)) is not None}

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        now = self._monotonic()
        for count, (key, entry) in enumerate(entries.items()):
            if count and count % ENTRIES_A_TURN == 0:
                await asyncio.sleep(0)
            size_bytes = _size(entry)
            if size_bytes > self._max_bytes or self._living(key, now):
                continue
            found = Found(_compact(entry), CacheLevel.L1)
            self._kept[key] = _Kept(found, now + self._ttl_s * (1 - self._ttl_jitter * self._chance()))
            self._eviction.added(key)
            self.size_bytes += size_bytes
            while self.size_bytes > self._max_bytes:
                self._forget(self._eviction.victim())

    async def drop(self, tags: Collection[bytes]) -> int:
        """Let go of all entries whose keys begin with one of these scope tags; how many there were."""
        dropped = 0
        keys = list(self._kept)
        for begin in range(0, len(keys), KEYS_A_TURN):
            if begin:
                await asyncio.sleep(0)
            for key in keys[begin : begin + KEYS_A_TURN]:
                if key[:SCOPE_TAG_BYTES] in tags and key in self._kept:
                    self._remove(key)
                    dropped += 1
        return dropped

    def _living(self, key: bytes, now: float) -> bool:
        kept = self._kept.get(key)
        if kept is not None and kept.expires_at <= now:
            self._remove(key)
            return False
        return kept is not None

    def _remove(self, key: bytes) -> None:
        self._eviction.removed(key)
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        self.size_bytes -= _size(self._kept.pop(key).found.entry)


def _size(entry: Entry) -> int:
    return entry.vector.nbytes + ENTRY_OVERHEAD_BYTES


def _compact(entry: Entry) -> Entry:
    """A copy of its own: a vector can be a window on a whole response, and it may not be written to."""
    vector = np.frombuffer(entry.vector.tobytes(), np.float32)
    return Entry(vector, entry.tokens, entry.leader, entry.attempt_id, entry.token_source, entry.cut_tokens)
