"""Keeps a gate supplied from the quota that all workers of a lane share, in slices and ahead of need."""

from __future__ import annotations

import asyncio

import structlog

from processor.errors import QuotaUnavailable
from processor.limits import Bucket, Gate
from processor.ports import Clock, QuotaAsk, QuotaGrant, SharedQuota

AGAIN_S = 0.1
"""While a slice was smaller than wanted the next one is asked for after so long."""

PAUSE_S = 1.0
"""A quota that did not answer is left alone for so long; the gate keeps to its own part meanwhile."""

REFILL = 0.5
"""Below this part of what it may hold a gate asks for more."""

log = structlog.get_logger("embedding-processor")


class QuotaShare:
    """One gate's part in a shared quota: up to a few seconds' worth of what one of `sharers` workers would have.

    A call makes no round trip: slices come in the background, while less than half of that is left.
    """

    def __init__(self, gate: Gate, quota: SharedQuota, clock: Clock, *, account: str, sharers: int) -> None:
        self.shared: bool | None = None
        self._gate = gate
        self._quota = quota
        self._clock = clock
        self._account = account
        self._sharers = sharers
        self._spent = asyncio.Event()
        gate.spent = self._spent.set

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._spent.clear()
            wait_s = await self._refill()
            if wait_s is None:
                await self._spent.wait()
            else:
                await self._clock.sleep(wait_s)

    async def _refill(self) -> float | None:
        """Ask for a slice if one is wanted. How long to wait before the next; None: until something is spent."""
        gate, now = self._gate, self._clock.monotonic()
        buckets = (gate.requests, gate.tokens)
        asked_wait_s = max(0.0, gate.asked_until - now)
        if not asked_wait_s and not any(self._short(bucket, now) for bucket in buckets):
            return None
        try:
            granted = await self._quota.lease(
                self._account, self._ask(gate.requests, now), self._ask(gate.tokens, now), asked_wait_s
            )
        except QuotaUnavailable as error:
            self._found(False, str(error))
            return PAUSE_S
        self._found(True)
        now = self._clock.monotonic()
        for bucket, grant in zip(buckets, granted, strict=True):
            self._learn(bucket, grant, now)
        gate.grant(granted[0].granted, granted[1].granted)
        return AGAIN_S if any(self._short(bucket, now) for bucket in buckets) else None

    def _short(self, bucket: Bucket, now: float) -> bool:
        return bucket.per_minute is not None and bucket.missing(now) > bucket.capacity * REFILL

    def _ask(self, bucket: Bucket, now: float) -> QuotaAsk:
        rate, heard_at = bucket.per_minute, bucket.heard_at
        return QuotaAsk(
            max(0.0, bucket.missing(now)),
            None if rate is None else rate * self._sharers,
            None if heard_at is None else max(0.0, now - heard_at),
        )

    def _learn(self, bucket: Bucket, grant: QuotaGrant, now: float) -> None:
        """Another worker may have heard of a limit later than this one."""
        if grant.per_minute is None or grant.heard_s is None:
            return
        heard_at = now - grant.heard_s
        if bucket.heard_at is None or heard_at > bucket.heard_at:
            bucket.tell(grant.per_minute / self._sharers, heard_at, now)

    def _found(self, shared: bool, why: str = "") -> None:
        if shared is not self.shared:
            self.shared = shared
            self._gate.lease(shared)
            if shared:
                log.info("quota", shared=True, sharers=self._sharers)
            else:
                log.warning("quota", shared=False, why=why, keeps_to=f"1/{self._sharers} of the limits")
