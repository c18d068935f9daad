"""L1: the least recently used vectors of this process, bounded in bytes."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np

from processor.domain import CacheLevel, Entry
from processor.ports import NO_FORMER, Found
from processor.settings import Settings

ENTRY_OVERHEAD_BYTES = 800
"""What an entry takes beside its vector, measured: key, ids, objects and their places in the table."""


ENTRIES_A_TURN = 256
"""So many are stored before everybody else gets a turn: 1 ms at d=1536."""


class _Kept(NamedTuple):
    found: Found
    expires_at: float


class MemoryCache:
    """Implements `ports.VectorCache`. A look-up or a store is O(1); an expired entry goes when it is met or evicted.

    `max_bytes` 0 keeps nothing. `monotonic` gives seconds.
    """

    def __init__(self, *, max_bytes: int, ttl_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._monotonic = monotonic
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self.size_bytes = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(max_bytes=settings.l1_bytes, ttl_s=settings.cache_ttl_s)

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        found, expires_at = kept
        if expires_at <= self._monotonic():
            self._drop(key)
            return None
        if found.entry.vector.size != dimensions:
            return None
        self._kept.move_to_end(key)
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
            size = _size(entry)
            if size > self._max_bytes or self._living(key, now):
                continue
            # A copy of its own: a vector can be a window on a whole response, and it may not be written to.
            vector = np.frombuffer(entry.vector.tobytes(), np.float32)
            self._kept[key] = _Kept(Found(replace(entry, vector=vector), CacheLevel.L1), now + self._ttl_s)
            self.size_bytes += size
            while self.size_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def _living(self, key: bytes, now: float) -> bool:
        kept = self._kept.get(key)
        if kept is not None and kept.expires_at <= now:
            self._drop(key)
            return False
        return kept is not None

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= _size(self._kept.pop(key).found.entry)


def _size(entry: Entry) -> int:
    return entry.vector.nbytes + ENTRY_OVERHEAD_BYTES
