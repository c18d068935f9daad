"""The fold of usage events and provider calls: totals by the first-copy rule (U5), the ledger (U6), task progress.

Pure: a fold takes what the store knew before a run and gives what it knows after it, and never changes its
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from operator import add, attrgetter, sub
from typing import NamedTuple

from processor.accounts import (
    Attempt,
    BucketKey,
    Cursor,
    Ledger,
    LedgerSummary,
    Seen,
    TaskKey,
    TaskProgress,
    UsageSums,
    UsageTotal,
    texts_of_key,
)
from processor.domain import CallKind, CallOutcome, ProviderCall, TokenType, Usage
from processor.usage import cost_nanos

DAY_MS = 86_400_000
SPARE_RETENTION_MS = 30 * DAY_MS
"""`token-usage` is kept at least this much longer than two horizons; a start with less is refused."""

PartitionTotals = Mapping[int, tuple[int, UsageSums]]
"""Usage partition -> (last_offset, sums), as in `UsageTotal.partitions`."""

SUM_NAMES = [field.name for field in fields(UsageSums)]
NO_SUMS = (0,) * len(SUM_NAMES)
sums_as_tuple: Callable[[UsageSums], tuple[int, ...]] = attrgetter(*SUM_NAMES)


class Copy(NamedTuple):
    """A usage event as it stands in the log: one copy of the charge of its request."""

    offset: int
    append_ms: int
    usage: Usage
    buckets: Sequence[BucketKey]


def copy_of(usage: Usage, offset: int, append_ms: int) -> Copy:
    return Copy(offset, append_ms, usage, buckets_of(usage))


def buckets_of(usage: Usage) -> tuple[BucketKey, ...]:
    """The buckets that a charge counts in: its UTC day and month by each dimension that it has a value for."""
    request = usage.request
    day = usage.charged_at_ms // DAY_MS
    return _buckets(usage.payer_id, day, usage.model, usage.operation, request.agent_id, request.collection)


@lru_cache(maxsize=8_192)
def _buckets(
    payer_id: str, day: int, model: str, operation: str, agent_id: str | None, collection: str | None
) -> tuple[BucketKey, ...]:
    values = [("all", ""), ("model", model), ("operation", str(operation))]
    if agent_id is not None:
        values.append(("agent", agent_id))
    if collection is not None:
        values.append(("collection", collection))
    date = datetime.fromtimestamp(day * 86_400, UTC)
    return tuple(
        BucketKey(payer_id, period, dimension, value)
        for period in (f"{date:%Y-%m-%d}", f"{date:%Y-%m}")
        for dimension, value in values
    )


def bucket_of_key(key: bytes | None) -> BucketKey | None:
    """The bucket that a key of the totals topic stands for; None when it is none of ours."""
    texts = texts_of_key(key, len(BucketKey._fields))
    return None if texts is None else BucketKey(*texts)


def sums_of(usage: Usage) -> tuple[int, ...]:
    """What one charge adds to a bucket, in the order of the fields of UsageSums."""
    billed, saved = usage.billed, usage.saved
    return (
        1,
        billed.texts,
        billed.tokens,
        billed.characters,
        billed.cost_nanos or 0,
        saved.texts,
        saved.tokens,
        saved.characters,
        saved.cost_nanos or 0,
        billed.tokens if billed.cost_nanos is None else 0,
        usage.failed_texts,
        usage.cached_texts,
    )


def seen_only_until(cursor: Cursor | None, begin: int, append_ms: int, *, horizon_ms: int, now_ms: int) -> int | None:
    """Up to which append time records only fill `seen`, given the log's begin and when its first record was appended.

    A fold without a cursor begins with the log. Unless that begins at offset 0 (which may be no record: others write
    in transactions), the first copies of what is in its first two horizons may have expired; those charges are in the
    published totals already. No further than the spare days: what expired was older than two horizons and those days,
    so a copy younger than them has its first copy in the log. Without this bound a log whose first record is young (a
    quiet partition) would lose charges.
    """
    if cursor is not None:
        return cursor.seen_only_until_ms
    return None if begin == 0 else min(append_ms + 2 * horizon_ms, now_ms - SPARE_RETENTION_MS)


@dataclass(frozen=True, slots=True)
class UsageState:
    """What the store knows of the keys of a run's copies; a key it does not know is left out."""

    seen: Mapping[str, Seen]
    totals: Mapping[BucketKey, PartitionTotals]
    tasks: Mapping[TaskKey, TaskProgress]
    attempts: Mapping[str, Attempt]
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class UsageFold:
    """What a run of copies changes, and its late charges. `first`, `duplicates` count copies."""

    seen: Mapping[str, Seen]
    totals: Sequence[UsageTotal]
    tasks: Mapping[TaskKey, TaskProgress]
    attempts: Mapping[str, Attempt]
    ledger: Ledger
    late: Sequence[Copy]
    first: int
    duplicates: int


