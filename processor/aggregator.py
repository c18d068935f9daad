"""The aggregator: takes runs of usage events, provider calls and manifests, folds them, publishes, and saves.

The order of a run is the protocol: publish and await, save (the store's next offset is the one that counts), then
let the offset be committed. Cut anywhere, the run is folded again from what was saved, to the same end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import structlog

from processor.accounts import BudgetKey, BudgetPlan, BudgetState, Cursor, Ledger, LedgerSummary, TaskKey, UsageTotal
from processor.aggregate import (
    DAY_MS,
    Copy,
    UsageState,
    closed,
    copy_of,
    fold_calls,
    fold_usage,
    seen_only_until,
    summarise,
)
from processor.budgets import PERCENTS, BudgetBook, read_budgets
from processor.documents import UNKNOWN, deleted, document_key, fold_manifest, tombstones
from processor.domain import DeadLetter, DocumentManifest, ProviderCall, Record, TokenType, Usage
from processor.errors import LeaseLost, StoreTaken
from processor.folded import acted_on, check_same, cursor_after, is_behind, position, with_ends_of_records
from processor.ports import (
    AggregateStore,
    Clock,
    Destination,
    Events,
    Lease,
    Outbox,
    RecordReader,
    Run,
    StoreChange,
    TopicReader,
    Undecodable,
)
from processor.totals import FoldedTopics, merge_totals

log = structlog.get_logger(__name__)

T = TypeVar("T")

FOLDED_PER_FETCH = 10_000
"""Of a backlog as many as the broker gives for a partition at once: every bucket that changes is published and written
once for all that a run brings to it."""

SLICE = 5_000
"""Records folded in one transaction: bounds the memory of a fold."""

DECODED_A_TURN = 500
"""So that the loop serves others every few milliseconds."""

LEASE_POLL_S = 0.1
"""A late lease is looked at so often."""

PRUNE_PARTS = 256
PRUNE_EVERY_S = 60.0

OURS = frozenset({TokenType.EMBEDDING})


class Place(NamedTuple):
    """What was found of a partition when it was assigned."""

    begin: int
    """Where its fold began then."""
    end: int
    """Its end then: below it lies the backlog."""
    acted_on: int
    """Below it, what is sent once per record (late charges, dead letters, tombstones) was sent by whoever
    committed it: everything is acknowledged before its offset is committed."""


NOWHERE = Place(0, 0, 0)
NO_BUDGETS = BudgetPlan()


class Aggregator:
    """Implements `ports.RunHandler` for the one process that owns every partition of the folded topics.

    `token_types` are those that are totalled, None for all: other services may share the usage topic.
    """

    def __init__(
        self,
        *,
        topics: FoldedTopics,
        store: AggregateStore,
        outbox: Outbox,
        reader: TopicReader,
        decoder: RecordReader,
        clock: Clock,
        events: Events,
        horizon_ms: int,
        token_types: frozenset[str] | None = OURS,
        budgets: BudgetPlan = NO_BUDGETS,
    ) -> None:
        self._topics = topics
        self._store = store
        self._outbox = outbox
        self._reader = reader
        self._decoder = decoder
        self._clock = clock
        self._events = events
        self._horizon_ms = horizon_ms
        self._token_types = token_types
        self._budgets = BudgetBook(budgets, store, horizon_ms=horizon_ms)
        self._folds: Mapping[str, Callable[[Lease, Sequence[Record]], Awaitable[None]]] = {
            topics.usage: self._fold_usage,
            topics.calls: self._fold_calls,
            topics.documents: self._fold_documents,
        }
        self._lock = asyncio.Lock()  # one run at a time: the folds share attempts, tasks and the ledger
        self._places: dict[tuple[str, int], Place] = {}
        self._backlog: set[int] = set()  # usage partitions not yet folded to where they ended when assigned
        self._waiting: dict[int, list[tuple[Lease, int]]] = {}
        self._closing: set[Lease] = set()
        self._pruned_at = clock.monotonic()
        # Not always the first: a process that lives for less than a round would never come to the last ones.
        self._prune_part = int(clock.now_ms() / 1000 / PRUNE_EVERY_S) % PRUNE_PARTS

    def ledger_summary(self) -> LedgerSummary:
        """The ledger now: billed, attributed, and each class of residual."""
        return summarise(self._store.ledger(), self._store.open_attempts(), self._clock.now_ms())

    # --- RunHandler ---------------------------------------------------------------------------------------

    async def positions(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Take the store over, check that it belongs to these topics, catch up with published totals.

        Called at each assignment. Raises StoreError when a folded topic was made again or has grown.
        """
        if not partitions:
            return {}
        async with self._lock:
            self._store.claim()
            self._waiting.clear()
            topics = list(self._folds)
            # Somebody waits for totals to move again: the broker is asked for all topics at once.
            spans = dict(zip(topics, await asyncio.gather(*map(self._reader.spans, topics)), strict=True))
            committed = dict(zip(topics, await asyncio.gather(*map(self._reader.committed, topics)), strict=True))
            for topic in self._folds:
                await check_same(topic, spans[topic], self._store, self._reader)
            done = {
                (topic, partition): acted_on(committed[topic].get(partition, 0), span)
                for topic in self._folds
                for partition, span in spans[topic].items()
            }
            usage = self._topics.usage
            spans[usage] = await with_ends_of_records(usage, spans[usage], self._store, self._reader)
            self._places = {
                (topic, partition): Place(
                    position(topic, partition, span, self._store),
                    span.end,
                    done[topic, partition],
                )
                for topic in self._folds
                for partition, span in spans[topic].items()
            }
            if any(is_behind(usage, partition, committed[usage], self._store) for partition in spans[usage]):
                await merge_totals(self._topics, spans[usage], self._store, self._reader, self._decoder)
            self._backlog = {
                partition
                for partition, span in spans[usage].items()
                if position(usage, partition, span, self._store) < span.end
            }
            self._budgets.begin(await read_budgets(self._topics.budgets, self._reader, self._decoder))
            if not self._backlog:
                # Without a lease, of which there is none yet: what a process that froze right here sends too late is
                # replaced with the payer's next charge.
                now_ms = self._clock.now_ms()
                budgets = self._due_budgets([], now_ms)
                await self._outbox.send([Destination("budgets", budget) for budget in budgets])
                self._budgets.published(budgets, now_ms)
            return {
                (topic, partition): position(topic, partition, spans[topic][partition], self._store)
                for topic, partition in partitions
            }

    async def on_run(self, run: Run) -> None:
        """Fold a run in slices. A run whose lease is over is dropped: it is folded by its new owner.

        A lease that is late without being revoked is waited for: nobody would deliver again what is dropped of it, and
        the next run would be folded past it. StoreTaken when another group's aggregator has claimed the store: nothing
        could be saved any more.
        """
        async with self._lock:
            for start in range(0, len(run.records), SLICE):
                try:
                    while not await self._is_folded(run.lease, run.records[start : start + SLICE]):
                        if run.lease.revoked or run.lease in self._closing:
                            return
                        await self._clock.sleep(LEASE_POLL_S)
                except StoreTaken:
                    if run.lease.held():
                        raise
                    return
            self._prune()

    async def _is_folded(self, lease: Lease, records: Sequence[Record]) -> bool:
        if not lease.held() or lease in self._closing:
            return False
        try:
            await self._folds[lease.topic](lease, records)
        except LeaseLost:
            return False
        return True

    def waiting(self) -> bool:
        return False

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        """Wait for the slice in work; those after it are dropped."""
        self._closing = {lease for lease in self._closing if not lease.revoked} | set(leases)
        try:
            async with asyncio.timeout(budget_s), self._lock:
                self._waiting.clear()
        except TimeoutError:
            log.warning("aggregator.revoke_budget_spent", partitions=len(leases), budget_s=budget_s)

    # --- folds: publish, save, finish ---------------------------------------------------------------------

    async def _fold_usage(self, lease: Lease, records: Sequence[Record]) -> None:
        """Progress and budgets have no offsets by which a reader could tell an older version: while any usage partition
        has a backlog they are not published, so that who starts from an old store or none never publishes less than
        was known."""
        cursor, fresh = self._fresh(lease, records)
        if fresh:
            place = self._place(lease)
            usages, letters = await self._decode(Usage, fresh)
            copies = [
                copy_of(usage, record.source.offset, record.source.append_ms)
                for record, usage in usages
                if self._token_types is None or usage.token_type in self._token_types
            ]
            first = fresh[0].source
            now_ms = self._clock.now_ms()
            until_ms = seen_only_until(
                cursor,
                min(place.begin, first.offset),
                first.append_ms,
                horizon_ms=self._horizon_ms,
                now_ms=now_ms,
            )
            before = self._usage_state(lease.partition, copies)
            fold = fold_usage(
                copies,
                before,
                partition=lease.partition,
                seen_only_until_ms=until_ms,
                horizon_ms=self._horizon_ms,
                now_ms=now_ms,
            )
            if fresh[-1].source.offset + 1 >= place.end:
                self._backlog.discard(lease.partition)
            tasks = fold.tasks if self._backlog else self._store.unpublished_tasks() | dict(fold.tasks)
            budgets = [] if self._backlog else self._due_budgets(fold.totals, now_ms)
            await self._publish(
                lease,
                [Destination("late", copy.usage) for copy in fold.late if copy.offset >= place.acted_on],
                [Destination("totals", total) for total in fold.totals],
                [] if self._backlog else [Destination("progress", task) for task in tasks.values()],
                [Destination("budgets", budget) for budget in budgets],
                self._dead_letters(letters, place),
            )
            if not self._backlog:
                self._budgets.published(budgets, now_ms)
            self._store.save(
                StoreChange(
                    topic=lease.topic,
                    partition=lease.partition,
                    cursor=cursor_after(fresh[-1], until_ms),
                    seen=fold.seen,
                    totals=fold.totals,
                    tasks=tasks,
                    tasks_published=not self._backlog,
                    attempts=fold.attempts,
                    ledger=fold.ledger,
                )
            )
            self._watch(before.ledger, fold.ledger)
            self._events.count("usage_events", fold.first - len(fold.late), {"outcome": "charged"})
            self._events.count("usage_events", fold.duplicates, {"outcome": "duplicate"})
            self._events.count("usage_events", len(fold.late), {"outcome": "late"})
            self._events.count("usage_events", len(usages) - len(copies), {"outcome": "other"})
        _finish(lease, records)

    def _due_budgets(self, totals: Sequence[UsageTotal], now_ms: int) -> list[BudgetState | BudgetKey]:
        """What to publish of budgets with these totals. What has risen is told first: twice after a crash, but told."""
        due = self._budgets.due(totals, now_ms)
        for state, before in self._budgets.rises(due):
            log.warning(
                "aggregator.budget_reached",
                payer_id=state.key.payer_id,
                month=state.key.month,
                percent=state.reached_percent,
                hard=state.budget.hard,
            )
            for percent in PERCENTS:
                if before < percent <= state.reached_percent:
                    self._events.count("budgets_reached", 1, {"percent": str(percent)})
        return due

    def _usage_state(self, partition: int, copies: Sequence[Copy]) -> UsageState:
        store = self._store
        return UsageState(
            seen=store.seen(partition, {copy.usage.idempotency_key for copy in copies}),
            totals=store.totals({key for buckets in {copy.buckets for copy in copies} for key in buckets}),
            tasks=store.tasks(
                {
                    TaskKey(copy.usage.request.tenant_id, copy.usage.request.task_id)
                    for copy in copies
                    if copy.usage.request.task_id is not None
                }
            ),
            attempts=store.attempts({part.attempt_id for copy in copies for part in copy.usage.parts}),
            ledger=store.ledger(),
        )

    async def _fold_calls(self, lease: Lease, records: Sequence[Record]) -> None:
        _, fresh = self._fresh(lease, records)
        if fresh:
            calls, letters = await self._decode(ProviderCall, fresh)
            attempts = self._store.attempts({call.attempt_id for _, call in calls})
            ledger = self._store.ledger()
            fold = fold_calls(
                ((record.source.append_ms, call) for record, call in calls),
                attempts,
                ledger,
            )
            await self._publish(lease, self._dead_letters(letters, self._place(lease)))
            self._store.save(
                StoreChange(
                    topic=lease.topic,
                    partition=lease.partition,
                    cursor=cursor_after(fresh[-1]),
                    attempts=fold.attempts,
                    ledger=fold.ledger,
                )
            )
            self._watch(ledger, fold.ledger)
        _finish(lease, records)

    async def _fold_documents(self, lease: Lease, records: Sequence[Record]) -> None:
        """Tombstones are written at the end of the backlog, and until then offsets that nobody acted on before are not
        finished: were the store lost meanwhile, nobody would know that these deletes are still due."""
        _, fresh = self._fresh(lease, records)
        waiting = self._waiting.setdefault(lease.partition, [])
        place = self._place(lease)
        waiting.extend((lease, each.source.offset) for each in records if each.source.offset >= place.acted_on)
        in_backlog = records[-1].source.offset + 1 < place.end
        if fresh:
            manifests, letters = await self._decode(DocumentManifest, fresh)
            before = self._store.documents({document_key(manifest) for _, manifest in manifests})
            if not in_backlog:
                before |= self._store.stale_documents(lease.partition)
            after = dict(before)
            for record, manifest in manifests:
                key = document_key(manifest)
                after[key] = fold_manifest(
                    after.get(key, UNKNOWN), manifest, acted_on=record.source.offset < place.acted_on
                )
            stones = []
            if not in_backlog:
                stones = [Destination("sink", stone) for document in after.values() for stone in tombstones(document)]
                after = {key: deleted(document) for key, document in after.items()}
            await self._publish(lease, stones, self._dead_letters(letters, place))
            self._store.save(
                StoreChange(
                    topic=lease.topic,
                    partition=lease.partition,
                    cursor=cursor_after(fresh[-1]),
                    documents={key: document for key, document in after.items() if document != before.get(key)},
                )
            )
            self._events.count("stale_vectors_deleted", len(stones), {})
        _finish(lease, [record for record in records if record.source.offset < place.acted_on])
        if not in_backlog:
            for waiting_lease, offset in waiting:
                waiting_lease.finish(offset)
            waiting.clear()

    def _fresh(self, lease: Lease, records: Sequence[Record]) -> tuple[Cursor | None, Sequence[Record]]:
        """The cursor, and the records that it has not passed: a run may be fetched again."""
        cursor = self._store.cursor(lease.topic, lease.partition)
        if cursor is None:
            return None, records
        return cursor, [record for record in records if record.source.offset >= cursor.next_offset]

    def _place(self, lease: Lease) -> Place:
        return self._places.get((lease.topic, lease.partition), NOWHERE)

    async def _decode(
        self, kind: type[T], records: Sequence[Record]
    ) -> tuple[list[tuple[Record, T]], list[tuple[Record, Undecodable]]]:
        """What could be read, and what could not."""
        read: list[tuple[Record, T]] = []
        unread: list[tuple[Record, Undecodable]] = []
        for number, record in enumerate(records, 1):
            message = await self._decoder.read(kind, record.value)
            if isinstance(message, Undecodable):
                unread.append((record, message))
            else:
                read.append((record, message))
            if number % DECODED_A_TURN == 0:
                await asyncio.sleep(0)
        return read, unread

    def _dead_letters(self, unread: Sequence[tuple[Record, Undecodable]], place: Place) -> list[Destination]:
        letters = []
        for record, (reason, code) in unread:
            source = record.source
            log.error(
                "aggregator.undecodable",
                topic=source.topic,
                partition=source.partition,
                offset=source.offset,
                reason=reason,
                code=code,
            )
            self._events.count("dead_letters", 1, {"class": reason})
            if source.offset >= place.acted_on:
                letters.append(
                    Destination("dlq", DeadLetter(record=record, reason=reason, code=code, at_ms=self._clock.now_ms()))
                )
        return letters

    async def _publish(self, lease: Lease, *messages: Sequence[Destination]) -> None:
        await self._outbox.send([message for group in messages for message in group], leases=[lease])

    def _watch(self, before: Ledger, after: Ledger) -> None:
        """An attempt that charged more than its bill breaks a law: say it once, when it happens."""
        more = after.over_attributed_attempts - before.over_attributed_attempts
        if more > 0:
            self._events.count("ledger_over_attributed_attempts", more, {})
            log.error(
                "aggregator.over_attributed",
                attempts=after.over_attributed_attempts,
                tokens=after.over_attributed_tokens,
            )

    # --- upkeep -------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Once a minute, drop from one slice of the keys what no copy can be a duplicate of any more.

        `seen` goes by its partition's own append time, so that a backlog is judged as it was. A day is spared for
        brokers' clocks. Attempts and tasks go by the clock once the backlog is folded, but no clock of ours makes them
        older than the newest record does.
        """
        if self._clock.monotonic() - self._pruned_at < PRUNE_EVERY_S:
            return
        self._pruned_at = self._clock.monotonic()
        keep_ms = 2 * self._horizon_ms + DAY_MS
        now_ms, newest_ms = self._clock.now_ms(), 0
        seen_before_ms: dict[int, int] = {}
        for (topic, partition), place in self._places.items():
            cursor = self._store.cursor(topic, partition)
            next_offset, last_append_ms = (cursor.next_offset, cursor.last_append_ms) if cursor else (place.begin, 0)
            newest_ms = max(newest_ms, last_append_ms)
            if cursor is not None and topic == self._topics.usage:
                seen_before_ms[partition] = last_append_ms - keep_ms
            if topic != self._topics.documents and place.end > next_offset:
                now_ms = min(now_ms, last_append_ms)
        try:
            dropped = self._store.prune(
                seen_before_ms=seen_before_ms,
                before_ms=min(now_ms, newest_ms) - keep_ms,
                part=self._prune_part,
                parts=PRUNE_PARTS,
                close=closed,
            )
        except StoreTaken:
            return
        self._prune_part = (self._prune_part + 1) % PRUNE_PARTS
        self._events.count("aggregator_pruned_keys", dropped, {})


def _finish(lease: Lease, records: Sequence[Record]) -> None:
    for record in records:
        lease.finish(record.source.offset)
