"""What an audit finds: the classes of residuals, what must never be, and the sums of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from processor.accounts import BucketKey, BudgetKey, TaskKey
from processor.usage import cost_nanos


class Residual(StrEnum):
    """Tokens of attempts that no charge names, by why (docs/audit.md). Each is explained: none makes an audit fail."""

    WASTE = "waste"
    REWORK = "rework"
    LATE = "late"
    UNCLAIMED = "unclaimed"
    EXPIRED = "expired"
    UNCONFIRMED = "unconfirmed"
    IN_FLIGHT = "in_flight"


class Breach(StrEnum):
    """What no run of the protocol can end in. Each makes an audit fail."""

    OVER_ATTRIBUTED = "over_attributed"
    SHARE_DIFFERS = "share_differs"
    CHARGED_TWICE = "charged_twice"
    UNMATCHED = "unmatched"
    LATE_MISSING = "late_missing"
    PARTS_DIFFER = "parts_differ"
    COST_DIFFERS = "cost_differs"


@dataclass(slots=True)
class Line:
    """One class of the ledger. `cost_nanos` is of the tokens that have a price; the others are in `unpriced_tokens`."""

    attempts: int = 0
    tokens: int = 0
    cost_nanos: int = 0
    unpriced_tokens: int = 0

    def add(self, tokens: int, price: int | None, attempts: int = 1) -> None:
        cost = cost_nanos(tokens, price)
        self.attempts += attempts
        self.tokens += tokens
        self.cost_nanos += cost or 0
        self.unpriced_tokens += tokens if cost is None else 0


class Finding(NamedTuple):
    """A residual or a breach of one attempt, or of one request whose charge contradicts itself."""

    kind: Residual | Breach
    attempt_id: str
    request_id: str
    tokens: int
    cost_nanos: int | None
    at_ms: int
    provider: str


class Difference(NamedTuple):
    """A sum of a published total that is not what the log says, in one usage partition; `partition` None: one that the
    record gives as that of all its partitions, and is not."""

    key: BucketKey
    partition: int | None
    name: str
    published: int
    recomputed: int


class BudgetDifference(NamedTuple):
    """A published budget state that is not what the charges of its month come to, or not that of its key."""

    key: BudgetKey
    name: str
    published: int | str
    recomputed: int | str


class TaskDifference(NamedTuple):
    """Published progress of a task that is not what its charges come to, or not that of its key."""

    key: TaskKey
    name: str
    published: int | str | None
    recomputed: int | str | None


@dataclass(slots=True)
class TotalsCheck:
    """Of the published buckets. `equal` are all that agree; of these `proven` ones can have no other value.

    `not_provable`: the log has lost what they were made of, or what tells their first copies.
    """

    buckets: int = 0
    proven: int = 0
    equal: int = 0
    not_provable: int = 0
    differences: list[Difference] = field(default_factory=list)


@dataclass(slots=True)
class UsageCheck:
    """Of the retained usage events. `others` have a token type that is not totalled; `not_folded` charges are waiting
    for the aggregator."""

    events: int = 0
    charges: int = 0
    duplicates: int = 0
    late: Line = field(default_factory=Line)
    others: int = 0
    not_folded: int = 0


@dataclass(slots=True)
class BudgetsCheck:
    """Of the published states. `compared`: everything was folded, so that their amounts must be those of the log; else
    they may be less."""

    states: int = 0
    compared: bool = True
    differences: list[BudgetDifference] = field(default_factory=list)


@dataclass(slots=True)
class TasksCheck:
    """Of the tasks that are published or should be. `proven`: the progress is right and can be no other."""

    tasks: int = 0
    proven: int = 0
    differences: list[TaskDifference] = field(default_factory=list)


@dataclass(slots=True)
class LedgerCheck:
    """`billed` of receipts = `attributed` of receipts + residuals of receipts - over-attributed. Without a receipt an
    attempt that charges name is `recovered`, and what it may have cost beyond that is unconfirmed or in flight."""

    billed: Line = field(default_factory=Line)
    attributed: Line = field(default_factory=Line)
    recovered: Line = field(default_factory=Line)
    failed_attempts: int = 0
    residuals: dict[Residual, Line] = field(default_factory=lambda: {each: Line() for each in Residual})
    breaches: dict[Breach, Line] = field(default_factory=lambda: {each: Line() for each in Breach})
    findings: list[Finding] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        """Whether billed = attributed + residuals where receipts exist."""
        of_receipts = set(Residual) - {Residual.UNCONFIRMED, Residual.IN_FLIGHT}
        residual = sum(self.residuals[each].tokens for each in of_receipts)
        over = self.breaches[Breach.OVER_ATTRIBUTED].tokens
        return self.billed.tokens == self.attributed.tokens + residual - over


def sentences(findings: Sequence[Finding]) -> Iterator[str]:
    """Each finding for people."""
    for finding in findings:
        named = f"attempt {finding.attempt_id}" if finding.attempt_id else f"request {finding.request_id}"
        when = datetime.fromtimestamp(finding.at_ms / 1000, UTC).isoformat(timespec="seconds") if finding.at_ms else ""
        yield " ".join(filter(None, (f"{finding.kind}:", named, f"{finding.tokens:,} tokens", finding.provider, when)))
