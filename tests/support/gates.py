"""Gates in virtual time: a clock that a test moves, and simulated providers with a backlog of calls before them."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from processor.errors import ProviderError, ProviderThrottled, RateLimits
from processor.limits import Gate, LimitPolicy


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def now_ms(self) -> int:
        return int(self.now * 1000)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("the gate never sleeps")


def a_gate(clock: Clock | None = None, **policy: Any) -> Gate:
    """With no luck: a backoff takes all of its time."""
    return Gate(clock or Clock(), LimitPolicy(**({"max_concurrent_calls": 16} | policy)), lambda low, high: high)


def a_gate_where_tokens_gathered(clock: Clock, tokens: int) -> Gate:
    """For a call of so many: idle for long enough since its first call."""
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    gate.admits(tokens)
    gate.begin(1).cancelled()
    clock.now += 10
    return gate


def throttled(retry_after_s: float | None) -> ProviderThrottled:
    return ProviderThrottled("rate_limited", http_status=429, retry_after_s=retry_after_s)


Answer = RateLimits | ProviderError | None
Provider = Callable[[float, int, int], tuple[float, Answer]]
"""(now, tokens, calls in flight with this one) -> seconds it takes, and its headers or its error."""


@dataclass
class Simulation:
    """A backlog of calls of these sizes before gates of one provider, which makes them as soon as a gate lets it."""

    clock: Clock
    gates: Sequence[Gate]
    provider: Provider
    sizes: Sequence[int] = (1000,)
    began: list[tuple[float, int]] = field(default_factory=list)
    refused: list[tuple[float, int]] = field(default_factory=list)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._sizes = itertools.cycle(self.sizes)
        self._turns = itertools.count()
        self._next = [next(self._sizes) for _ in self.gates]
        self._ends: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while True:
            wakes: list[float] = []
            for i, gate in enumerate(self.gates):
                while gate.admits(self._next[i]):
                    self._call(gate, self._next[i])
                    self._next[i] = next(self._sizes)
                ready_at = gate.ready_at(self._next[i])
                if ready_at is not None:
                    assert ready_at > self.clock.now, "ready now, and yet it admits nothing"
                    wakes.append(ready_at)
            if self._ends:
                wakes.append(self._ends[0][0])
            if min(wakes) > until:
                self.clock.now = until
                return
            self.clock.now = min(wakes)
            while self._ends and self._ends[0][0] <= self.clock.now:
                heapq.heappop(self._ends)[2]()

    def _call(self, gate: Gate, tokens: int) -> None:
        permit = gate.begin(tokens)
        in_flight = sum(gate.in_flight for gate in self.gates)
        self.most_in_flight = max(self.most_in_flight, in_flight)
        seconds, answer = self.provider(self.clock.now, tokens, in_flight)

        def end() -> None:
            if isinstance(answer, ProviderError):
                permit.failed(answer)
            else:
                permit.succeeded(tokens, answer)

        (self.refused if isinstance(answer, ProviderError) else self.began).append((self.clock.now, tokens))
        heapq.heappush(self._ends, (self.clock.now + seconds, next(self._turns), end))

    def tokens(self, since: float) -> int:
        return sum(tokens for at, tokens in self.began if at >= since)


class Account:
    """A provider with buckets: `burst_s` of the rate at once, refusals with a Retry-After, headers if it has them."""

    def __init__(
        self,
        clock: Clock,
        *,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float,
        burst_s: float = 60.0,
        headers: bool = True,
        retry_after: bool = True,
        seconds: float = 1.0,
        network_s: float = 0.0,
    ) -> None:
        self.rates = [requests_per_minute / 60, tokens_per_minute / 60]
        self.burst_s = burst_s
        self.headers = headers
        self.retry_after = retry_after
        self.seconds = seconds
        self.network_s = network_s
        self.dice = random.Random(1)
        self.at = clock.now
        self.levels = [self.capacity(0), self.capacity(1)]

    def capacity(self, i: int) -> float:
        return max(1.0, self.rates[i] * self.burst_s)

    def change(self, part: float) -> None:
        """The limits are so much of what they were; what was used stays used."""
        used = [self.capacity(i) - self.levels[i] for i in (0, 1)]
        self.rates = [rate * part for rate in self.rates]
        self.levels = [max(0.0, self.capacity(i) - used[i]) if used[i] < math.inf else math.inf for i in (0, 1)]

    def __call__(self, now: float, tokens: int, in_flight: int) -> tuple[float, Answer]:
        arrives = max(self.at, now + self.network_s * self.dice.random())
        for i in (0, 1):
            self.levels[i] = min(self.capacity(i), self.levels[i] + (arrives - self.at) * self.rates[i])
        self.at = arrives
        amounts = (1.0, float(tokens))
        waits = [(min(a, self.capacity(i)) - self.levels[i]) / self.rates[i] for i, a in enumerate(amounts)]
        if max(waits) > 0:
            self.levels[0] = max(0.0, self.levels[0] - 1)
            error = ProviderThrottled(
                "rate_limited", http_status=429, retry_after_s=max(waits) if self.retry_after else None
            )
            error.limits = self.told()
            return 0.05, error
        self.levels = [level - amount for level, amount in zip(self.levels, amounts, strict=True)]
        return self.seconds, self.told()

    def told(self) -> RateLimits | None:
        if not self.headers:
            return None
        requests = self.rates[0] * 60
        return RateLimits(
            requests if requests < math.inf else None,
            self.rates[1] * 60,
            max(0.0, self.levels[0]) if requests < math.inf else None,
            max(0.0, self.levels[1]),
        )


def steady(seconds_a_call: float) -> Provider:
    return lambda now, tokens, in_flight: (seconds_a_call, None)
