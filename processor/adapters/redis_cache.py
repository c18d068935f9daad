"""L2: vectors shared by all workers, in anything that speaks the Redis protocol, a Cluster too."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, Self, cast

from redis.asyncio.cluster import RedisCluster

from processor.adapters.cache_entry import decode, encode
from processor.adapters.redis_client import RedisAccess, trip
from processor.domain import CacheLevel, Entry
from processor.errors import CacheUnavailable
from processor.ports import NO_FORMER, Events, Found
from processor.settings import Settings

KEY_PREFIX = b"embedding:2:"
"""Before every key of ours: the number is that of the form of keys, which others may be of for a while."""

KEYS_A_TURN = 256
"""So many values are packed, or read, before everybody else gets a turn: 3 ms at d=1536."""

SCANNED = 1000
"""About so many keys a server looks at in one go of a scan: less than a millisecond in which it does nothing else."""

SAMPLE = 500
"""Of so many entries the size and the rest of their life are asked for."""

PURGE_GRACE_S = 1.0
"""Between a purge's two looks: what was on its way to Redis at the first is there by the second."""

L1_PURGED_WITHIN_S = 15
"""So long after a purge the L1 of each running worker that reaches Redis has let go of what it erased."""

DELETE_IF_SAME = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end"
"""Another worker may have stored a good value since a spoilt one was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a shared cache holds, and how its servers fare, summed over the nodes of a Cluster.

    `entry_bytes` is the mean of a sample as the server accounts it, `ttl_s` least, median and greatest of it; None when
    there are no entries. `max_memory_bytes` 0: no limit. `hits` and `misses` are the server's, of all its clients.
    """

    server: str
    nodes: int
    entries: int
    entry_bytes: int | None
    ttl_s: tuple[int, int, int] | None
    used_memory_bytes: int
    max_memory_bytes: int
    evicted_keys: int
    expired_keys: int
    hits: int
    misses: int


