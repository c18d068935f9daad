"""The aggregator's nouns: totals, task progress, the ledger's fold, a document's vectors, and where each fold stands.

As in `domain`, nothing here does I/O or reads a clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from processor.domain import CallOutcome

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class UsageSums:
    """Running sums of a bucket. Unpriced billed tokens are summed apart from cost (None costs add nothing)."""

    requests: int = 0
    billed_texts: int = 0
    billed_tokens: int = 0
    billed_characters: int = 0
    billed_cost_nanos: int = 0
    saved_texts: int = 0
    saved_tokens: int = 0
    saved_characters: int = 0
    saved_cost_nanos: int = 0
    unpriced_tokens: int = 0
    failed_texts: int = 0
    cached_texts: int = 0


class BucketKey(NamedTuple):
    """`bucket` is a UTC day "2026-11-21" or month "2026-11"; dimension: all, model, operation, agent, collection."""

    payer_id: str
    bucket: str
    dimension: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotal:
    """One `token-usage-totals` record: the bucket's sums per usage partition, each with its last folded offset.

    The published total is the sum over `partitions`; a payer's events normally lie in one partition.
    """

    key: BucketKey
    partitions: Mapping[int, tuple[int, UsageSums]]
    """partition -> (last_offset, sums)"""
    updated_at_ms: int


class PublishedTotal(NamedTuple):
    """A `token-usage-totals` record as it was read, and the sums that it says are those of all its partitions."""

    total: UsageTotal
    stated: UsageSums


class TaskKey(NamedTuple):
    tenant_id: str
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """Progress of a `task_id` from the first copies of its usage events."""

    tenant_id: str
    task_id: str
    done: int
    failed: int
    total: int | None
    updated_at_ms: int


EVERYBODY_ELSE = ""
"""In place of a payer: whoever has no budget of its own, and has spent nothing of the default one yet."""


class BudgetKey(NamedTuple):
    """`month` is a UTC month "2026-11"."""

    payer_id: str
    month: str


def month_of(at_ms: int) -> str:
    """The UTC month that a charge of that time counts in."""
    return _month(at_ms // _DAY_MS)


@lru_cache(maxsize=512)
def _month(day: int) -> str:
    return f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m}"


def budget_key_of(key: bytes | None) -> BudgetKey | None:
    """Whose state a key of the budgets topic stands for; None when it is none of ours."""
    texts = texts_of_key(key, len(BudgetKey._fields))
    return None if texts is None else BudgetKey(*texts)


def texts_of_key(key: bytes | None, count: int) -> list[str] | None:
    """What a key of ours is made of: a JSON array of `count` texts. None for anything else, whoever wrote it."""
    try:
        texts = json.loads(key or b"")
        "".join(texts).encode()  # half of a surrogate pair could be escaped in it, and never be written again
    except (ValueError, TypeError, RecursionError):
        return None
    return texts if isinstance(texts, list) and len(texts) == count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a payer may spend in one UTC month; None: no such limit. `hard`: texts beyond it are refused."""

    max_tokens: int | None
    max_cost_nanos: int | None
    hard: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """Which payer has which budget; `default` is that of payers who are not named, None: they have none."""

    named: Mapping[str, Budget] = field(default_factory=dict)
    default: Budget | None = None

    def of(self, payer_id: str) -> Budget | None:
        return self.named.get(payer_id, self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetState:
    """One `usage-budgets` record: a payer's month against its budget, as far as the aggregator has folded.

    `reached_percent` is the highest of 0, 50, 80 and 100 that either limit has reached. Tokens without a price are in
    `unpriced_tokens`, and in no cost.
    """

    key: BudgetKey
    budget: Budget
    billed_tokens: int
    billed_cost_nanos: int
    unpriced_tokens: int
    reached_percent: int
    updated_at_ms: int

    @property
    def refuses(self) -> bool:
        """Whether texts of this month are refused."""
        return self.budget.hard and self.reached_percent >= 100


class Cursor(NamedTuple):
    """Where the aggregator's fold of one partition stands, and what tells its topic from one made again.

    The last folded record is named by its offset, append time and CRC-32 of key and value. Records appended up to
    `seen_only_until_ms` only fill `seen`: the head of their log has expired, so a first copy can't be told there.
    """

    next_offset: int
    last_offset: int
    last_append_ms: int
    last_crc: int
    seen_only_until_ms: int | None = None


class Seen(NamedTuple):
    """A usage event's charge: the offset of its first copy, and the append time of its last one."""

    offset: int
    last_ms: int


class Attempt(NamedTuple):
    """What the ledger knows of one attempt (U6): its intent and receipt, if read, and what charges name of it.

    `attributed_tokens` is the sum of parts over first copies; `confirm_by_ms` is None before the intent was read.
    """

    last_ms: int = 0
    confirm_by_ms: int | None = None
    estimated_tokens: int = 0
    price_nanos_per_million: int | None = None
    outcome: CallOutcome | None = None
    billed_tokens: int = 0
    attributed_tokens: int = 0


class Ledger(NamedTuple):
    """Running sums over all attempts whose residual does not depend on the clock; one attempt's share looks alike.

    `unmatched_tokens` are named by charges whose attempt has neither intent nor receipt yet. `unconfirmed_*` are of
    attempts too old to keep, and `recovered_*` of those among them that charges name: their receipt was lost, not their
    vectors. Residual tokens without a price are in `unpriced_tokens` besides.
    """

    attempts: int = 0
    billed_tokens: int = 0
    attributed_tokens: int = 0
    waste_attempts: int = 0
    waste_tokens: int = 0
    waste_cost_nanos: int = 0
    uncharged_attempts: int = 0
    uncharged_tokens: int = 0
    uncharged_cost_nanos: int = 0
    unconfirmed_attempts: int = 0
    unconfirmed_max_tokens: int = 0
    unconfirmed_max_cost_nanos: int = 0
    unpriced_tokens: int = 0
    over_attributed_attempts: int = 0
    over_attributed_tokens: int = 0
    unmatched_tokens: int = 0
    recovered_attempts: int = 0
    recovered_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSummary:
    """The ledger at one moment. `sums` holds the unconfirmed too; `in_flight` attempts may still get a receipt."""

    sums: Ledger
    in_flight_attempts: int

    @property
    def residual_tokens(self) -> int:
        """Billed to nobody: exact where receipts exist, the upper bound of what is unconfirmed elsewhere."""
        return self.sums.waste_tokens + self.sums.uncharged_tokens + self.sums.unconfirmed_max_tokens


class DocumentKey(NamedTuple):
    tenant_id: str
    collection: str | None
    document_id: str


@dataclass(frozen=True, slots=True)
class DocumentVectors:
    """The vector ids (16 bytes each) that a document's newest manifest names, and the stale ones not yet deleted."""

    source_version: str
    live: frozenset[bytes] = field(repr=False)
    stale: frozenset[bytes] = field(default=frozenset(), repr=False)
