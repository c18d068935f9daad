"""The aggregator on a log in memory: real codec, real store, and a crash wherever a test wants one."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from processor.accounts import (
    BucketKey,
    BudgetKey,
    BudgetPlan,
    BudgetState,
    LedgerSummary,
    TaskKey,
    TaskProgress,
    UsageSums,
    UsageTotal,
)
from processor.adapters.avro import Codec
from processor.adapters.murmur2 import partition_of
from processor.adapters.sqlite_store import SqliteStore
from processor.aggregate import PartitionTotals, buckets_of, newest_totals, sums_of, total_of
from processor.aggregator import Aggregator
from processor.budgets import read_budgets
from processor.domain import Amounts, CallKind, CallOutcome, Part, Record, Source, TokenType, Usage
from processor.errors import LeaseLost
from processor.ports import Destination, Events, Lease, Run, Span, StoreChange, Undecodable
from processor.totals import FoldedTopics
from tests.support.builders import NOW_MS, a_call, a_request, a_usage
from tests.support.steps import FakeLease, VirtualClock

T = TypeVar("T")

DAY_MS = 86_400_000
HORIZON_MS = 35 * DAY_MS

TOPICS = FoldedTopics(
    usage="token-usage",
    calls="embedding-calls",
    documents="embedding-documents",
    totals="token-usage-totals",
    budgets="usage-budgets",
    late="token-usage-late",
    progress="task-progress",
)
TOPIC_OF = {
    "usage": TOPICS.usage,
    "calls": TOPICS.calls,
    "documents": TOPICS.documents,
    "totals": TOPICS.totals,
    "budgets": TOPICS.budgets,
    "progress": TOPICS.progress,
    "late": TOPICS.late,
    "dlq": "embedding-requests-dlq",
    "sink": "embedding-vectors",
}
PARTITIONS = 2
SUMS = [field.name for field in fields(UsageSums)]
FOLDED = (TOPICS.calls, TOPICS.usage, TOPICS.documents)


class Crash(Exception):
    """The process ends here."""


class MemoryLog:
    """A broker in memory: an outbox and a topic reader, with expiry, compaction and a group's commits."""

    def __init__(self) -> None:
        self.codec = Codec()
        self.partitions: dict[str, int] = defaultdict(lambda: PARTITIONS)
        self.records: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
        self.ends: dict[tuple[str, int], int] = defaultdict(int)
        self.begins: dict[tuple[str, int], int] = defaultdict(int)
        self.commits: dict[tuple[str, int], int] = {}
        self.now_ms = NOW_MS

    def append(self, destination: Destination, *, append_ms: int | None = None) -> Source:
        key, value, headers = self.codec.encode(destination)
        topic = TOPIC_OF[destination.name]
        partition = partition_of(key or b"", self.partitions[topic])
        return self.append_bytes(topic, partition, value, key=key, headers=headers, append_ms=append_ms)

    def append_bytes(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        append_ms: int | None = None,
    ) -> Source:
        place = (topic, partition)
        source = Source(topic, partition, self.ends[place], self.now_ms if append_ms is None else append_ms)
        self.records[place][source.offset] = Record(source, key, value, headers)
        self.ends[place] += 1
        return source

    def expire(self, topic: str, partition: int, begin: int) -> None:
        """Retention removes what lies below."""
        place = (topic, partition)
        self.begins[place] = begin
        self.records[place] = {offset: record for offset, record in self.records[place].items() if offset >= begin}

    def compact(self, topic: str) -> None:
        """Only the last record of each key is left."""
        for partition in range(self.partitions[topic]):
            last = {record.key: record for record in self.records[topic, partition].values()}
            self.records[topic, partition] = {
                record.source.offset: record
                for record in sorted(last.values(), key=lambda record: record.source.offset)
            }

    def remake(self, topic: str) -> None:
        """Delete the topic and create it again, empty."""
        for partition in range(self.partitions[topic]):
            for table in (self.records, self.ends, self.begins, self.commits):
                table.pop((topic, partition), None)

    def after(self, topic: str, partition: int, offset: int) -> list[Record]:
        return [record for at, record in self.records[topic, partition].items() if at >= offset]

    def all_of(self, topic: str) -> list[Record]:
        return [record for partition in range(self.partitions[topic]) for record in self.after(topic, partition, 0)]

    # Outbox
    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        if messages and not all(lease.held() for lease in leases):
            raise LeaseLost("a lease is gone")
        for message in messages:
            self.append(message)

    async def post(self, message: Destination) -> Awaitable[None]:
        raise AssertionError("the aggregator awaits what it sends")

    # TopicReader
    async def spans(self, topic: str) -> Mapping[int, Span]:
        return {
            partition: Span(self.begins[topic, partition], self.ends[topic, partition])
            for partition in range(self.partitions[topic])
        }

    async def records_at(self, topic: str, offsets: Mapping[int, int]) -> Mapping[int, Record]:
        return {
            partition: self.records[topic, partition][offset]
            for partition, offset in offsets.items()
            if offset in self.records[topic, partition]
        }

    async def committed(self, topic: str) -> Mapping[int, int]:
        return {partition: offset for (name, partition), offset in self.commits.items() if name == topic}

    async def read(self, topic: str, begin: Mapping[int, int] | None = None) -> AsyncGenerator[Sequence[Record], None]:
        spans = await self.spans(topic)
        for partition in range(self.partitions[topic]):
            offset = (begin or {}).get(partition, 0)
            if records := self.after(topic, partition, offset if offset <= spans[partition].end else 0):
                yield records

    async def contents(self, name: str, kind: type[T]) -> list[tuple[Record, T]]:
        """All records of a topic, decoded; tombstones are left out."""
        found = []
        for record in self.all_of(TOPIC_OF[name]):
            if record.value is not None:
                message = await self.codec.read(kind, record.value)
                assert not isinstance(message, Undecodable)
                found.append((record, message))
        return found

    async def totals(self) -> dict[BucketKey, UsageSums]:
        """What a reader of the totals topic makes of it: the highest last_offset wins, a null value deletes."""
        newest: dict[bytes | None, tuple[BucketKey, PartitionTotals]] = {}
        for record in self.all_of(TOPICS.totals):
            if record.value is None:
                newest.pop(record.key, None)
                continue
            total = await self.codec.read(UsageTotal, record.value)
            assert not isinstance(total, Undecodable)
            _, known = newest.get(record.key, (total.key, {}))
            newest[record.key] = total.key, newest_totals(known, total.partitions)
        return {key: total_of(partitions) for key, partitions in newest.values()}

    def forget_totals(self) -> None:
        """A null value for every bucket."""
        for record in self.all_of(TOPICS.totals):
            self.append_bytes(TOPICS.totals, record.source.partition, None, key=record.key)

    async def progress(self) -> dict[TaskKey, TaskProgress]:
        """The last record of each task."""
        return {
            TaskKey(task.tenant_id, task.task_id): task for _, task in await self.contents("progress", TaskProgress)
        }

    async def budgets(self) -> dict[BudgetKey, BudgetState]:
        """The last record of each payer and month; a null value deletes."""
        return await read_budgets(TOPICS.budgets, self, self.codec)

    def tombstones(self) -> list[tuple[str, str]]:
        """(vector id, source_version) of each, in the order of sending within a partition."""
        return [
            ((record.key or b"").decode(), dict(record.headers)["source_version"].decode())
            for record in self.all_of(TOPIC_OF["sink"])
            if record.value is None
        ]