class RedisCache:
    """Implements `ports.VectorCache`; raises CacheUnavailable when Redis refuses or exceeds `timeout_s` for a trip.

    A look-up is one round trip, in a Cluster one to each node, all at once. `prefix` goes before every key. Entries
    live `ttl_s`, up to `ttl_jitter` of it shorter. Counts `cache_faults` of kind corrupt, and deletes such an entry
    unless it is `read_only`.
    """

    def __init__(
        self,
        access: RedisAccess,
        *,
        timeout_s: float,
        ttl_s: int,
        ttl_jitter: float = 0.0,
        prefix: bytes = KEY_PREFIX,
        events: Events | None = None,
        read_only: bool = False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        # One more try at once: after a restart of Redis every pooled connection is a dead one.
        self._redis = access.open(timeout_s=timeout_s, retries=1)
        self._is_cluster = access.cluster
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._ttl_jitter = ttl_jitter
        self._prefix = prefix
        self._purges = prefix + b"purges"
        self._events = events or Events()
        self._read_only = read_only
        self._chance = chance

    @classmethod
    def from_settings(cls, settings: Settings, events: Events | None = None, *, read_only: bool = False) -> Self:
        """SettingsError when a setting of Redis is missing or unusable."""
        return cls(
            RedisAccess.from_settings(settings),
            timeout_s=settings.redis_timeout_ms / 1000,
            ttl_s=settings.cache_ttl_s,
            ttl_jitter=settings.cache_ttl_jitter_percent / 100,
            events=events,
            read_only=read_only,
        )

    def peek(self, key: bytes, dimensions: int) -> Found | None:  # noqa: ARG002
        """Nothing is remembered on this side of the network."""
        return None

    async def get_many(
        self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
    ) -> Mapping[bytes, Found]:
        keys = list(dict.fromkeys(keys))
        if not keys:
            return {}
        asked = keys + [former[key] for key in keys if key in former]
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._budget():
            values = await self._values(asked)
        found: dict[bytes, Found] = {}
        corrupt: list[tuple[bytes, bytes]] = []
        for begin in range(0, len(asked), KEYS_A_TURN):
            if begin:
                await asyncio.sleep(0)
            some = slice(begin, begin + KEYS_A_TURN)
            for key, value in zip(asked[some], values[some], strict=True):
                if value is None:
                    continue
                entry = decode(key, value, dimensions)
                if entry is None:
                    corrupt.append((key, value))
                else:
                    found[key] = Found(entry, CacheLevel.L2)
        if corrupt:
            self._events.count("cache_faults", len(corrupt), {"kind": "corrupt"})
        moved = {key: found[old] for key, old in former.items() if key not in found and old in found}
        if (corrupt or moved) and not self._read_only:
            # In what is left of the budget: what was found is worth more than this, which is met again.
            with suppress(CacheUnavailable):
                async with trip(self._timeout_s - (loop.time() - began), CacheUnavailable):
                    await self._delete(corrupt)
                    await self._keep({key: (former[key], hit.entry) for key, hit in moved.items()})
        return {key: hit for key in keys if (hit := found.get(key) or moved.get(key)) is not None}

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        keys = list(entries)
        for begin in range(0, len(keys), KEYS_A_TURN):
            pipeline = self._pipeline()
            for key in keys[begin : begin + KEYS_A_TURN]:
                life_ms = int(self._ttl_s * 1000 * (1 - self._ttl_jitter * self._chance()))
                pipeline.set(self._prefix + key, encode(key, entries[key]), nx=True, px=life_ms)
            async with self._budget():
                await pipeline.execute()

    async def purge(self, tag: bytes) -> int:
        """Erase all entries whose keys begin with the tag; how many there were.

        Two looks, PURGE_GRACE_S apart: the second catches what was being written at the first. The purge is noted last
        (`purged`), so that no L1 that has let go of an entry finds it here again. What a worker embeds later is stored
        as ever: a tenant that still sends requests is not gone.
        """
        erased = await self._erase(tag)
        await asyncio.sleep(PURGE_GRACE_S)
        erased += await self._erase(tag)
        now = time.time()
        async with self._budget():
            await self._redis.zremrangebyscore(self._purges, "-inf", now - self._ttl_s)
            await self._redis.zadd(self._purges, {tag: now})
            await self._redis.expire(self._purges, self._ttl_s)
        return erased

    async def purged(self) -> Mapping[bytes, float]:
        """The tags that were purged, and when by the purger's clock: for L1s. Kept for as long as entries live."""
        async with self._budget():
            purges = await self._redis.zrange(self._purges, 0, -1, withscores=True)
            return dict(cast("list[tuple[bytes, float]]", purges))

    async def entries(self, tag: bytes = b"") -> AsyncIterator[Sequence[bytes]]:
        """The keys of the entries that begin with the tag, some at a time; one can come twice, as a scan has it."""
        pattern = _escaped(self._prefix + tag) + b"*"
        for node in await self._nodes():
            cursor = 0
            while True:
                async with self._budget():
                    answer = await node.execute_command("SCAN", cursor, "MATCH", pattern, "COUNT", SCANNED)
                cursor, names = cast("tuple[int, list[bytes]]", answer)
                if keys := [name.removeprefix(self._prefix) for name in names if name != self._purges]:
                    yield keys
                if cursor == 0:
                    break

    async def stats(self, tag: bytes = b"") -> CacheStats:
        """Looks at every key of the server, in small steps; with a tag, entries and their sample are of that tag."""
        number, sample = 0, list[bytes]()
        async for keys in self.entries(tag):
            number += len(keys)
            sample += keys[: SAMPLE - len(sample)]
        async with self._budget():
            sizes = await self._asked("MEMORY USAGE", sample)
        async with self._budget():
            lives = sorted(life for life in await self._asked("TTL", sample) if life >= 0)
        told = []
        for node in await self._nodes():
            async with self._budget():
                told.append(cast("dict[str, Any]", await node.execute_command("INFO")))
        name = "valkey" if "valkey_version" in told[0] else "redis"

        def total(field: str) -> int:
            return sum(int(each.get(field, 0)) for each in told)

        return CacheStats(
            server=f"{name} {told[0].get(f'{name}_version')}",
            nodes=len(told),
            entries=number,
            entry_bytes=round(sum(sizes) / len(sizes)) if sizes else None,
            ttl_s=(lives[0], lives[len(lives) // 2], lives[-1]) if lives else None,
            used_memory_bytes=total("used_memory"),
            max_memory_bytes=total("maxmemory"),
            evicted_keys=total("evicted_keys"),
            expired_keys=total("expired_keys"),
            hits=total("keyspace_hits"),
            misses=total("keyspace_misses"),
        )

    async def ping(self) -> str:
        """For health and doctor: "ok", or why not. It is a look-up: one may be refused where a PING is not."""
        try:
            async with self._budget():
                await self._values([b"one", b"another"])
        except CacheUnavailable as error:
            return str(error)
        return "ok"

    async def close(self) -> None:
        await self._redis.aclose()

    async def _values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        names = [self._prefix + key for key in keys]
        if self._is_cluster:
            pipeline = self._pipeline()  # an MGET may not leave its slot: one a key, sent to each node together
            for name in names:
                pipeline.get(name)
            values = await pipeline.execute()
        else:
            values = await self._redis.mget(names)
        if len(values) != len(names) or not {type(value) for value in values} <= {bytes, NoneType}:
            raise ValueError("not a value or nil for each key")
        return cast("list[bytes | None]", values)

    async def _delete(self, values: Sequence[tuple[bytes, bytes]]) -> None:
        """Keys, as long as they hold these values."""
        pipeline = self._pipeline()
        for key, value in values:
            pipeline.execute_command("EVAL", DELETE_IF_SAME, 1, self._prefix + key, value)
        await pipeline.execute()

    async def _keep(self, moved: Mapping[bytes, tuple[bytes, Entry]]) -> None:
        """Entries by key, each with its former one, whose life goes on: no change of secrets makes it longer."""
        pipeline = self._pipeline()
        for former, _ in moved.values():
            pipeline.pttl(self._prefix + former)
        lives_ms = await pipeline.execute()
        pipeline = self._pipeline()
        for (key, (_, entry)), life_ms in zip(moved.items(), lives_ms, strict=True):
            if life_ms > 0:
                pipeline.set(self._prefix + key, encode(key, entry), nx=True, px=life_ms)
        await pipeline.execute()

    async def _erase(self, tag: bytes) -> int:
        erased = 0
        async for keys in self.entries(tag):
            async with self._budget():
                pipeline = self._pipeline()
                for key in keys:
                    pipeline.execute_command("UNLINK", self._prefix + key)
                erased += sum(await pipeline.execute())
        return erased

    async def _asked(self, command: str, keys: Sequence[bytes]) -> list[int]:
        """The answers of those that are still there."""
        pipeline = self._pipeline()
        for key in keys:
            pipeline.execute_command(command, self._prefix + key)
        return [answer for answer in await pipeline.execute() if answer is not None]

    async def _nodes(self) -> Sequence[Any]:
        """Each server that holds entries: something to execute a command on."""
        if not isinstance(self._redis, RedisCluster):
            return [self._redis]
        async with self._budget():
            await self._redis.initialize()
        return self._redis.get_primaries()

    def _pipeline(self) -> Any:
        return self._redis.pipeline(transaction=False)

    def _budget(self) -> AbstractAsyncContextManager[None]:
        return trip(self._timeout_s, CacheUnavailable)


def _escaped(name: bytes) -> bytes:
    """As a pattern that matches this name alone."""
    return re.sub(rb"([*?\[\]\\])", rb"\\\1", name)
