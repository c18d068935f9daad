"""How the shared cache and the shared quota reach Redis: a client, and a bound on what each trip may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from processor.errors import CacheUnavailable, QuotaUnavailable, SettingsError
from processor.settings import Settings


def open_redis(url: str, *, timeout_s: float, retries: int, decode_responses: bool = False) -> Redis:
    """Nothing is sent yet. SettingsError when `url` is none."""
    try:
        return Redis.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), retries),
            decode_responses=decode_responses,
        )
    except ValueError:
        raise SettingsError("EMBEDDING_REDIS_URL: must be redis://, rediss:// or unix://") from None


def redis_url(settings: Settings) -> str:
    """SettingsError when it is missing."""
    if not settings.redis_url:
        raise SettingsError("EMBEDDING_REDIS_URL: is missing")
    return settings.redis_url


@asynccontextmanager
async def trip(timeout_s: float, unavailable: type[CacheUnavailable | QuotaUnavailable]) -> AsyncIterator[None]:
    """Raises `unavailable` when Redis refuses, is not there or takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (RedisError, OSError, TimeoutError) as error:
        # The class alone: a message can quote the command, or the address.
        raise unavailable(f"redis: {type(error).__name__}") from None
