"""How much a deployment of a provider may be asked, now: one `Gate` each, pure arithmetic on the clock.

A gate is open when a call is within all of these:

    concurrency   calls in flight; grows while it is what holds calls up, shrinks when calls only queue or are refused
    rates         requests and tokens a minute, as settings say and headers correct; paced evenly, without bursts
    pause         a wait that the provider asked for, or an open breaker: then one call at a time probes
    retries       at most half as many as first tries, and a few: a provider in trouble is not stormed
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
    RateLimits,
)
from processor.ports import Clock

BREAKER_FAILURES = 5
"""So many failures in a row open the breaker: then one call at a time probes the provider."""

START_CALLS = 4
"""Calls in flight at first, if the cap allows; doubles every round trip until something speaks against it."""

DECREASE = 0.7
"""What is left of the concurrency after a round trip with a refusal, a timeout, or nothing but queueing."""

QUEUE_CALLS = 2
"""Slowness alone leaves so many calls in flight: one in work, one on its way."""

PACE = 0.985
"""Part of a rate that is used: what arrives early by the network's jitter is within the limit all the same."""

CALLS_A_MINUTE = 20
"""A call takes at most this part of a minute's tokens: every three seconds one, however large the limit."""

LATENESS = 1.1
"""The tokens of a call gather a tenth beyond it, so that a call that starts late loses nothing."""

SPARE_S, SPARE_REQUESTS = 0.25, 3.0
"""So many seconds' worth of tokens, and requests, gather anyway, for small calls that come together."""

TRUST_CUT, TRUST_BACK_S = 0.8, 600.0
"""A refusal while no header tells the limit leaves this part of the rate; all of it is back after so long."""

RETRY_RATIO, RETRY_SPARE, RETRY_PER_S = 0.5, 10.0, 1.0
"""Retries: this part of the first tries, so many in reserve, and as many a second whatever happens."""

WAIT_JITTER_S = 0.1
"""After a wait that the provider asked for not everybody comes back in the same instant."""

