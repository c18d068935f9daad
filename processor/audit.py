"""The audit's recomputation: totals and ledger once more, from the retained logs, with a set.

It shares with the aggregator what a bucket and its sums are, and nothing of its fold or store. Usage is taken first,
then calls: whatever charges name has its intent by then.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import add
from typing import NamedTuple

from processor.accounts import (
    EVERYBODY_ELSE,
    BucketKey,
    BudgetKey,
    BudgetState,
    PublishedTotal,
    TaskKey,
    TaskProgress,
)
from processor.aggregate import (
    DAY_MS,
    NO_SUMS,
    SPARE_RETENTION_MS,
    SUM_NAMES,
    PartitionTotals,
    buckets_of,
    seen_only_until,
    sums_as_tuple,
    sums_of,
)
from processor.domain import CallKind, CallOutcome, ProviderCall, Source, TokenType, Usage
from processor.findings import (
    Breach,
    BudgetsCheck,
    Difference,
    Finding,
    LedgerCheck,
    Residual,
    TasksCheck,
    TotalsCheck,
    UsageCheck,
)
from processor.invoice import Bills
from processor.recount import AMOUNTS, Spent, Tasks, differences, month
from processor.shares import Intent, Key, beside_shares, debtor, intent_of, packed, shares_of, tokens_of, unpacked
from processor.usage import cost_nanos

NONE, CLOSED = array("q"), array("q")
"""In place of what charges name of an attempt, once its receipt was judged."""

NEVER = 2**63 - 1
"""Milliseconds: whatever is published of a period that begins then is a difference."""


class Extent(NamedTuple):
    """The retained log of a partition: offsets `begin` up to, not including, `end`; append time of its first record."""

    begin: int
    end: int
    first_ms: int | None = None

    def complete_from_ms(self, now_ms: int) -> int:
        """From when on nothing appended here has expired; 0: nothing at all. A day is spared for brokers' clocks."""
        if self.begin == 0:
            return 0
        return now_ms - SPARE_RETENTION_MS if self.first_ms is None else self.first_ms + DAY_MS


class FirstCopies:
    """Tells charges from copies: a copy is one if the previous copy of its key stands at most two horizons before it.

    About 150 bytes a key.
    """

    def __init__(self, horizon_ms: int) -> None:
        self._apart_ms = 2 * horizon_ms
        self._last_ms: defaultdict[int, dict[Key, int]] = defaultdict(dict)

    def take(self, partition: int, key: Key, append_ms: int) -> bool:
        """Whether this copy, the next one of its partition in offset order, is a charge."""
        last_ms = self._last_ms[partition]
        known = last_ms.get(key)
        if known is not None and append_ms <= known + self._apart_ms:
            if append_ms > known:  # a new partition leader's clock may stand behind the old one's
                last_ms[key] = append_ms
            return False
        last_ms[key] = append_ms
        return True

    def elsewhere(self, partition: int, key: Key, append_ms: int) -> bool:
        """Whether a copy so near stands in another partition, where no reader takes it for one."""
        return any(
            key in last_ms and abs(append_ms - last_ms[key]) <= self._apart_ms
            for other, last_ms in self._last_ms.items()
            if other != partition
        )

    def __contains__(self, key: Key) -> bool:
        return any(key in keys for keys in self._last_ms.values())