def fold_usage(
    copies: Iterable[Copy],
    before: UsageState,
    *,
    partition: int,
    seen_only_until_ms: int | None,
    horizon_ms: int,
    now_ms: int,
) -> UsageFold:
    """Fold copies of one usage partition, in offset order.

    A copy is a duplicate if the previous copy of its key was appended at most twice the horizon earlier, else a
    charge of its own. A charge is late if it was appended more than the horizon after its time of charge; it goes
    to quarantine, not to the totals, nor to the ledger, where it stays uncharged. A bucket takes a charge only
    above its own `last_offset`: it may come from the totals topic and be ahead of `seen`. Copies that only fill
    `seen` still count in progress and ledger, which no topic gives back: each request once, and an attempt's parts over
    one copy per request never exceed its bill, whichever copy is taken. Usage of other token types, which other
    services share the topic with, has neither attempts here nor part in a task's progress.
    """
    seen: dict[str, Seen] = {}
    buckets = _Buckets(before.totals, partition)
    tasks: dict[TaskKey, TaskProgress] = {}
    attributed: dict[str, tuple[int, int]] = {}
    late: list[Copy] = []
    first = duplicates = 0
    for copy in copies:
        offset, append_ms, usage, keys = copy
        key = usage.idempotency_key
        previous = seen.get(key) or before.seen.get(key)
        if previous is not None and append_ms - previous.last_ms <= 2 * horizon_ms:
            # max: a new partition leader's clock may stand behind the old one's.
            seen[key] = Seen(previous.offset, max(previous.last_ms, append_ms))
            duplicates += 1
            continue
        seen[key] = Seen(offset, append_ms)
        first += 1
        ours = usage.token_type == TokenType.EMBEDDING
        is_late = append_ms - usage.charged_at_ms > horizon_ms
        if ours and not is_late:
            for attempt_id, tokens in usage.parts:
                attributed[attempt_id] = (attributed.get(attempt_id, (0, 0))[0] + tokens, append_ms)
        if ours:
            _count_progress(tasks, before.tasks, usage, now_ms)
        if seen_only_until_ms is not None and append_ms <= seen_only_until_ms:
            continue
        if is_late:
            late.append(copy)
        else:
            buckets.take(keys, offset, sums_of(usage))
    attempts = {
        attempt_id: _charged(before.attempts.get(attempt_id, Attempt()), tokens, append_ms)
        for attempt_id, (tokens, append_ms) in attributed.items()
    }
    return UsageFold(
        seen=seen,
        totals=[
            UsageTotal(
                key=key,
                partitions={
                    **before.totals.get(key, {}),
                    partition: (bucket.last_offset, UsageSums(*bucket.sums)),
                },
                updated_at_ms=now_ms,
            )
            for key, bucket in buckets.changed()
        ],
        tasks=tasks,
        attempts=attempts,
        ledger=_moved(before.ledger, before.attempts, attempts),
        late=late,
        first=first,
        duplicates=duplicates,
    )


class _Bucket:
    """The sums of one bucket in one usage partition. It takes charges above `known_offset` alone."""

    __slots__ = ("known_offset", "last_offset", "sums")

    def __init__(self, known: tuple[int, UsageSums] | None) -> None:
        self.known_offset = self.last_offset = known[0] if known else -1
        self.sums: tuple[int, ...] = sums_as_tuple(known[1]) if known else NO_SUMS

    def add(self, last_offset: int, sums: tuple[int, ...]) -> None:
        self.last_offset = max(self.last_offset, last_offset)
        self.sums = tuple(map(add, self.sums, sums))


