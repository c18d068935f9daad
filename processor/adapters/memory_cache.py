"""L1: vectors that this process remembers, bounded in bytes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

import numpy as np

from processor.adapters.eviction import Eviction, Lru, S3Fifo, Slot
from processor.domain import CacheLevel, Entry
from processor.ports import NO_FORMER, SCOPE_TAG_BYTES, Found
from processor.settings import Settings

ENTRY_OVERHEAD_BYTES = 900
"""What an entry takes beside its vector, measured: key, ids, objects and their places in the tables."""

ENTRIES_A_TURN = 256
"""So many are stored before everybody else gets a turn: 1 ms at d=1536."""

KEYS_A_TURN = 10_000
"""So many are looked at for a tag before everybody else gets a turn: 2 ms."""


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
        self._slots: dict[bytes, Slot] = {}
        self._sizes: dict[int, int] = {}
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
        return len(self._slots)

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        slot = self._slots.get(key)
        if slot is None:
            return None
        if slot.expires_at <= self._monotonic():
            self._remove(slot)
            return None
        if slot.dimensions != dimensions:
            return None
        self._used(slot)
        return slot.found

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
            dimensions = self._sizes.setdefault(entry.vector.size, entry.vector.size)  # one object for all
            expires_at = now + self._ttl_s * (1 - self._ttl_jitter * self._chance())
            slot = self._slots[key] = Slot(key, found, dimensions, expires_at)
            self._eviction.added(slot)
            self.size_bytes += size_bytes
            while self.size_bytes > self._max_bytes:
                self._forget(self._eviction.victim())

    async def drop(self, tags: Collection[bytes]) -> int:
        """Let go of all entries whose keys begin with one of these scope tags; how many there were."""
        dropped = 0
        keys = list(self._slots)
        for begin in range(0, len(keys), KEYS_A_TURN):
            if begin:
                await asyncio.sleep(0)
            for key in keys[begin : begin + KEYS_A_TURN]:
                if key[:SCOPE_TAG_BYTES] in tags and (slot := self._slots.get(key)) is not None:
                    self._remove(slot)
                    dropped += 1
        return dropped

    def _living(self, key: bytes, now: float) -> bool:
        slot = self._slots.get(key)
        if slot is not None and slot.expires_at <= now:
            self._remove(slot)
            return False
        return slot is not None

    def _remove(self, slot: Slot) -> None:
        self._eviction.removed(slot)
        self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.key]
        self.size_bytes -= _size(slot.found.entry)


def _size(entry: Entry) -> int:
    return entry.vector.nbytes + ENTRY_OVERHEAD_BYTES


def _compact(entry: Entry) -> Entry:
    """A copy of its own: a vector can be a window on a whole response, and it may not be written to."""
    vector = np.frombuffer(entry.vector.tobytes(), np.float32)
    return Entry(vector, entry.tokens, entry.leader, entry.attempt_id, entry.token_source, entry.cut_tokens)
