"""Carries purges of the shared cache to the L1 of this process."""

from __future__ import annotations

from processor.adapters.memory_cache import MemoryCache
from processor.adapters.redis_cache import RedisCache
from processor.errors import CacheUnavailable
from processor.ports import Clock

EVERY_S = 2.0
"""Between two looks; with a few seconds for what was under way, well below `redis_cache.L1_PURGED_WITHIN_S`."""

AGAIN_S = 5.0
"""For so long a purged tag is dropped with each look: what was on its way from L2 to L1, for 3 s at most, is caught."""


class PurgeWatch:
    """While L2 is out of reach nothing is heard, and nothing lost: purges are noted there as long as entries live."""

    def __init__(self, l2: RedisCache, l1: MemoryCache, clock: Clock) -> None:
        self._l2 = l2
        self._l1 = l1
        self._clock = clock
        self._heard: dict[bytes, float] = {}
        self._again_until: dict[bytes, float] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await self._clock.sleep(EVERY_S)

    async def look(self) -> None:
        try:
            purged = await self._l2.purged()
        except CacheUnavailable:
            purged = self._heard
        now = self._clock.monotonic()
        for tag, at in purged.items():
            if self._heard.get(tag) != at:
                self._again_until[tag] = now + AGAIN_S
        self._heard = dict(purged)
        if self._again_until:
            await self._l1.drop(self._again_until)
            self._again_until = {tag: until for tag, until in self._again_until.items() if until > now}