class Audit:
    """Takes the retained usage events, then what was quarantined of them, then the calls, each partition in offset
    order; then the checks can be read.

    `folded_to` (usage partition -> the aggregator's committed offset) must have been read first, then what is
    published, then the extents of the logs. `newest`: of each bucket the newest record. `token_types`: those that are
    totalled, None for all.
    """

    def __init__(
        self,
        *,
        published: Mapping[BucketKey, PartitionTotals],
        newest: Mapping[BucketKey, PublishedTotal],
        progress: Mapping[TaskKey, TaskProgress],
        budgets: Mapping[BudgetKey, BudgetState],
        folded_to: Mapping[int, int],
        usage_log: Mapping[int, Extent],
        calls_log: Mapping[int, Extent],
        horizon_ms: int,
        now_ms: int,
        token_types: frozenset[str] | None = frozenset({TokenType.EMBEDDING}),
        provider: str | None = None,
    ) -> None:
        self._published = published
        self._newest = newest
        self._tasks = Tasks(progress)
        self._spent = Spent(budgets)
        self._folded_to = folded_to
        self._usage_log = usage_log
        self._calls_log = calls_log
        self._horizon_ms = horizon_ms
        self._now_ms = now_ms
        self._token_types = token_types
        self._charges_from_ms = max((log.complete_from_ms(now_ms) for log in usage_log.values()), default=0)
        self._calls_from_ms = max((log.complete_from_ms(now_ms) for log in calls_log.values()), default=0)
        self._first = FirstCopies(horizon_ms)
        self._refused: set[Key] = set()
        """Requests with a refusal, whose key is another. Refused is settled, whether a charge comes later or not."""
        self._late: set[Key] = set()
        """Charged late and never on time."""
        self._to_quarantine: dict[Key, Usage] = {}
        """Late charges that the aggregator has folded, without those that stand on the topic for them."""
        self._sums: defaultdict[int, dict[Sequence[BucketKey], list[int]]] = defaultdict(dict)
        """Usage partition -> buckets that get the same charges -> their sums."""
        self._named: dict[Key, array[int]] = {}
        """What charges name of an attempt: debtor, tokens, debtor, tokens and so on. 16 bytes a part."""
        self._old: set[Key] = set()
        """Attempts of charges so old that the intent may have expired."""
        self._open: dict[Key, Intent] = {}
        self._usage_read_to: Mapping[int, int] = {}
        self._finished = False
        self.usage = UsageCheck()
        self.ledger = LedgerCheck()
        self.as_folded: Counter[str] = Counter()
        """The ledger by the names of `accounts.Ledger`, to be held against the aggregator's own."""
        self.bills = Bills(provider, known_from_ms=self._calls_from_ms)

    # --- usage --------------------------------------------------------------------------------------------

    def take_usage(self, source: Source, usage: Usage) -> None:
        check = self.usage
        check.events += 1
        if self._token_types is not None and usage.token_type not in self._token_types:
            check.others += 1
            return
        _, partition, offset, append_ms = source
        key = packed(usage.idempotency_key)
        late = append_ms - usage.charged_at_ms > self._horizon_ms
        charged_on_time = late and key in self._first and key not in self._late
        if not self._first.take(partition, key, append_ms):
            check.duplicates += 1
            return
        check.charges += 1
        ours = usage.token_type == TokenType.EMBEDDING
        if usage.is_refusal:
            self._refused.add(packed(usage.request_id))
        if ours:
            self._tasks.take(usage, append_ms)
            self._check_charge(usage, append_ms)
            if self._first.elsewhere(partition, key, append_ms):
                self._breach_of(Breach.CHARGED_TWICE, usage, usage.billed.tokens, append_ms)
        if late:
            check.late.add(usage.billed.tokens, usage.price_nanos_per_million)
            if not charged_on_time:
                self._late.add(key)
            if offset < self._folded_to.get(partition, 0) and self._is_first(partition, append_ms):
                self._to_quarantine[key] = usage
            return
        self._late.discard(key)
        if ours:
            for attempt_id, tokens in usage.parts:
                attempt = packed(attempt_id)
                named = self._named.get(attempt)
                if named is None:
                    named = self._named[attempt] = array("q")
                named.extend((debtor(key, usage.payer_id), tokens))
                if self._calls_from_ms and append_ms < self._calls_from_ms + self._horizon_ms:
                    self._old.add(attempt)
        self._count(partition, offset, usage)

    def _is_first(self, partition: int, append_ms: int) -> bool:
        """Whether the first copy of what was appended then is in the log."""
        until_ms = self._seen_only_until(self._usage_log.get(partition, Extent(0, 0)))
        return until_ms is None or append_ms > until_ms

    def forget_quarantine(self) -> None:
        """Its topic has lost records: what stood there can't be told."""
        self._to_quarantine.clear()

    def take_quarantined(self, usage: Usage) -> None:
        self._to_quarantine.pop(packed(usage.idempotency_key), None)

    def _check_charge(self, usage: Usage, append_ms: int) -> None:
        """What a charge says of itself: its parts are its tokens, and its costs those of the price that it names."""
        billed, price = usage.billed, usage.price_nanos_per_million
        beside = billed.tokens - sum(part.tokens for part in usage.parts)
        found = [(Breach.PARTS_DIFFER, beside)] if beside else []
        if any(each.cost_nanos != cost_nanos(each.tokens, price) for each in (billed, usage.saved)):
            found.append((Breach.COST_DIFFERS, billed.tokens))
        for kind, tokens in found:
            self._breach_of(kind, usage, tokens, append_ms)

    def _count(self, partition: int, offset: int, usage: Usage) -> None:
        """Into each bucket that must hold it: folded by everybody's word, or by the bucket's own."""
        self._spent.take(usage)
        buckets: Sequence[BucketKey] = tuple(buckets_of(usage))
        if offset >= self._folded_to.get(partition, 0):
            folded = [bucket for bucket in buckets if offset <= self._last_offset(bucket, partition)]
            self.usage.not_folded += len(folded) < len(buckets)
            buckets = tuple(folded)
        sums = self._sums[partition]
        row = sums.get(buckets)
        if row is None:
            row = sums[buckets] = list(NO_SUMS)
        for index, amount in enumerate(sums_of(usage)):
            if amount:
                row[index] += amount

    def _last_offset(self, bucket: BucketKey, partition: int) -> int:
        """Of the last charge that the published bucket counts of this partition."""
        known = self._published.get(bucket, {}).get(partition)
        return -1 if known is None else known[0]

    # --- totals -------------------------------------------------------------------------------------------

    def totals(self) -> TotalsCheck:
        """Every published bucket, and every one that should be, held against the recomputation."""
        check = TotalsCheck()
        recomputed: defaultdict[BucketKey, dict[int, list[int]]] = defaultdict(dict)
        for partition, groups in self._sums.items():
            for buckets, sums in groups.items():
                for bucket in buckets:
                    known = recomputed[bucket].get(partition, NO_SUMS)
                    recomputed[bucket][partition] = list(map(add, known, sums))
        for bucket in sorted(recomputed.keys() | self._published.keys()):
            check.buckets += 1
            published, expected = self._published.get(bucket, {}), recomputed.get(bucket, {})
            found = self._misstated(bucket)
            proven, equal = True, not found
            for partition in sorted(published.keys() | expected.keys()):
                ours = tuple(expected.get(partition, NO_SUMS))
                last_offset = self._last_offset(bucket, partition)
                theirs = sums_as_tuple(published[partition][1]) if partition in published else NO_SUMS
                log = self._usage_log.get(partition, Extent(0, 0))
                if last_offset >= log.end:
                    found.append(Difference(bucket, partition, "last_offset", last_offset, log.end - 1))
                exact, complete = self._provable(log, bucket.bucket)
                for name, theirs_, ours_ in zip(SUM_NAMES, theirs, ours, strict=True):
                    if (exact and theirs_ != ours_) or (complete and theirs_ > ours_):
                        found.append(Difference(bucket, partition, name, theirs_, ours_))
                proven &= exact
                equal &= theirs == ours
            check.differences += found
            check.equal += equal
            if not found:
                check.proven += proven
                check.not_provable += not proven
        return check

    def _misstated(self, bucket: BucketKey) -> list[Difference]:
        """Who just upserts the topic reads the sums that the newest record gives as those of all its partitions."""
        if bucket not in self._newest:
            return []
        total, stated = self._newest[bucket]
        sums = zip(NO_SUMS, *(sums_as_tuple(sums) for _, sums in total.partitions.values()), strict=True)
        return [
            Difference(bucket, None, name, theirs, ours)
            for name, theirs, ours in zip(SUM_NAMES, sums_as_tuple(stated), map(sum, sums), strict=True)
            if theirs != ours
        ]

    def _provable(self, log: Extent, period: str) -> tuple[bool, bool]:
        """(whether each first copy of the period can be told, whether each of its charges is still in the log).

        What is complete but not exact may hold a copy whose first has expired: it bounds the total from above.
        """
        begins_ms = period_begins_ms(period)
        complete = begins_ms >= log.complete_from_ms(self._now_ms)
        until_ms = self._seen_only_until(log)
        return complete and (until_ms is None or begins_ms >= until_ms + DAY_MS), complete

    def _seen_only_until(self, log: Extent) -> int | None:
        first_ms = self._now_ms if log.first_ms is None else log.first_ms
        return seen_only_until(None, log.begin, first_ms, horizon_ms=self._horizon_ms, now_ms=self._now_ms)

    # --- tasks and budgets --------------------------------------------------------------------------------

    def tasks(self) -> TasksCheck:
        """Every task that is published or should be, against its charges."""
        seen_only_until = [self._seen_only_until(log) for log in self._usage_log.values()]
        return self._tasks.check(
            whole=all(log.begin == 0 for log in self._usage_log.values()),
            folded=self._all_folded,
            told_after_ms=max((until for until in seen_only_until if until is not None), default=-1),
            apart_ms=2 * self._horizon_ms,
        )

    def budgets(self) -> BudgetsCheck:
        """Every state that is published or should be, against its own limits and the charges of its month."""
        states, compared = list(self._spent.states()), self._all_folded
        check = BudgetsCheck(len(states), compared)
        # A day is spared: the aggregator may have taken back since what was due when this audit began.
        states += self._spent.missing(month((self._now_ms + DAY_MS - self._horizon_ms) // DAY_MS))
        for key, state in states:
            check.differences += differences(key, state, self._right_amounts(key, state, compared=compared))
        return check

    def _right_amounts(self, key: BudgetKey, state: BudgetState, *, compared: bool) -> list[int]:
        """Those of the log; where it has lost some of the month, those of the published totals. How much of what waits
        to be folded is in the state nobody knows, but all of it is in the log."""
        spent, provable = self._spent.by(key), [self._provable(log, key.month) for log in self._usage_log.values()]
        if key.payer_id == EVERYBODY_ELSE or (compared and all(exact for exact, _ in provable)):
            return spent
        if compared:
            parts = self._published.get(BucketKey(*key, "all", ""), {}).values()
            return [sum(getattr(sums, name) for _, sums in parts) for name in AMOUNTS]
        theirs = [getattr(state, name) for name in AMOUNTS]
        return list(map(min, theirs, spent)) if all(complete for _, complete in provable) else theirs

    @property
    def _all_folded(self) -> bool:
        return all(self._folded_to.get(partition, 0) >= end for partition, end in self._usage_read_to.items())

    @property
    def has_lost_records(self) -> bool:
        """Whether any partition of either log begins after its first offset."""
        return any(log.begin > 0 for log in (*self._usage_log.values(), *self._calls_log.values()))

    # --- calls --------------------------------------------------------------------------------------------

    def take_call(self, source: Source, call: ProviderCall) -> None:
        """The first intent and the first receipt of an attempt stand."""
        key = packed(call.attempt_id)
        named = self._named.get(key, NONE)
        if named is CLOSED:
            return
        if call.kind is CallKind.INTENT and key not in self._open:
            self._open[key] = intent_of(call, source.append_ms)
        if call.kind is not CallKind.RECEIPT:
            return
        self._named[key] = CLOSED
        self._close(self._open.pop(key, None), call, source, named)

    def _close(self, intent: Intent | None, receipt: ProviderCall, source: Source, named: array[int]) -> None:
        """U6 where a receipt exists: bill = attributed + residual, per attempt."""
        ledger, billed, attributed = self.ledger, receipt.billed_tokens or 0, tokens_of(named)
        price, began_ms = receipt.price_nanos_per_million, source.append_ms - receipt.time_taken_ms
        if intent is not None:
            price, began_ms = price if intent.price is None else intent.price, intent.at_ms
        self.bills.take(receipt.provider, began_ms, source.append_ms, billed, billed, price)
        ledger.billed.add(billed, price)
        ledger.attributed.add(attributed, price, attempts=attributed > 0)
        ledger.failed_attempts += receipt.outcome is CallOutcome.FAILED
        self._fold_like_the_aggregator(receipt, billed, attributed, price)

        def found(kind: Residual | Breach, tokens: int) -> None:
            self._add(kind, tokens, price, source.append_ms, receipt.provider, receipt.attempt_id)

        log = self._calls_log.get(source.partition, Extent(0, 0))
        begun_unseen = source.append_ms < log.complete_from_ms(self._now_ms)
        if intent is None and not begun_unseen:
            found(Breach.UNMATCHED, billed)
        if intent is not None and named:
            paid = [] if receipt.outcome in (CallOutcome.INVALID, CallOutcome.FAILED) else shares_of(intent, billed)
            if odd := beside_shares(intent, named, paid):
                found(Breach.SHARE_DIFFERS, odd)
        residual = billed - attributed
        if receipt.outcome is CallOutcome.INVALID or intent is None or residual < 0:
            if residual:
                waste = receipt.outcome is CallOutcome.INVALID
                over = Breach.OVER_ATTRIBUTED if residual < 0 else None
                found(over or (Residual.WASTE if waste else Residual.EXPIRED), abs(residual))
            return
        unclaimed, late = self._not_charged(intent, billed)
        rework = residual - unclaimed - late
        expired = intent.at_ms < self._charges_from_ms
        for kind, tokens in (
            (Residual.EXPIRED if expired else Residual.UNCLAIMED, unclaimed),
            (Residual.LATE, late),
            (Residual.REWORK, rework),
            (Breach.OVER_ATTRIBUTED, -rework),
        ):
            if tokens > 0:
                found(kind, tokens)

    def _not_charged(self, intent: Intent, billed: int) -> tuple[int, int]:
        """Of this bill the shares of items whose requests were neither charged nor refused, and those charged late."""
        charged = [request in self._first or request in self._refused for request in intent.requests]
        late = [request in self._late for request in intent.requests]
        if all(charged) and not any(late):
            return 0, 0
        owned = shares_of(intent, billed)
        return (
            sum(share for owner, share in owned if not charged[owner]),
            sum(share for owner, share in owned if late[owner]),
        )

    def _fold_like_the_aggregator(self, receipt: ProviderCall, billed: int, attributed: int, price: int | None) -> None:
        residual = billed - attributed
        names = {"attempts": 1, "billed_tokens": billed, "attributed_tokens": attributed}
        if residual < 0:
            names |= {"over_attributed_attempts": 1, "over_attributed_tokens": -residual}
        elif residual > 0:
            word = "waste" if receipt.outcome is CallOutcome.INVALID else "uncharged"
            cost = cost_nanos(residual, price)
            names |= {f"{word}_attempts": 1, f"{word}_tokens": residual, f"{word}_cost_nanos": cost or 0}
            names["unpriced_tokens"] = residual if cost is None else 0
        self.as_folded.update(names)

    def finish(self, usage_read_to: Mapping[int, int]) -> None:
        """Once, when every call was taken: judge attempts without receipt and charges without intent.

        `usage_read_to`: usage partition -> the offset after the last record read, which no extent tells: records come
        after it was asked for, and markers of others' transactions are none.
        """
        assert not self._finished
        self._finished, self._usage_read_to = True, usage_read_to
        for key, intent in self._open.items():
            named = self._named.pop(key, NONE)
            attributed = tokens_of(named)
            price, beyond = intent.price, max(intent.estimated_tokens - attributed, 0)
            if attributed:
                self.ledger.recovered.add(attributed, price)
                if odd := beside_shares(intent, named, None):
                    self._add(Breach.SHARE_DIFFERS, odd, price, intent.at_ms, intent.provider, intent.attempt_id)
            waits = intent.confirm_by_ms >= self._now_ms
            kind = Residual.IN_FLIGHT if waits else Residual.UNCONFIRMED
            self._add(kind, beyond, price, intent.at_ms, intent.provider, intent.attempt_id)
            self.bills.take(intent.provider, intent.at_ms, intent.confirm_by_ms, attributed, attributed + beyond, price)
            self.as_folded.update({"attempts": 1, "attributed_tokens": attributed})
            if not waits:
                cost = cost_nanos(beyond, price)
                self.as_folded.update(
                    unconfirmed_attempts=1,
                    unconfirmed_max_tokens=beyond,
                    unconfirmed_max_cost_nanos=cost or 0,
                    unpriced_tokens=beyond if cost is None else 0,
                    recovered_attempts=int(attributed > 0),
                    recovered_tokens=attributed,
                )
        for key, named in self._named.items():
            if named is CLOSED:
                continue
            tokens = tokens_of(named)
            self.as_folded["unmatched_tokens"] += tokens
            if key not in self._old:
                self._breach(Breach.UNMATCHED, tokens, None, 0, attempt_id=unpacked(key))
        for usage in self._to_quarantine.values():
            self._breach_of(Breach.LATE_MISSING, usage, usage.billed.tokens, usage.charged_at_ms)
        self.ledger.findings.sort(key=lambda finding: (finding.kind, finding.at_ms))

    # --- findings -----------------------------------------------------------------------------------------

    def _add(
        self, kind: Residual | Breach, tokens: int, price: int | None, at_ms: int, provider: str, attempt_id: str
    ) -> None:
        if isinstance(kind, Breach):
            self._breach(kind, tokens, price, at_ms, provider=provider, attempt_id=attempt_id)
            return
        self.ledger.residuals[kind].add(tokens, price)
        cost = cost_nanos(tokens, price)
        self.ledger.findings.append(Finding(kind, attempt_id, "", tokens, cost, at_ms, provider))

    def _breach_of(self, kind: Breach, usage: Usage, tokens: int, append_ms: int) -> None:
        price, provider = usage.price_nanos_per_million, usage.provider
        self._breach(kind, tokens, price, append_ms, provider=provider, request_id=usage.request_id)

    def _breach(
        self,
        kind: Breach,
        tokens: int,
        price: int | None,
        at_ms: int,
        *,
        provider: str = "",
        attempt_id: str = "",
        request_id: str = "",
    ) -> None:
        self.ledger.breaches[kind].add(tokens, price)
        cost = cost_nanos(tokens, price)
        self.ledger.findings.append(Finding(kind, attempt_id, request_id, tokens, cost, at_ms, provider))


@lru_cache(maxsize=4_096)
def period_begins_ms(period: str) -> int:
    """The beginning of a UTC day "2026-11-21" or month "2026-11"; NEVER for what no charge can count in."""
    day = period if len(period) == len("2026-11-21") else f"{period}-01"
    try:
        return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError:
        return NEVER