def charges(history: Sequence[tuple[Source, Usage]], horizon_ms: int = HORIZON_MS) -> list[tuple[Source, Usage]]:
    """The first-copy rule said another way: cut each key's copies where more than two horizons lie between them, and
    take the first of each piece."""
    by_key: dict[tuple[int, str], list[tuple[Source, Usage]]] = defaultdict(list)
    for source, usage in sorted(history, key=lambda copy: copy[0]):
        by_key[source.partition, usage.request_id].append((source, usage))
    firsts = []
    for copies in by_key.values():
        firsts.append(copies[0])
        firsts += [
            later for earlier, later in pairwise(copies) if later[0].append_ms - earlier[0].append_ms > 2 * horizon_ms
        ]
    return firsts


def is_late(source: Source, usage: Usage, horizon_ms: int = HORIZON_MS) -> bool:
    return source.append_ms - usage.charged_at_ms > horizon_ms


def recomputed(firsts: Iterable[tuple[Source, Usage]], horizon_ms: int = HORIZON_MS) -> dict[BucketKey, UsageSums]:
    """The totals of these charges, late ones left out."""
    sums: dict[BucketKey, Counter[str]] = defaultdict(Counter)
    for source, usage in firsts:
        if not is_late(source, usage, horizon_ms):
            for key in buckets_of(usage):
                sums[key].update(dict(zip(SUMS, sums_of(usage), strict=True)))
    return {key: UsageSums(**counter) for key, counter in sums.items()}


