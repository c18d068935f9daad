"""A shared quota in memory, for tests in virtual time: it keeps the same promises as the one in Redis."""

from __future__ import annotations

from dataclasses import dataclass, field

from processor.errors import QuotaUnavailable
from processor.ports import Clock, QuotaAsk, QuotaGrant


@dataclass
class Shared:
    """One limit of one account."""

    level: float = 0.0
    per_minute: float = 0.0
    heard_at: float | None = None


@dataclass
class MemoryQuota:
    """Implements `ports.SharedQuota`; `lost` stands for a Redis out of reach."""

    clock: Clock
    pace: float = 1.0
    lost: bool = False
    leases: int = 0
    granted_tokens: float = 0.0
    _at: dict[str, float] = field(default_factory=dict)
    _wait_until: dict[str, float] = field(default_factory=dict)
    _limits: dict[str, tuple[Shared, Shared]] = field(default_factory=dict)

    async def lease(
        self, account: str, requests: QuotaAsk, tokens: QuotaAsk, wait_s: float
    ) -> tuple[QuotaGrant, QuotaGrant]:
        await self.clock.sleep(0)
        self.leases += 1
        if self.lost:
            raise QuotaUnavailable("memory: lost")
        now = self.clock.monotonic()
        limits = self._limits.setdefault(account, (Shared(), Shared()))
        passed_s, self._at[account] = now - self._at.get(account, now), now
        wait_until = self._wait_until[account] = max(self._wait_until.get(account, 0.0), now + wait_s)
        of_requests, of_tokens = (
            _grant(limit, ask, passed_s, now, self.pace, closed=now < wait_until)
            for limit, ask in zip(limits, (requests, tokens), strict=True)
        )
        self.granted_tokens += of_tokens.granted
        return of_requests, of_tokens


def _grant(limit: Shared, ask: QuotaAsk, passed_s: float, now: float, pace: float, *, closed: bool) -> QuotaGrant:
    said_at = None if ask.heard_s is None else now - ask.heard_s
    if ask.per_minute is not None and (limit.heard_at is None or (said_at is not None and said_at >= limit.heard_at)):
        limit.per_minute, limit.heard_at = ask.per_minute, said_at
    per_s = limit.per_minute / 60 * pace
    limit.level = min(max(1.0, per_s / 2), limit.level + passed_s * per_s)
    granted = 0.0 if closed else max(0.0, min(ask.wanted, limit.level))
    limit.level -= granted
    return QuotaGrant(
        granted, limit.per_minute or None, None if limit.heard_at is None else max(0.0, now - limit.heard_at)
    )
