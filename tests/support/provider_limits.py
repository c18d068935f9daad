"""The limits of a provider's account, as OpenAI documents them: buckets that refill all the time, and what headers say.

A bucket holds a minute's worth. A request takes one from the first and its tokens from the second; one that is refused
counts as a request all the same, so asking again and again is no way through.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None: unlimited. With `time_scale` 10 a minute lasts 6 seconds; headers then speak of ten times the limit.

    `burst` is the part of a minute's limit that a bucket holds: 1 / 60 allows no more in a second than a sixtieth.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    time_scale: float = 1.0
    burst: float = 1.0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "time_scale", "burst"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: must be above 0")


class Refusal(NamedTuple):
    """Which limit a request met, and when it would pass. `wait_s` None: never, it is over the limit itself."""

    of: str
    limit: float
    used: float
    requested: float
    wait_s: float | None

    def __str__(self) -> str:
        kind, short = ("tokens", "TPM") if self.of == "tokens" else ("requests", "RPM")
        figures = f"Limit {self.limit:.0f}, Requested {self.requested:.0f}"
        if self.wait_s is None:
            return f"Request too large for the model in organization org-tests on {kind} per min ({short}): {figures}."
        return (
            f"Rate limit reached for the model in organization org-tests on {kind} per min ({short}): "
            f"Limit {self.limit:.0f}, Used {self.used:.0f}, Requested {self.requested:.0f}. "
            f"Please try again in {duration(self.wait_s)}."
        )


class Bucket:
    """`per_s` units flow in, up to `capacity`; it is full at first. A take over the capacity leaves a debt."""

    def __init__(self, per_s: float, capacity: float, now_s: float) -> None:
        self.per_s = per_s
        self.capacity = capacity
        self.level = capacity
        self._at = now_s

    def flow(self, now_s: float) -> None:
        self.level = min(self.capacity, self.level + (now_s - self._at) * self.per_s)
        self._at = now_s

    def wait_s(self, units: float) -> float:
        """0 when it can be taken, else seconds until then."""
        return max(0.0, min(units, self.capacity) - self.level) / self.per_s


class Account:
    """What is left of the limits, and the headers that tell."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """New limits from now on. What was used stays used, as far as it still fits."""
        now_s = self._clock()
        self.limits = limits
        before, self._buckets = self._buckets, {}
        for name, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is None:
                continue
            bucket = Bucket(limit * limits.time_scale / 60, max(1.0, limit * limits.burst), now_s)
            if name in before:
                before[name].flow(now_s)
                bucket.level = max(0.0, bucket.capacity - (before[name].capacity - before[name].level))
            self._buckets[name] = bucket

    def admit(self, tokens: int) -> Refusal | None:
        """Takes the request from the buckets, or says which of them refuses it."""
        now_s = self._clock()
        refusal = None
        for name, bucket in self._buckets.items():
            bucket.flow(now_s)
            units = tokens if name == "tokens" else 1
            limit = bucket.per_s * 60
            if units > limit / self.limits.time_scale:
                refusal = Refusal(name, limit, 0.0, units, None)
            elif refusal is None and bucket.level < min(units, bucket.capacity):
                used = bucket.capacity - bucket.level
                refusal = Refusal(name, limit, used, units, bucket.wait_s(units))
        requests, of_tokens = self._buckets.get("requests"), self._buckets.get("tokens")
        if requests is not None:
            requests.level = requests.level - 1 if refusal is None else max(0.0, requests.level - 1)
        if of_tokens is not None and refusal is None:
            of_tokens.level -= tokens
        return refusal

    def headers(self) -> dict[str, str]:
        """x-ratelimit-*: limits per minute, what is left now, and the time until all of it is back."""
        told = {}
        now_s = self._clock()
        for name, bucket in self._buckets.items():
            bucket.flow(now_s)
            told[f"x-ratelimit-limit-{name}"] = str(math.floor(bucket.per_s * 60 + 1e-6))
            told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{name}"] = duration((bucket.capacity - bucket.level) / bucket.per_s)
        return told


def duration(seconds: float) -> str:
    """As these headers write it: 12ms, 1.5s, 6m0s, 1h0m3.25s."""
    thousandths = math.ceil(seconds * 1000 - 1e-6)
    if thousandths < 1000:
        return f"{thousandths}ms" if thousandths else "0s"
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    of_seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{of_seconds}"
    return f"{minutes}m{of_seconds}" if minutes else of_seconds
