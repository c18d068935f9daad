"""L1 before L2, as the steps see the cache: one that never fails, at worst it knows nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from processor.domain import CacheLevel, Entry
from processor.errors import CacheUnavailable
from processor.ports import NO_FORMER, Events, Found, VectorCache

PAUSE_S = 1.0
"""An L2 that failed is left alone for so long; then one call tries it while the others still go without."""


class TieredCache:
    """Implements `ports.VectorCache` over L1 and, when there is one, L2. What L2 knows is kept in L1.

    Counts `cache_lookups` (level, result) and `cache_faults` of kind unavailable and not_stored; a `peek` is counted by
    its caller, many at a time. Reads and writes break apart: a full Redis refuses writes and still answers reads.
    """

    def __init__(
        self,
        l1: VectorCache,
        l2: VectorCache | None,
        events: Events | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._l1 = l1
        self._l2 = l2
        self._events = events or Events()
        self._reads = _Breaker(monotonic)
        self._writes = _Breaker(monotonic)

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        return self._l1.peek(key, dimensions)

    async def get_many(
        self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
    ) -> Mapping[bytes, Found]:
        keys = list(dict.fromkeys(keys))
        found = dict(await self._l1.get_many(keys, dimensions))
        self._count(CacheLevel.L1, hits=len(found), of=len(keys))
        if len(found) == len(keys):
            return found
        missing = [key for key in keys if key not in found]
        if self._l2 is None:
            return found
        if self._reads.closed():
            try:
                shared = await self._l2.get_many(missing, dimensions, former)
            except CacheUnavailable:
                self._reads.failed()
            else:
                self._reads.worked()
                self._count(CacheLevel.L2, hits=len(shared), of=len(missing))
                await self._l1.put_many({key: hit.entry for key, hit in shared.items()})
                found.update(shared)
                return found
        self._events.count("cache_faults", 1, {"kind": "unavailable"})
        return found

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        await self._l1.put_many(entries)
        if self._l2 is None or not entries:
            return
        if self._writes.closed():
            try:
                await self._l2.put_many(entries)
            except CacheUnavailable:
                self._writes.failed()
            else:
                self._writes.worked()
                return
        self._events.count("cache_faults", len(entries), {"kind": "not_stored"})

    @property
    def goes_without(self) -> Mapping[str, bool]:
        """Whether reads, and writes, pass L2 over since it failed."""
        return {"reads": self._reads.open, "writes": self._writes.open}

    def _count(self, level: CacheLevel, *, hits: int, of: int) -> None:
        for result, number in (("hit", hits), ("miss", of - hits)):
            if number:
                self._events.count("cache_lookups", number, {"level": level.value, "result": result})


class _Breaker:
    """Open after a failure: nobody passes for PAUSE_S, then one at a time tries again."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._open_until: float | None = None

    @property
    def open(self) -> bool:
        return self._open_until is not None

    def closed(self) -> bool:
        if self._open_until is None:
            return True
        now = self._monotonic()
        if now < self._open_until:
            return False
        # Who comes next while this one tries goes without: it would only wait for the same time-out.
        self._open_until = now + PAUSE_S
        return True

    def failed(self) -> None:
        self._open_until = self._monotonic() + PAUSE_S

    def worked(self) -> None:
        self._open_until = None
