"""Keeps a gate supplied from the quota that all workers of a lane share, in slices and ahead of need."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from processor.errors import QuotaUnavailable
from processor.limits import Bucket, Gate
from processor.ports import Clock, QuotaAsk, SharedQuota

EVERY_S = (0.05, 0.15)
"""From one slice to the next: never the same, or who asks right before the others would get everything."""

PAUSE_S = 1.0
"""A quota that did not answer is left alone for so long; the gate keeps to its own part meanwhile."""

FULL = 0.99
"""Of what a gate may hold: then nothing is asked for."""

log = structlog.get_logger("embedding-processor")


class QuotaShare:
    """One gate's part in a shared quota: it holds up to a few seconds' worth of what one of `sharers` workers has.

    A call makes no round trip: slices come in the background, a few a second, until the gate is full.
    """

    def __init__(
        self,
        gate: Gate,
        quota: SharedQuota,
        clock: Clock,
        *,
        account: str,
        sharers: int,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.shared: bool | None = None
        self._gate = gate
        self._buckets = (gate.requests, gate.tokens)
        self._quota = quota
        self._clock = clock
        self._account = account
        self._sharers = sharers
        self._jitter = jitter
        self._spent = asyncio.Event()
        gate.spent = self._spent.set

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._spent.clear()
            if self._wanting():
                await self._clock.sleep(self._jitter(*EVERY_S) if await self._refill() else PAUSE_S)
            else:
                await self._spent.wait()

    def _wanting(self) -> bool:
        now = self._clock.monotonic()
        return any(bucket.missing(now) > bucket.capacity * (1 - FULL) for bucket in self._buckets if bucket.per_minute)

    async def _refill(self) -> bool:
        """Take a slice. Whether there was an answer."""
        now = self._clock.monotonic()
        try:
            slices = await self._quota.lease(
                self._account,
                self._ask(self._gate.requests, now),
                self._ask(self._gate.tokens, now),
                max(0.0, self._gate.asked_until - now),
            )
        except QuotaUnavailable as error:
            self._found(False, str(error))
            return False
        self._found(True)
        now = self._clock.monotonic()
        for bucket, part in zip(self._buckets, slices, strict=True):
            if part.per_minute is not None and part.heard_s is not None:  # maybe by another worker, and later
                bucket.tell(part.per_minute / self._sharers, now - part.heard_s, now)
        self._gate.grant(*(part.granted for part in slices))
        return True

    def _ask(self, bucket: Bucket, now: float) -> QuotaAsk:
        rate, heard_at = bucket.per_minute, bucket.heard_at
        return QuotaAsk(
            max(0.0, bucket.missing(now)),
            None if rate is None else rate * self._sharers,
            None if heard_at is None else max(0.0, now - heard_at),
        )

    def _found(self, shared: bool, why: str = "") -> None:
        if shared is not self.shared:
            self.shared = shared
            self._gate.lease(shared)
            if shared:
                log.info("quota", shared=True, sharers=self._sharers)
            else:
                log.warning("quota", shared=False, why=why, keeps_to=f"1/{self._sharers} of the limits")