class _Group:
    """What charges of the same buckets add up to, to be added to each of them once."""

    __slots__ = ("buckets", "known_offset", "last_offset", "sums")

    def __init__(self, buckets: Sequence[_Bucket]) -> None:
        self.buckets = buckets
        self.known_offset = max(bucket.known_offset for bucket in buckets)
        self.last_offset = -1
        self.sums = NO_SUMS

    def take(self, offset: int, added: tuple[int, ...]) -> None:
        if offset > self.known_offset:
            self.last_offset = offset
            self.sums = tuple(map(add, self.sums, added))
            return
        for bucket in self.buckets:  # some of them have it from the totals topic
            if offset > bucket.known_offset:
                bucket.add(offset, added)

    def settle(self) -> None:
        if self.last_offset >= 0:
            for bucket in self.buckets:
                bucket.add(self.last_offset, self.sums)


class _Buckets:
    """The buckets of one usage partition while a run is folded into them."""

    def __init__(self, before: Mapping[BucketKey, PartitionTotals], partition: int) -> None:
        self._before = before
        self._partition = partition
        self._buckets: dict[BucketKey, _Bucket] = {}
        self._groups: dict[Sequence[BucketKey], _Group] = {}

    def take(self, keys: Sequence[BucketKey], offset: int, added: tuple[int, ...]) -> None:
        group = self._groups.get(keys)
        if group is None:
            group = self._groups[keys] = _Group([self._bucket(key) for key in keys])
        group.take(offset, added)

    def changed(self) -> Iterator[tuple[BucketKey, _Bucket]]:
        """To be called once, at the end."""
        for group in self._groups.values():
            group.settle()
        return ((key, bucket) for key, bucket in self._buckets.items() if bucket.last_offset > bucket.known_offset)

    def _bucket(self, key: BucketKey) -> _Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._before.get(key, {}).get(self._partition))
        return bucket


def _count_progress(
    tasks: dict[TaskKey, TaskProgress], before: Mapping[TaskKey, TaskProgress], usage: Usage, now_ms: int
) -> None:
    request = usage.request
    if request.task_id is None:
        return
    key = TaskKey(request.tenant_id, request.task_id)
    known = tasks.get(key) or before.get(key)
    done, failed, total = (known.done, known.failed, known.total) if known else (0, 0, None)
    tasks[key] = TaskProgress(
        tenant_id=key.tenant_id,
        task_id=key.task_id,
        done=done + usage.texts - usage.failed_texts,
        failed=failed + usage.failed_texts,
        # The largest total named: the same whatever the order of the partitions.
        total=request.task_total if total is None else max(total, request.task_total or 0),
        updated_at_ms=now_ms,
    )


def newest_totals(*published: PartitionTotals) -> PartitionTotals:
    """Of several published versions of one bucket, per usage partition the one of the highest last_offset.

    For every reader of the totals topic: an aggregator that takes over with an old store may publish an older
    version again before it has caught up.
    """
    newest: dict[int, tuple[int, UsageSums]] = {}
    for partitions in published:
        for partition, (last_offset, sums) in partitions.items():
            if partition not in newest or last_offset > newest[partition][0]:
                newest[partition] = (last_offset, sums)
    return newest


def total_of(partitions: PartitionTotals) -> UsageSums:
    """The bucket's total: the sum over its usage partitions."""
    sums = NO_SUMS
    for _, part in partitions.values():
        sums = tuple(map(add, sums, sums_as_tuple(part)))
    return UsageSums(*sums)


# --- the ledger ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallFold:
    """What a run of intents and receipts changes."""

    attempts: Mapping[str, Attempt]
    ledger: Ledger


def fold_calls(
    calls: Iterable[tuple[int, ProviderCall]],
    before: Mapping[str, Attempt],
    ledger: Ledger,
) -> CallFold:
    """Fold (append_ms, call) of one partition, in offset order. The first intent and receipt of an attempt stand."""
    attempts: dict[str, Attempt] = {}
    for append_ms, call in calls:
        known = attempts.get(call.attempt_id) or before.get(call.attempt_id, Attempt())
        attempts[call.attempt_id] = _recorded(known, call, append_ms)
    return CallFold(attempts, _moved(ledger, before, attempts))


def _recorded(known: Attempt, call: ProviderCall, append_ms: int) -> Attempt:
    last_ms = max(known.last_ms, append_ms)
    price = known.price_nanos_per_million
    if price is None:
        price = call.price_nanos_per_million
    if call.kind is CallKind.INTENT:
        if known.confirm_by_ms is not None:
            return known
        return known._replace(
            last_ms=last_ms,
            confirm_by_ms=append_ms if call.confirm_by_ms is None else call.confirm_by_ms,
            estimated_tokens=call.estimated_tokens,
            price_nanos_per_million=price,
        )
    if known.outcome is not None or call.kind is not CallKind.RECEIPT:
        return known
    return known._replace(
        last_ms=last_ms,
        # A word of a newer worker: what charges don't name of its bill is uncharged.
        outcome=call.outcome if isinstance(call.outcome, CallOutcome) else CallOutcome.OK,
        billed_tokens=call.billed_tokens or 0,
        price_nanos_per_million=price,
    )