class Steps:
    """Counts the moments at which a process may end, and ends it at one of them."""

    def __init__(self, crash_at: int | None) -> None:
        self._left = crash_at

    def __call__(self) -> None:
        if self._left is not None:
            if self._left == 0:
                raise Crash
            self._left -= 1


class CrashingOutbox:
    """The log's outbox: may end the process before, between and after the messages of a send."""

    sending = 0

    def __init__(self, log: MemoryLog, step: Callable[[], None]) -> None:
        self._log, self._step = log, step

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        self._step()
        for message in messages:
            await self._log.send([message], leases=leases)
            self._step()

    async def post(self, message: Destination) -> Awaitable[None]:
        return await self._log.post(message)


class CrashingStore(SqliteStore):
    """The real store: may end the process before and after a save."""

    def __init__(self, path: Path, step: Callable[[], None]) -> None:
        super().__init__(path)
        self._step = step

    def save(self, change: StoreChange) -> None:
        self._step()
        super().save(change)
        self._step()


class Bench:
    """An aggregator over a log and a store file, run from its positions to the end of every topic."""

    def __init__(self, log: MemoryLog, path: Path, *, horizon_ms: int = HORIZON_MS) -> None:
        self.log = log
        self.path = path
        self.horizon_ms = horizon_ms
        self.clock = VirtualClock()
        self.budgets = BudgetPlan()
        self.token_types: frozenset[str] | None = frozenset({TokenType.EMBEDDING})
        self.counts: dict[tuple[str, str], float] = defaultdict(float)

    def lose_store(self) -> None:
        for path in self.path.parent.glob(self.path.name + "*"):
            path.unlink()

    def copy_store(self, path: Path) -> None:
        """As another machine, or the disk after a power cut, has it. The store is closed: the file is all of it."""
        shutil.copy(self.path, path)

    def leave_store(self, state: str) -> None:
        """What the next process finds: the store as it is ("kept"), none ("lost"), or one left earlier ("old")."""
        old = self.path.with_name("old.sqlite")
        if state == "lost":
            self.lose_store()
        elif state == "old" and old.exists():
            self.lose_store()
            old.rename(self.path)
        elif self.path.exists():
            self.copy_store(old)

    def aggregator(self, store: SqliteStore, step: Callable[[], None]) -> Aggregator:
        return Aggregator(
            topics=TOPICS,
            store=store,
            outbox=CrashingOutbox(self.log, step),
            reader=self.log,
            decoder=self.log.codec,
            clock=self.clock,
            events=Events(count=self._count),
            horizon_ms=self.horizon_ms,
            token_types=self.token_types,
            budgets=self.budgets,
        )

    def _count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.counts[name, ",".join(labels.values())] += value

    async def run(
        self, *, crash_at: int | None = None, run_length: int = 3, order: Iterable[str] = FOLDED
    ) -> LedgerSummary | None:
        """Fold to the end of every topic; None after a crash, else the ledger."""
        self.clock.now_s = (self.log.now_ms - NOW_MS) / 1000
        step = Steps(crash_at)
        with closing(CrashingStore(self.path, step)) as store:
            aggregator = self.aggregator(store, step)
            try:
                places = [(topic, partition) for topic in order for partition in range(self.log.partitions[topic])]
                positions = await aggregator.positions(places)
                for topic, partition in places:
                    await self._fold(aggregator, topic, partition, positions[topic, partition], run_length, step)
            except Crash:
                return None
            return aggregator.ledger_summary()

    async def _fold(
        self, aggregator: Aggregator, topic: str, partition: int, position: int, run_length: int, step: Steps
    ) -> None:
        records = self.log.after(topic, partition, position)
        lease = FakeLease(topic, partition)
        for start in range(0, len(records), run_length):
            run = records[start : start + run_length]
            await aggregator.on_run(Run(lease, run))
            expected = [record.source.offset for record in records[: start + run_length]]
            while expected and expected[0] in lease.finished:
                self.log.commits[topic, partition] = max(
                    self.log.commits.get((topic, partition), 0), expected.pop(0) + 1
                )
            step()