_OVERLOADED = frozenset({"timeout", "no_connection", "overloaded"})
"""Codes of failures that fewer calls at once may help against, beside every throttling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitPolicy:
    """The knobs of a gate. Rates are this worker's part of the account's, per minute; None: unknown, so unlimited.

    `share` is that part (0 to 1): what headers say of the account is multiplied by it.
    """

    max_concurrent_calls: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    share: float = 1.0
    retry_initial_s: float = 0.5
    retry_max_s: float = 30.0
    retry_after_max_s: float = 300.0


class Bucket:
    """What may be spent of a rate now. It fills evenly, and a spending beyond `capacity` passes when it is full.

    The capacity is one spending, `largest` or the largest asked for, but at least `least_s` of the rate, and at most
    `most_s`. It starts empty, and the first spending passes whatever its size: all that happens at once at the start.
    `level` is below 0 after a large one; then all wait until it is paid off. While it is `leased` it does not fill by
    itself: `add` does. `heard_at` is when a header last said the rate: a refusal is no sign of another one then.
    """

    def __init__(self, per_minute: float | None, *, least_s: float, most_s: float, largest: float, now: float) -> None:
        self.heard_at: float | None = None
        self.leased = False
        self.spent = 0.0
        self.level = 0.0
        self._fresh = True
        self._trust = 1.0
        self._least_s = least_s
        self._most_s = most_s
        self._largest = largest
        self._at = now
        self._per_s = math.inf
        self.per_minute: float | None = None
        if per_minute is not None:
            self.set_rate(per_minute, now)

    @property
    def per_s(self) -> float:
        return self._per_s * self._trust

    @property
    def capacity(self) -> float:
        needed = min(self._largest, self._per_s * self._most_s)
        return max(1.0, self._per_s * self._least_s, needed) * LATENESS

    def set_rate(self, per_minute: float, now: float) -> None:
        """Another rate from now on; one that was unknown while calls were made begins with a full bucket."""
        self.flow(now)
        unknown, self.per_minute = self.per_minute is None, per_minute
        self._per_s = per_minute / 60 * PACE
        self.level = self.capacity if unknown and not self._fresh else min(self.level, self.capacity)

    def tell(self, per_minute: float, heard_at: float, now: float) -> None:
        """A header said the rate."""
        if per_minute != self.per_minute:
            self.set_rate(per_minute, now)
        self.heard_at, self._trust = heard_at, 1.0

    def flow(self, now: float) -> None:
        """What came in since the last look."""
        passed_s, self._at = max(0.0, now - self._at), max(now, self._at)
        if self.per_minute is None:
            return
        if not self.leased:
            self.level = min(self.capacity, self.level + passed_s * self.per_s)
        self._trust = min(1.0, self._trust + passed_s / TRUST_BACK_S)

    def need(self, amount: float) -> float:
        """The level at which this may be spent."""
        return min(amount, self.capacity / LATENESS) - 1e-6

    def wait_s(self, amount: float, now: float) -> float:
        """0 when it may be spent now, else seconds until then; infinite when nothing flows in by itself."""
        self._largest = max(self._largest, amount)
        if self.per_minute is None or self._fresh:
            return 0.0
        self.flow(now)
        missing = self.need(amount) - self.level
        if missing <= 0:
            return 0.0
        return math.inf if self.leased else missing / self.per_s

    def add(self, amount: float, now: float) -> None:
        """What is spent (below 0), given back or corrected."""
        self._fresh = self._fresh and amount >= 0
        if self.per_minute is None:
            return
        self.flow(now)
        self.level += amount
        if amount < 0:
            self.spent -= amount
        elif not self.leased:
            self.level = min(self.level, self.capacity)

    def missing(self, now: float) -> float:
        """What would fill it up."""
        if self.per_minute is None:
            return 0.0
        self.flow(now)
        return self.capacity - self.level

    def at_most(self, level: float, now: float) -> None:
        """The provider's own book says that there is no more."""
        if self.per_minute is None:
            return
        self.flow(now)
        self.level = min(self.level, level)
        self._fresh = self._fresh and level > 0

    def distrust(self, now: float) -> None:
        """Refused though there should have been enough: go slower, unless a header tells the rate."""
        if self.per_minute is not None and self.heard_at is None:
            self.flow(now)
            self._trust *= TRUST_CUT


class Typical(NamedTuple):
    """Seconds of a call by the square root of its tokens, over so many calls (the last eight count most)."""

    seconds: float
    calls: int


class Latency:
    """Whether calls are slower only because there are more of them.

    Compared are calls of about the same size, with so many in flight and with half as many: when twice as many take
    `QUEUEING` times as long, hardly more gets done, and what was added only waits.
    """

    QUEUEING = 1.6
    CALLS = 4
    """Fewer of one kind say nothing."""

    def __init__(self) -> None:
        self._typical: dict[int, dict[int, Typical]] = {}

    def queues(self, tokens: int, seconds: float, company: int) -> bool:
        """Take in a call that went well with so many in flight; whether it is clear now that such calls queue."""
        size = max(1, tokens)
        half_octave = int(2 * math.log2(size))  # sizes differ by 1.4 in one class, and seconds then by less than 1.2
        by_company = self._typical.setdefault(half_octave, {})
        octave = max(2, company.bit_length())  # less than 4 in flight are one class: a server needs some to be busy
        before = by_company.get(octave, Typical(0.0, 0))
        calls = before.calls + 1
        typical = before.seconds + (seconds / math.sqrt(size) - before.seconds) / min(calls, 8)
        by_company[octave] = Typical(typical, calls)
        fewer = max((other for other in by_company if other < octave), default=None)
        if fewer is None or calls < self.CALLS:
            return False
        return typical > by_company[fewer].seconds * self.QUEUEING ** (octave - fewer)


