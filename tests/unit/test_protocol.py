"""The protocol of usage under replays on random schedules, and the naive variants that the same checker must catch.

PROTOCOL_SCHEDULES says how many (20,000 are not too many), PROTOCOL_SEED which is the first.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest

from processor.accounts import BucketKey, UsageSums, UsageTotal
from processor.domain import Usage
from tests.support import audit
from tests.support.far_ends import Emission, Hazards
from tests.support.schedules import CALM, SHARED, STEADY, WILD, Ended, World, check

SCHEDULES = int(os.environ.get("PROTOCOL_SCHEDULES", "300"))
FIRST = int(os.environ.get("PROTOCOL_SEED", "1"))
SEEDS = range(FIRST, FIRST + SCHEDULES)
CALM_SEEDS = SEEDS[: max(1, SCHEDULES // 3)]
SHARED_SEEDS = SEEDS[: max(1, SCHEDULES // 6)]
STEADY_SEEDS = SEEDS[: max(1, SCHEDULES // 3)]
CONTROL_SEEDS = SEEDS[:40]


def played(seed: int, hazards: Hazards, emission: Emission | None = None) -> Ended:
    return asyncio.run(World(seed, hazards, emission).run())


@cache
def residuals_of(seed: int, hazards: Hazards) -> Counter[str]:
    """Of a schedule that keeps every law; a failure says how to see it again."""
    try:
        ended = played(seed, hazards)
        residuals = check(ended)
        if hazards is CALM:
            audit.check_nothing_paid_twice(ended.books, residuals)
        if hazards is STEADY:
            audit.check_decided_once(ended.books)
    except AssertionError as error:
        again = f"PROTOCOL_SEED={seed} PROTOCOL_SCHEDULES=1 pytest {__file__}"
        raise AssertionError(f"schedule {seed} breaks a law: {error}\nagain: {again}") from error
    classes = Counter({name: getattr(residuals, name) for name in ("billed", "attributed", *audit.CLASSES)})
    charges = ended.books.charges()
    refused = {usage.request_id for _, usage, _ in charges if audit.refuses(usage)}
    served = {usage.request_id for _, usage, _ in charges if not audit.refuses(usage)}
    return classes + Counter(
        recovered=residuals.recovered_attempts,
        refused=len(refused),
        copies=len(ended.books.usage) - len(charges),
        refused_and_served=len(refused & served),
    )


def test_whatever_goes_wrong_the_bill_adds_up() -> None:
    """U1 to U7 and laws 1 to 5 hold with crashes, zombies, lost caches, replays, duplicates, a provider that fails."""
    seen = sum((residuals_of(seed, WILD) for seed in SEEDS), Counter[str]())
    print(dict(seen))
    if SCHEDULES >= 100:  # else the schedules would be too kind to prove anything
        names = ("copies", "waste", "rework", "unconfirmed", "recovered", "refused_and_served")
        assert min(seen[name] for name in names) > 0


def test_with_the_cache_kept_nothing_is_paid_twice() -> None:
    """U7: no zombies, no two workers on one key: every good answer is charged whole, and copies agree."""
    seen = sum((residuals_of(seed, CALM) for seed in CALM_SEEDS), Counter[str]())
    print(dict(seen))
    assert seen["rework"] == seen["late"] == seen["unclaimed"] == 0
    if SCHEDULES >= 300:
        assert min(seen[name] for name in ("copies", "waste", "unconfirmed")) > 0


def test_nobody_pays_for_half_a_request() -> None:
    """Deadline and budget are decided once for a request, while the budget is spent and raised and calls fail."""
    seen = sum((residuals_of(seed, STEADY) for seed in STEADY_SEEDS), Counter[str]())
    print(dict(seen))
    if SCHEDULES >= 100:
        assert min(seen["refused"], seen["attributed"]) > 0


def test_a_cache_that_tenants_share_bills_nobody_twice() -> None:
    """U2, U3 over tenants: the bill adds up whoever asks first; by default no tenant gets what another paid for."""
    seen = sum((residuals_of(seed, SHARED) for seed in SHARED_SEEDS), Counter[str]())
    assert seen["attributed"] > 0
    if SCHEDULES >= 100:
        assert any(crosses_tenants(played(seed, SHARED)) for seed in SHARED_SEEDS)
        assert not any(crosses_tenants(played(seed, WILD)) for seed in SHARED_SEEDS[:10])


def crosses_tenants(ended: Ended) -> bool:
    """Whether a tenant was given what only another one has paid for."""
    try:
        audit.check_shares(replace(ended.books, shared_cache=False))
    except AssertionError:
        return True
    return False


def test_a_schedule_is_played_the_same_way_again() -> None:
    """A seed that fails can be looked at."""
    one, other = (played(FIRST, WILD).books for _ in range(2))
    assert [record for record, _ in one.usage] == [record for record, _ in other.usage]
    assert [record for record, _ in one.calls] == [record for record, _ in other.calls]


class DropIfSeen(Emission):
    """A worker keeps which requests it has charged, over restarts, and says nothing of them again."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Usage] = {}

    def sends(self, worker: str, usage: Usage) -> bool:
        return self._seen.setdefault((worker, usage.request_id), usage) is usage


class KeyWithAttempt(Emission):
    """Copies are known by what was paid for them as well: another attempt, another charge."""

    def key_of(self, usage: Usage) -> str:
        return f"{usage.request_id} {sorted(part.attempt_id for part in usage.parts)}"


class KeyOfTheRequestAlone(Emission):
    """A refusal has the request's key too, and so is the charge of whoever is served later."""

    def key_of(self, usage: Usage) -> str:
        return usage.request_id


class ClaimInRedis(Emission):
    """SETNX before the event is produced: whoever is first sends it."""

    def __init__(self) -> None:
        self._claims: dict[str, Usage] = {}

    def sends(self, worker: str, usage: Usage) -> bool:
        return self._claims.setdefault(usage.request_id, usage) is usage


class CounterInRedis(Emission):
    """INCRBY once an event is acknowledged."""

    def __init__(self) -> None:
        self._counters: defaultdict[BucketKey, Counter[str]] = defaultdict(Counter)

    def acknowledged(self, usage: Usage) -> None:
        for key in audit.buckets(usage):
            self._counters[key].update(audit.amounts(usage))

    def totals(self, published: Mapping[BucketKey, UsageTotal]) -> dict[BucketKey, UsageTotal]:
        return {
            key: UsageTotal(key=key, partitions={0: (0, UsageSums(**sums))}, updated_at_ms=0)
            for key, sums in self._counters.items()
        }


@pytest.mark.parametrize(
    "naive,finding",
    [
        (DropIfSeen, "requests without charge"),
        (KeyWithAttempt, "requests charged more than once"),
        (KeyOfTheRequestAlone, "charged as refused"),
        (ClaimInRedis, "requests without charge"),
        (CounterInRedis, "requests"),
    ],
)
def test_the_checker_catches_what_is_simpler(naive: type[Emission], finding: str) -> None:
    """Negative controls: on schedules that the protocol passes, each naive variant loses or doubles a charge."""
    caught = Counter[str]()
    for seed in CONTROL_SEEDS:
        residuals_of(seed, WILD)
        try:
            check(played(seed, WILD, naive()))
        except AssertionError as error:
            caught[str(error).split("\n")[0]] += 1
    print(f"{naive.__name__}: caught in {caught.total()} of {len(CONTROL_SEEDS)} schedules")
    assert any(finding in found for found in caught), caught