History = list[tuple[Source, Usage]]

PAYERS = ("p0", "p1", "p2", "p6")
"""The last one has the other partition: what is folded in one alone proves nothing of two."""


class Event(NamedTuple):
    """A copy to come: of which request, how long after the one before, how long after its time of charge."""

    payer: int
    request: int
    attempt: int
    gap_ms: int
    age_ms: int


def append(log: MemoryLog, history: History, coming: Sequence[Event]) -> None:
    """Put the copies into the log of usage, and into `history` where they stand there."""
    for payer, number, attempt, gap_ms, age_ms in coming:
        log.now_ms += gap_ms
        request = a_request(["one", "two"], tenant_id=PAYERS[payer], correlation_id=f"r{number}", task_id=f"t{payer}")
        tokens = 3 + attempt
        usage = a_usage(
            request,
            billed=Amounts(2, tokens, 6, 20 * tokens if attempt else None),
            saved=Amounts(0, 0, 0, 0 if attempt else None),
            price_nanos_per_million=20_000_000 if attempt else None,
            parts=(Part(f"a{payer}{number}{attempt}", tokens),),
            failed_texts=number % 2,
            charged_at_ms=log.now_ms - age_ms,
        )
        history.append((log.append(Destination("usage", usage)), usage))


def a_bill(log: MemoryLog, attempt: str, *, tokens: int = 3, outcome: CallOutcome | None = CallOutcome.OK) -> None:
    """The intent of an attempt and its receipt, or without an outcome the intent alone."""
    price: dict[str, Any] = {"price_nanos_per_million": 1_000_000, "attempt_id": attempt}
    log.append(Destination("calls", a_call(estimated_tokens=tokens, confirm_by_ms=log.now_ms + 1_000, **price)))
    if outcome is not None:
        log.append(Destination("calls", a_call(CallKind.RECEIPT, outcome=outcome, billed_tokens=tokens, **price)))


def a_charge(log: MemoryLog, attempt: str, *, number: int = 0, tokens: int = 3) -> None:
    """Of a request of one text, embedded by this attempt."""
    request = a_request(correlation_id=f"r{number}")
    usage = a_usage(request, billed=Amounts(1, tokens, 5, tokens), parts=(Part(attempt, tokens),))
    log.append(Destination("usage", usage))


@contextmanager
def a_bench(log: MemoryLog | None = None) -> Iterator[Bench]:
    """With a store of its own, and an empty log unless one is given."""
    with tempfile.TemporaryDirectory() as directory:
        yield Bench(log or MemoryLog(), Path(directory) / "store.sqlite")
