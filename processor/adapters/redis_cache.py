"""L2: vectors shared by all workers, in anything that speaks the Redis protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self, cast

from processor.adapters.cache_entry import decode, encode
from processor.adapters.redis_client import open_redis, redis_url, trip
from processor.domain import CacheLevel, Entry
from processor.errors import CacheUnavailable
from processor.ports import Events, Found
from processor.settings import Settings

KEYS_A_TRIP = 256
"""So many go in one round trip: their values are packed or read in one piece, 3 ms at d=1536."""


class RedisCache:
    """Implements `ports.VectorCache`; raises CacheUnavailable when Redis refuses or exceeds `timeout_s` for a trip.

    One round trip for up to KEYS_A_TRIP keys. `prefix` goes before every key. Counts `cache_faults` of kind corrupt,
    and deletes such an entry unless it is `read_only`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        ttl_s: int,
        prefix: bytes = b"embedding:1:",
        events: Events | None = None,
        read_only: bool = False,
    ) -> None:
        # One more try at once: after a restart of Redis every pooled connection is a dead one.
        self._redis = open_redis(url, timeout_s=timeout_s, retries=1)
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._prefix = prefix
        self._events = events or Events()
        self._read_only = read_only

    @classmethod
    def from_settings(cls, settings: Settings, events: Events | None = None, *, read_only: bool = False) -> Self:
        """SettingsError when there is no URL or it is none."""
        return cls(
            redis_url(settings),
            timeout_s=settings.redis_timeout_ms / 1000,
            ttl_s=settings.cache_ttl_s,
            events=events,
            read_only=read_only,
        )

    def peek(self, key: bytes, dimensions: int) -> Found | None:  # noqa: ARG002
        """Nothing is remembered on this side of the network."""
        return None

    async def get_many(self, keys: Sequence[bytes], dimensions: int) -> Mapping[bytes, Found]:
        found, corrupt = {}, []
        for some in _trips(keys):
            async with self._budget():
                values = cast("list[bytes | None]", await self._redis.mget([self._prefix + key for key in some]))
            for key, value in zip(some, values, strict=True):
                if value is None:
                    continue
                entry = decode(key, value, dimensions)
                if entry is None:
                    corrupt.append(key)
                else:
                    found[key] = Found(entry, CacheLevel.L2)
        if corrupt:
            self._events.count("cache_faults", len(corrupt), {"kind": "corrupt"})
        if corrupt and not self._read_only:
            async with self._budget():
                await self._redis.delete(*(self._prefix + key for key in corrupt))
        return found

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        for some in _trips(list(entries)):
            async with self._budget(), self._redis.pipeline(transaction=False) as pipeline:
                for key in some:
                    pipeline.set(self._prefix + key, encode(key, entries[key]), nx=True, ex=self._ttl_s)
                await pipeline.execute()

    async def ping(self) -> str:
        """For health and doctor: "ok", or why not."""
        try:
            async with self._budget():
                await self._redis.ping()
        except CacheUnavailable as error:
            return str(error)
        return "ok"

    async def close(self) -> None:
        await self._redis.aclose()

    def _budget(self) -> AbstractAsyncContextManager[None]:
        return trip(self._timeout_s, CacheUnavailable)


def _trips(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for begin in range(0, len(keys), KEYS_A_TRIP):
        yield keys[begin : begin + KEYS_A_TRIP]