class Permit:
    """The right to make one call. It ends in exactly one of `succeeded`, `failed`, `cancelled`."""

    def __init__(self, gate: Gate, number: int, tokens: int, now: float, *, probe: bool) -> None:
        self._gate: Gate | None = gate
        self.number = number
        self.tokens = tokens
        self.began = now
        self.probe = probe
        self.company = gate.in_flight
        self.spent = (gate.requests.spent, gate.tokens.spent)

    def succeeded(self, tokens: int, limits: RateLimits | None) -> None:
        """Answered and verified; `tokens` as billed."""
        self._end().succeeded(self, tokens, limits)

    def failed(self, error: ProviderError) -> None:
        self._end().failed(self, error)

    def cancelled(self) -> None:
        """Nothing was sent, or nobody waits for the answer any more."""
        self._end().cancelled(self)

    def _end(self) -> Gate:
        gate, self._gate = self._gate, None
        assert gate is not None, "a permit ends once"
        return gate


class Gate:
    """Whether a deployment takes a call now. `admits`, then `begin`; the permit says how the call ended.

    `paused` is the code of the failure that opened the breaker. `changed` is called when a call ended or tokens came
    in from outside: the time to ask again, as is `ready_at`. `spent` is called when less is left of the rates.
    `call_seconds`: of a typical recent call, 0 before any. `asked_until`: the provider asked to wait until then.
    """

    def __init__(
        self, clock: Clock, policy: LimitPolicy, jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        self.changed: Callable[[], None] = lambda: None
        self.spent: Callable[[], None] = lambda: None
        self.asked_until = -math.inf
        self.paused: str | None = None
        self.in_flight = 0
        self.call_seconds = 0.0
        self._clock = clock
        self._policy = policy
        self._jitter = jitter
        now = clock.monotonic()
        spread_s = 60 / CALLS_A_MINUTE
        # OpenAI says that it may hold a limit a minute against every second of it.
        self.requests = Bucket(
            policy.requests_per_minute, least_s=1.0, most_s=spread_s, largest=SPARE_REQUESTS, now=now
        )
        self.tokens = Bucket(policy.tokens_per_minute, least_s=SPARE_S, most_s=spread_s, largest=0.0, now=now)
        self._concurrency = float(min(START_CALLS, policy.max_concurrent_calls))
        self._doubling = True
        self._full_at = -math.inf
        self._decreased_at = -math.inf
        self._latency = Latency()
        self._failures_in_row = 0
        self._throttled_in_row = 0
        self._breaker_s = 0.0
        self._closed_until = -math.inf
        self._probing = False
        self._retries = RETRY_SPARE
        self._retries_at = now
        self._numbers = 0
        self._taught_by = 0

    @property
    def max_call_tokens(self) -> int | None:
        """Largest call that keeps the pace even, by local count; None: no limit is known."""
        limit = self.tokens.per_minute
        return None if limit is None else max(1, int(limit / CALLS_A_MINUTE))

    def admits(self, tokens: int, *, retry: bool = False) -> bool:
        """Whether a call of about so many tokens may begin now."""
        now = self._clock.monotonic()
        return self._has_slot() and self._open_at(tokens, retry, now) <= now

    def ready_at(self, tokens: int, *, retry: bool = False) -> float | None:
        """When it is worth to ask again (monotonic); None: when `changed` is called, or a call in flight ends."""
        at = self._open_at(tokens, retry, self._clock.monotonic())
        return at if self._has_slot() and at < math.inf else None

    def begin(self, tokens: int, *, retry: bool = False) -> Permit:
        """Take a slot and what the call will need of the rates; only after `admits`."""
        now = self._clock.monotonic()
        self.in_flight += 1
        self._numbers += 1
        if self.in_flight >= int(self._concurrency):
            self._full_at = now
        self.requests.add(-1.0, now)
        self.tokens.add(-float(tokens), now)
        self._spare_retries(now)
        if not retry:
            self._retries = min(RETRY_SPARE, self._retries + RETRY_RATIO)
        elif self.paused is None:
            self._retries -= 1.0
        permit = Permit(self, self._numbers, tokens, now, probe=self.paused is not None)
        self._probing = self._probing or permit.probe
        self.spent()
        return permit

    def lease(self, on: bool) -> None:
        """Whether the rates fill by `grant` alone, or each by itself."""
        now = self._clock.monotonic()
        for bucket in (self.requests, self.tokens):
            bucket.flow(now)
            bucket.leased = on
        self.changed()

    def grant(self, requests: float, tokens: float) -> None:
        """A slice of a shared quota."""
        now = self._clock.monotonic()
        self.requests.add(requests, now)
        self.tokens.add(tokens, now)
        if requests or tokens:
            self.changed()

    def snapshot(self) -> dict[str, float | str | None]:
        """For health: numbers with units, and why it is paused."""
        now = self._clock.monotonic()
        self.requests.flow(now)
        self.tokens.flow(now)
        limited_requests, limited_tokens = self.requests.per_minute is not None, self.tokens.per_minute is not None
        return {
            "paused": self.paused,
            "waits_s": round(max(0.0, self._closed_until - now), 3),
            "in_flight": self.in_flight,
            "concurrency": round(self._concurrency, 1),
            "call_seconds": round(self.call_seconds, 3),
            "requests_per_minute": round(self.requests.per_s * 60, 1) if limited_requests else None,
            "tokens_per_minute": round(self.tokens.per_s * 60) if limited_tokens else None,
            "requests_left": round(self.requests.level, 1) if limited_requests else None,
            "tokens_left": round(self.tokens.level) if limited_tokens else None,
            "leased": self.tokens.leased or self.requests.leased,
        }

    # --- how a permit ended

    def succeeded(self, permit: Permit, tokens: int, limits: RateLimits | None) -> None:
        now = self._clock.monotonic()
        seconds = now - permit.began
        self.call_seconds = seconds if self.call_seconds == 0 else self.call_seconds + (seconds - self.call_seconds) / 5
        # No account lets a call use more than a minute's worth: a mistaken bill must not stop all for days.
        most = permit.tokens + (self.tokens.per_minute or 0.0)
        self.tokens.add(permit.tokens - min(float(tokens), most), now)
        self._learn(permit, limits, now)
        self._well()
        self._throttled_in_row = 0
        if self._latency.queues(tokens, seconds, max(permit.company, self.in_flight)):
            self._slow_down(permit, now, least=QUEUE_CALLS)
        elif permit.began <= self._full_at:  # nothing but the concurrency held calls up meanwhile
            step = 1.0 if self._doubling else 1.0 / self._concurrency
            self._concurrency = min(float(self._policy.max_concurrent_calls), self._concurrency + step)
        self._leave(permit)

    def failed(self, permit: Permit, error: ProviderError) -> None:
        now = self._clock.monotonic()
        unanswered = error.code in {"timeout", "no_connection"}
        if error.code == "no_connection" or not (unanswered or isinstance(error, ProviderTransient)):
            # Refused, so nothing was embedded. The request counts all the same (OpenAI says so), unless none arrived.
            self.tokens.add(float(permit.tokens), now)
        if error.code == "no_connection":
            self.requests.add(1.0, now)
        self._learn(permit, error.limits, now)
        if isinstance(error, InputRejected | CallTooLarge | ModelRejected) and not unanswered:
            self._well()
        else:
            if isinstance(error, ProviderThrottled):
                self._throttled(permit, error, now)
            if isinstance(error, ProviderThrottled) or error.code in _OVERLOADED:
                self._slow_down(permit, now, least=1)
            self._count_failure(permit, error, now)
        self.spent()
        self._leave(permit)

    def cancelled(self, permit: Permit) -> None:
        now = self._clock.monotonic()
        self.requests.add(1.0, now)
        self.tokens.add(float(permit.tokens), now)
        self._leave(permit)

    def _leave(self, permit: Permit) -> None:
        self.in_flight -= 1
        if permit.probe:
            self._probing = False
        self.changed()

    # --- calls in flight, and the breaker

    def _has_slot(self) -> bool:
        return not self._probing if self.paused is not None else self.in_flight < int(self._concurrency)

    def _open_at(self, tokens: int, retry: bool, now: float) -> float:
        """When all but the concurrency allows such a call; infinite: not by the passing of time."""
        wait_s = max(self.requests.wait_s(1.0, now), self.tokens.wait_s(float(tokens), now))
        if retry and self.paused is None:
            self._spare_retries(now)
            wait_s = max(wait_s, (1.0 - self._retries) / RETRY_PER_S)
        if wait_s == math.inf:
            self.spent()  # a slice for so large a call may not have been asked for yet
        return max(now + wait_s, self._closed_until)

    def _spare_retries(self, now: float) -> None:
        passed_s, self._retries_at = now - self._retries_at, now
        self._retries = min(RETRY_SPARE, self._retries + passed_s * RETRY_PER_S)

    def _slow_down(self, permit: Permit, now: float, *, least: int) -> None:
        """Once a round trip: what began before the last decrease says nothing of what came of it."""
        if permit.began <= self._decreased_at:
            return
        self._concurrency = max(float(min(least, self._concurrency)), self._concurrency * DECREASE)
        self._decreased_at = now
        self._doubling = False

    def _well(self) -> None:
        """The provider works, whatever it thinks of this call."""
        self._failures_in_row = 0
        if self.paused is not None:
            self.paused = None
            self._probing = False
            self._breaker_s = 0.0

    def _count_failure(self, permit: Permit, error: ProviderError, now: float) -> None:
        self._failures_in_row += 1
        if self.paused is None:
            if not isinstance(error, ProviderPaused) and self._failures_in_row < BREAKER_FAILURES:
                return
            self._breaker_s = self._policy.retry_initial_s
        elif permit.probe:
            self._breaker_s = min(self._breaker_s * 2, self._policy.retry_max_s)
        else:  # it began before the breaker opened
            return
        self.paused = error.code
        self._closed_until = max(self._closed_until, now + self._jitter(0.0, self._breaker_s))

    # --- rates

    def _throttled(self, permit: Permit, error: ProviderThrottled, now: float) -> None:
        self._throttled_in_row += 1
        policy, said_s = self._policy, error.retry_after_s
        if permit.began > self._decreased_at:  # once a round trip, as the concurrency
            self.requests.distrust(now)
            self.tokens.distrust(now)
        if said_s is not None and 0 <= said_s < math.inf:
            wait_s = min(said_s, policy.retry_after_max_s)
            # When the wait is over the provider has room for just this call: our book says the same then.
            self.tokens.at_most(permit.tokens - self.tokens.per_s * wait_s, now)
            self.asked_until = max(self.asked_until, now + wait_s)
            wait_s += self._jitter(0.0, WAIT_JITTER_S)
        else:
            doublings = min(self._throttled_in_row - 1, 30)
            wait_s = self._jitter(0.0, min(policy.retry_initial_s * 2**doublings, policy.retry_max_s))
            self.tokens.at_most(0.0, now)
        self._closed_until = max(self._closed_until, now + wait_s)

    def _learn(self, permit: Permit, limits: RateLimits | None, now: float) -> None:
        """Take the headers' word for the account, unless a call that began later has been heard already."""
        if limits is None or permit.number < self._taught_by:
            return
        self._taught_by = permit.number
        for bucket, limit, remaining, spent in (
            (self.requests, limits.requests_per_minute, limits.remaining_requests, permit.spent[0]),
            (self.tokens, limits.tokens_per_minute, limits.remaining_tokens, permit.spent[1]),
        ):
            if limit is not None and 0 < limit < math.inf:
                bucket.tell(limit * self._policy.share, now, now)
            if remaining is not None and 0 <= remaining < math.inf and not bucket.leased:
                # It was counted when the call arrived: since then others were spent, and some came in.
                since = bucket.per_s * (now - permit.began) - (bucket.spent - spent)
                bucket.at_most(remaining * self._policy.share + since, now)
