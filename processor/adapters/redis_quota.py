"""The quota that workers share, in anything that speaks the Redis protocol: two buckets an account, one script."""

from __future__ import annotations

import math
from typing import Self, cast

from processor.adapters.redis_client import RedisAccess, trip
from processor.errors import QuotaUnavailable
from processor.ports import QuotaAsk, QuotaGrant
from processor.settings import Settings

KEPT_S = 3600
"""A quota that nobody asks for is forgotten after so long, and what headers said of it too."""

LEASE = """
local spoken = redis.call('TIME')
local now = tonumber(spoken[1]) + tonumber(spoken[2]) / 1000000
local pace, wait_s, kept_s = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local known = redis.call('HMGET', KEYS[1], 'at', 'wait_until',
    'requests', 'requests_per_minute', 'requests_heard', 'tokens', 'tokens_per_minute', 'tokens_heard')
local at = tonumber(known[1] or now)
local passed_s, set_back_s = math.max(0, now - at), math.max(0, at - now)
local wait_until = math.max(tonumber(known[2] or 0) - set_back_s, now + wait_s)
local kept, answer = {'at', string.format('%.6f', now), 'wait_until', string.format('%.6f', wait_until)}, {}
for i, name in ipairs({'requests', 'tokens'}) do
    local wanted, said, said_ago_s = tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2]), tonumber(ARGV[3 * i + 3])
    local level = tonumber(known[3 * i] or 0)
    local rate, heard = tonumber(known[3 * i + 1] or 0), tonumber(known[3 * i + 2] or 0) - set_back_s
    local said_at = 0
    if said_ago_s >= 0 then said_at = now - said_ago_s end
    if said > 0 and said_at >= heard then
        rate, heard = said, said_at
    end
    local per_s = rate / 60 * pace
    level = math.min(math.max(1, per_s / 2), level + passed_s * per_s)
    local granted = 0
    if now >= wait_until then granted = math.max(0, math.min(wanted, level)) end
    level = level - granted
    local heard_s = -1
    if heard > 0 then heard_s = math.max(0, now - heard) end
    for _, value in ipairs({granted, rate, heard_s}) do table.insert(answer, string.format('%.6f', value)) end
    for suffix, value in pairs({[''] = level, _per_minute = rate, _heard = heard}) do
        table.insert(kept, name .. suffix)
        table.insert(kept, string.format('%.6f', value))
    end
end
redis.call('HSET', KEYS[1], unpack(kept))
redis.call('EXPIRE', KEYS[1], kept_s)
return answer
"""
"""A bucket holds half a second's worth, and one at least, and starts empty. The server's clock is the only one; when
it is set back, or another server takes over, a wait and what was heard are as far from now as before."""


class RedisQuota:
    """Implements `ports.SharedQuota`. `pace` is the part of a limit that flows in; a lease is one round trip."""

    def __init__(
        self, access: RedisAccess, *, timeout_s: float, pace: float, prefix: str = "embedding:quota:1:"
    ) -> None:
        # No second try: what the first may have granted would be lost.
        self._redis = access.open(timeout_s=timeout_s, retries=0, decode_responses=True)
        self._timeout_s = timeout_s
        self._pace = pace
        self._prefix = prefix
        self._script = self._redis.register_script(LEASE)

    @classmethod
    def from_settings(cls, settings: Settings, *, pace: float) -> Self:
        """SettingsError when a setting of Redis is missing or unusable."""
        return cls(RedisAccess.from_settings(settings), timeout_s=settings.redis_timeout_ms / 1000, pace=pace)

    async def lease(
        self, account: str, requests: QuotaAsk, tokens: QuotaAsk, wait_s: float
    ) -> tuple[QuotaGrant, QuotaGrant]:
        arguments = [self._pace, wait_s, KEPT_S, *_written(requests), *_written(tokens)]
        async with trip(self._timeout_s, QuotaUnavailable):
            answer = cast("list[str]", await self._script(keys=[self._prefix + account], args=arguments))
        try:
            granted, rate, heard_s, *of_tokens = map(float, answer)
            slices = _read(granted, rate, heard_s), _read(*of_tokens)
        except (ValueError, TypeError):
            pass
        else:
            # What someone else wrote there must not stop a gate for good.
            if all(0 <= grant.granted < math.inf and 0 <= (grant.per_minute or 0.0) < math.inf for grant in slices):
                return slices
        raise QuotaUnavailable("redis: nonsense")

    async def close(self) -> None:
        await self._redis.aclose()


def _written(ask: QuotaAsk) -> list[float]:
    return [ask.wanted, ask.per_minute or 0.0, -1.0 if ask.heard_s is None else ask.heard_s]


def _read(granted: float, per_minute: float, heard_s: float) -> QuotaGrant:
    return QuotaGrant(granted, per_minute or None, None if heard_s < 0 else heard_s)
