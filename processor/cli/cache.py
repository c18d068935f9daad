"""`cache stats` and `cache purge`: what the shared cache holds, and how a tenant's vectors are erased from it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from processor.adapters.redis_cache import L1_PURGED_WITHIN_S, CacheStats, RedisCache
from processor.app import worker_policy
from processor.cache import CacheKeys
from processor.cli.console import is_utf8
from processor.errors import RequestRefused
from processor.settings import PREFIX, Settings

REDIS_TIMEOUT_MS = 5_000
"""Nobody waits for a vector here: a trip may take longer than a worker's."""


@asynccontextmanager
async def open_cache(settings: Settings) -> AsyncIterator[RedisCache]:
    """The shared cache of the settings. SettingsError when they name none."""
    patient = settings.model_copy(update={"redis_timeout_ms": max(settings.redis_timeout_ms, REDIS_TIMEOUT_MS)})
    cache = RedisCache.from_settings(patient)
    try:
        yield cache
    finally:
        await cache.close()


def tags_of(settings: Settings, tenant_id: str) -> list[bytes]:
    """What the tenant's keys begin with, one for each secret. RequestRefused when keys don't say whose they are."""
    if not tenant_id or not is_utf8(tenant_id):
        raise RequestRefused("--tenant: must name a tenant, in UTF-8")
    if settings.cache_scope == "shared":
        raise RequestRefused(
            f"--tenant: with {PREFIX}CACHE_SCOPE=shared an entry is everybody's, and no tenant's can be told apart; "
            f"let entries expire ({PREFIX}CACHE_TTL_S), or give the cache another secret and restart the workers"
        )
    return CacheKeys.of(worker_policy(settings, {})).tags(tenant_id)


async def read_stats(settings: Settings, tenant_id: str | None) -> list[CacheStats]:
    """Of all entries; of a tenant, by secret: the present one's first. CacheUnavailable when Redis does not answer."""
    tags = [b""] if tenant_id is None else tags_of(settings, tenant_id)
    async with open_cache(settings) as cache:
        return [await cache.stats(tag) for tag in tags]


def stats_fields(stats: list[CacheStats]) -> dict[str, Any]:
    """For JSON: those of the first, and how many more entries there are under the former secret."""
    asked = stats[0].hits + stats[0].misses
    return asdict(stats[0]) | {
        "former_entries": sum(each.entries for each in stats[1:]),
        "hit_rate": stats[0].hits / asked if asked else None,
    }


def stats_sentences(stats: list[CacheStats]) -> Iterator[str]:
    """For people."""
    first, fields = stats[0], stats_fields(stats)
    former = f", {fields['former_entries']:,} more under the former secret" if fields["former_entries"] else ""
    each = f" of about {first.entry_bytes:,} bytes" if first.entry_bytes is not None else ""
    yield f"{first.entries:,} entries{each}{former}"
    if first.ttl_s is not None:
        least, median, greatest = first.ttl_s
        yield f"they live for another {least:,} to {greatest:,} s, half of them for {median:,} s"
    limit = f"of {first.max_memory_bytes:,}" if first.max_memory_bytes else "without a limit"
    nodes = f", {first.nodes} nodes" if first.nodes > 1 else ""
    yield f"{first.server}{nodes}: {first.used_memory_bytes:,} bytes in use {limit}"
    rate = "" if fields["hit_rate"] is None else f", {fields['hit_rate']:.1%} of its look-ups found something"
    yield f"since it started: {first.evicted_keys:,} evicted, {first.expired_keys:,} expired{rate} (all its clients)"


@dataclass(frozen=True, slots=True)
class Purged:
    """`entries` were erased from Redis; until `l1_until_ms` running workers may still answer from their own memory."""

    tenant_id: str
    entries: int
    l1_until_ms: int

    def sentence(self) -> str:
        """For people."""
        until = time.strftime("%H:%M:%S UTC", time.gmtime(-(-self.l1_until_ms // 1000)))
        hint = "" if self.entries else f" (with the workers' {PREFIX}CACHE_SECRET?)"
        return (
            f"erased {self.entries:,} entries from Redis{hint}; the memory of running workers is clean by {until}. "
            "Topics keep what they hold until it expires there"
        )


async def count(settings: Settings, tenant_id: str) -> int:
    """How many entries a purge would find now."""
    found: set[bytes] = set()
    tags = tags_of(settings, tenant_id)
    async with open_cache(settings) as cache:
        for tag in tags:
            async for keys in cache.entries(tag):
                found.update(keys)
    return len(found)


async def purge(settings: Settings, tenant_id: str) -> Purged:
    """Erase the tenant's entries under the present and the former secret. CacheUnavailable: do it again."""
    tags = tags_of(settings, tenant_id)
    async with open_cache(settings) as cache:
        # The former one's first: a look-up meanwhile keeps under the present one what it finds under the former.
        erased = [await cache.purge(tag) for tag in reversed(tags)]
    return Purged(tenant_id, sum(erased), time.time_ns() // 1_000_000 + L1_PURGED_WITHIN_S * 1000)