def _charged(known: Attempt, tokens: int, append_ms: int) -> Attempt:
    return known._replace(attributed_tokens=known.attributed_tokens + tokens, last_ms=max(known.last_ms, append_ms))


def _moved(ledger: Ledger, before: Mapping[str, Attempt], after: Mapping[str, Attempt]) -> Ledger:
    """The ledger once these attempts have changed: their old shares out, their new ones in."""
    sums: tuple[int, ...] = ledger
    for attempt_id, attempt in after.items():
        sums = tuple(map(add, sums, share(attempt)))
        if (old := before.get(attempt_id)) is not None:
            sums = tuple(map(sub, sums, share(old)))
    return Ledger(*sums)


def share(attempt: Attempt) -> Ledger:
    """What an attempt adds to the ledger whatever the time: nothing of a residual before its receipt."""
    attributed = attempt.attributed_tokens
    if attempt.outcome is None:
        if attempt.confirm_by_ms is None:
            return Ledger(unmatched_tokens=attributed)
        return Ledger(attempts=1, attributed_tokens=attributed)
    residual = attempt.billed_tokens - attributed
    cost, unpriced = _priced(max(residual, 0), attempt)
    if residual < 0:
        return Ledger(
            attempts=1,
            billed_tokens=attempt.billed_tokens,
            attributed_tokens=attributed,
            over_attributed_attempts=1,
            over_attributed_tokens=-residual,
        )
    if residual == 0:
        return Ledger(attempts=1, billed_tokens=attempt.billed_tokens, attributed_tokens=attributed)
    wasted = attempt.outcome is CallOutcome.INVALID
    return Ledger(
        attempts=1,
        billed_tokens=attempt.billed_tokens,
        attributed_tokens=attributed,
        waste_attempts=int(wasted),
        waste_tokens=residual if wasted else 0,
        waste_cost_nanos=cost if wasted else 0,
        uncharged_attempts=int(not wasted),
        uncharged_tokens=0 if wasted else residual,
        uncharged_cost_nanos=0 if wasted else cost,
        unpriced_tokens=unpriced,
    )


def unconfirmed_share(attempt: Attempt) -> Ledger:
    """What an attempt without receipt adds once its `confirm_by_ms` is past: its bill lies between what charges name
    and the estimate."""
    residual = max(attempt.estimated_tokens - attempt.attributed_tokens, 0)
    cost, unpriced = _priced(residual, attempt)
    return Ledger(
        recovered_attempts=int(attempt.attributed_tokens > 0),
        recovered_tokens=attempt.attributed_tokens,
        unconfirmed_attempts=1,
        unconfirmed_max_tokens=residual,
        unconfirmed_max_cost_nanos=cost,
        unpriced_tokens=unpriced,
    )


def closed(ledger: Ledger, dropped: Iterable[Attempt]) -> Ledger:
    """The ledger once these old attempts are no longer kept: what is known of them stays summed."""
    sums: tuple[int, ...] = ledger
    for attempt in dropped:
        if attempt.outcome is None and attempt.confirm_by_ms is not None:
            sums = tuple(map(add, sums, unconfirmed_share(attempt)))
    return Ledger(*sums)


def summarise(ledger: Ledger, open_attempts: Iterable[Attempt], now_ms: int) -> LedgerSummary:
    """The ledger at a moment. `open_attempts` are those with an intent and no receipt."""
    in_flight = 0
    overdue = []
    for attempt in open_attempts:
        if attempt.confirm_by_ms is not None and attempt.confirm_by_ms >= now_ms:
            in_flight += 1
        else:
            overdue.append(attempt)
    return LedgerSummary(sums=closed(ledger, overdue), in_flight_attempts=in_flight)


def _priced(tokens: int, attempt: Attempt) -> tuple[int, int]:
    """(cost_nanos, unpriced tokens) of a residual."""
    cost = cost_nanos(tokens, attempt.price_nanos_per_million)
    return (0, tokens) if cost is None else (cost, 0)
