"""`usage audit`: reads the topics, the aggregator's store and an invoice, and holds them against a recomputation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from processor.accounts import Ledger, TaskKey, TaskProgress, texts_of_key
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.adapters.sqlite_store import SqliteStore
from processor.aggregate import DAY_MS, summarise
from processor.app import folded_topics
from processor.audit import Audit, Extent
from processor.budgets import read_budgets
from processor.cli.console import money, visible
from processor.cli.totals import read_published
from processor.domain import ProviderCall, Source, Usage
from processor.errors import StoreError, TopicsError
from processor.findings import (
    Breach,
    BudgetsCheck,
    LedgerCheck,
    Line,
    TasksCheck,
    TotalsCheck,
    UsageCheck,
    sentences,
)
from processor.invoice import DayBill, InvoiceLine
from processor.ports import RecordReader, TopicReader, Undecodable
from processor.settings import Settings
from processor.totals import FoldedTopics

T = TypeVar("T")

TRIES = 3
"""So often are the logs read when their heads expire meanwhile, which is once in days."""

FOLDED = frozenset(
    {
        *("attempts", "billed_tokens", "attributed_tokens", "waste_attempts", "waste_tokens", "waste_cost_nanos"),
        *("uncharged_attempts", "uncharged_tokens", "uncharged_cost_nanos", "unconfirmed_attempts"),
        *("unconfirmed_max_tokens", "unconfirmed_max_cost_nanos", "unpriced_tokens", "over_attributed_attempts"),
        *("over_attributed_tokens", "unmatched_tokens", "recovered_attempts", "recovered_tokens"),
    }
)
"""Sums of `accounts.Ledger` that the audit recomputes."""


class LedgerDifference(NamedTuple):
    """A sum of the aggregator's own ledger that is not what the logs say."""

    name: str
    stored: int
    recomputed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found. `undecodable`: records of usage and calls that nobody could read; they are dead letters.

    `ledger_differences` is None when the aggregator's store could not be compared; `store_note` says why.
    """

    usage: UsageCheck
    totals: TotalsCheck
    ledger: LedgerCheck
    budgets: BudgetsCheck = field(default_factory=BudgetsCheck)
    tasks: TasksCheck = field(default_factory=TasksCheck)
    undecodable: Sequence[Source] = ()
    ledger_differences: Sequence[LedgerDifference] | None = None
    store_note: str = ""
    invoice: Sequence[InvoiceLine] = ()
    invoice_note: str = ""
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether everything is explained: what is published agrees, nothing is breached, the invoice may be right."""
        return (
            not self.totals.differences
            and not self.budgets.differences
            and not self.tasks.differences
            and not any(line.attempts for line in self.ledger.breaches.values())
            and self.ledger.balanced
            and not self.ledger_differences
            and all(line.inside for line in self.invoice)
        )

    def fields(self) -> dict[str, Any]:
        """The summary as JSON has it; differences and findings are counted here and listed apart."""
        ledger = self.ledger
        return {
            "clean": self.clean,
            "seconds": round(self.seconds, 3),
            "usage": asdict(self.usage),
            "undecodable": len(self.undecodable),
            "totals": asdict(self.totals) | {"differences": len(self.totals.differences)},
            "budgets": asdict(self.budgets) | {"differences": len(self.budgets.differences)},
            "tasks": asdict(self.tasks) | {"differences": len(self.tasks.differences)},
            "ledger": {
                "billed": asdict(ledger.billed),
                "attributed": asdict(ledger.attributed),
                "recovered": asdict(ledger.recovered),
                "failed_attempts": ledger.failed_attempts,
                "balanced": ledger.balanced,
                "residuals": {kind.value: asdict(line) for kind, line in ledger.residuals.items()},
                "breaches": {kind.value: asdict(line) for kind, line in ledger.breaches.items()},
            },
            "store": self.store_note or ("differs" if self.ledger_differences else "agrees"),
            "invoice_note": self.invoice_note,
            "invoice_lines": len(self.invoice),
            "invoice_outside": sum(not line.inside for line in self.invoice),
        }


async def run_audit(
    settings: Settings,
    *,
    invoice: Mapping[str, DayBill] | None = None,
    provider: str | None = None,
    store: Path | None = None,
) -> AuditReport:
    """Audit what is retained now, beside running workers and aggregators. Nothing is changed.

    `invoice`: UTC day "2026-11-21" -> bill, of the deployment `provider` or of all; `store`: the aggregator's, default
    that of the settings where there is such a file. Raises BrokerUnavailable, TopicsError, StoreError.
    """
    begun_at, now_ms = time.monotonic(), time.time_ns() // 1_000_000
    if store is not None:
        _check_store(store)
    codec = Codec.from_settings(settings)
    try:
        books, unread, ends = await read_books(
            KafkaReader(settings, group_id=settings.aggregator_group_id),
            codec,
            folded_topics(settings),
            horizon_ms=settings.horizon_days * DAY_MS,
            now_ms=now_ms,
            token_types=None if "*" in settings.usage_token_types else frozenset(settings.usage_token_types),
            provider=provider,
        )
    finally:
        await codec.close()
    differences, note = compare_store(settings, store, books, ends, now_ms)
    return AuditReport(
        usage=books.usage,
        totals=books.totals(),
        ledger=books.ledger,
        budgets=books.budgets(),
        tasks=books.tasks(),
        undecodable=unread,
        ledger_differences=differences,
        store_note=note,
        invoice=list(books.bills.check(invoice or {})),
        invoice_note=books.bills.stranger,
        seconds=time.monotonic() - begun_at,
    )


async def read_books(
    reader: TopicReader,
    decoder: RecordReader,
    topics: FoldedTopics,
    *,
    horizon_ms: int,
    now_ms: int,
    token_types: frozenset[str] | None,
    provider: str | None = None,
) -> tuple[Audit, list[Source], dict[tuple[str, int], int]]:
    """The finished audit, the places of records that nobody could read, and (topic, partition) -> end of reading.

    In this order: what is committed has been published, what is published stands in the log, and what a charge names
    has its intent. Records that expire meanwhile would look like differences: then all is read once more.
    Raises TopicsError when they always do.
    """
    for _ in range(TRIES):
        folded_to = await reader.committed(topics.usage)
        progress = await read_progress(topics.progress, reader, decoder)
        budgets = await read_budgets(topics.budgets, reader, decoder)
        published = await read_published(reader, decoder, topics.totals)
        logs = {topic: await _extents(reader, topic) for topic in (topics.usage, topics.calls)}
        audit = Audit(
            published={key: bucket.partitions for key, bucket in published.items()},
            newest={key: bucket.newest for key, bucket in published.items()},
            progress=progress,
            budgets=budgets,
            folded_to=folded_to,
            usage_log=logs[topics.usage],
            calls_log=logs[topics.calls],
            horizon_ms=horizon_ms,
            now_ms=now_ms,
            token_types=token_types,
            provider=provider,
        )
        unread: list[Source] = []
        ends: dict[tuple[str, int], int] = {}
        async for source, usage in _messages(reader, decoder, topics.usage, Usage, unread, ends):
            audit.take_usage(source, usage)
        if any(span.begin > 0 for span in (await reader.spans(topics.late)).values()):
            audit.forget_quarantine()
        async for _, usage in _messages(reader, decoder, topics.late, Usage, [], {}):
            audit.take_quarantined(usage)
        async for source, call in _messages(reader, decoder, topics.calls, ProviderCall, unread, ends):
            audit.take_call(source, call)
        audit.finish({partition: end for (topic, partition), end in ends.items() if topic == topics.usage})
        if not [topic for topic, log in logs.items() if await _has_expired(reader, topic, log)]:
            return audit, unread, ends
    raise TopicsError(f"{topics.usage} or {topics.calls} loses records while it is read: raise its retention")


async def read_progress(topic: str, reader: TopicReader, decoder: RecordReader) -> dict[TaskKey, TaskProgress]:
    """What the progress topic (by its full name) holds."""
    tasks: dict[TaskKey, TaskProgress] = {}
    async with aclosing(reader.read(topic)) as fetched:
        async for records in fetched:
            for record in records:
                texts = texts_of_key(record.key, len(TaskKey._fields))
                if texts is not None:
                    task = await decoder.read(TaskProgress, record.value)
                    if isinstance(task, Undecodable):
                        tasks.pop(TaskKey(*texts), None)
                    else:
                        tasks[TaskKey(*texts)] = task
    return tasks


async def _has_expired(reader: TopicReader, topic: str, log: Mapping[int, Extent]) -> bool:
    """Whether records were removed since."""
    spans = await reader.spans(topic)
    return any(spans[partition].begin > extent.begin for partition, extent in log.items() if partition in spans)


async def _extents(reader: TopicReader, topic: str) -> dict[int, Extent]:
    spans = await reader.spans(topic)
    begins = {partition: span.begin for partition, span in spans.items() if 0 < span.begin < span.end}
    first = await reader.records_at(topic, begins)
    return {
        partition: Extent(span.begin, span.end, first[partition].source.append_ms if partition in first else None)
        for partition, span in spans.items()
    }


async def _messages(
    reader: TopicReader,
    decoder: RecordReader,
    topic: str,
    kind: type[T],
    unread: list[Source],
    ends: dict[tuple[str, int], int],
) -> AsyncIterator[tuple[Source, T]]:
    """What a topic holds; `ends` notes how far it was read."""
    async with aclosing(reader.read(topic)) as fetched:
        async for records in fetched:
            for record in records:
                message = await decoder.read(kind, record.value)
                if isinstance(message, Undecodable):
                    unread.append(record.source)
                else:
                    yield record.source, message
            last = records[-1].source
            ends[topic, last.partition] = last.offset + 1


def _check_store(path: Path) -> None:
    """Before an hour of reading. Its own fault would have the file deleted, and it may be anything."""
    try:
        SqliteStore(path, read_only=True).close()
    except StoreError:
        raise StoreError(f"--store: {path} is no aggregator's store, or not one of this version") from None


def compare_store(
    settings: Settings, path: Path | None, books: Audit, ends: Mapping[tuple[str, int], int], now_ms: int
) -> tuple[list[LedgerDifference] | None, str]:
    """The aggregator's ledger beside ours, where both stand at the same offsets; else why they can't be compared."""
    places = list(ends)
    if path is None and not settings.aggregator_store.exists():
        return None, f"not compared: there is no {settings.aggregator_store} here"
    try:
        with closing(SqliteStore(path or settings.aggregator_store, read_only=True)) as store:
            before = [store.cursor(*place) for place in places]
            summary = summarise(store.ledger(), store.open_attempts(), now_ms)
            if before != [store.cursor(*place) for place in places]:
                return None, "not compared: the aggregator is folding; run it again"
    except StoreError as error:  # one that nobody asked for must not cost the audit, which may have read for an hour
        if path is not None:
            raise
        return None, f"not compared: {error}"
    stands_at = [cursor.next_offset if cursor else 0 for cursor in before]
    if books.has_lost_records:
        return None, "not compared: the logs have lost records that the ledger was made of"
    if apart := sum(abs(end - offset) for end, offset in zip(ends.values(), stands_at, strict=True)):
        return None, f"not compared: the aggregator stands {apart} records from where the audit read to; run it again"
    folded = summary.sums._asdict()
    return [
        LedgerDifference(name, folded[name], books.as_folded[name])
        for name in Ledger._fields
        if name in FOLDED and folded[name] != books.as_folded[name]
    ], ""


# --- for people and programs -------------------------------------------------------------------------------


def audit_lines(report: AuditReport) -> Iterator[dict[str, Any]]:
    """Each difference, finding and day of the invoice as JSON has it."""
    for each in report.totals.differences:
        yield {"found": "difference", **each.key._asdict(), **{k: v for k, v in each._asdict().items() if k != "key"}}
    for word, differences in (
        ("budget_difference", report.budgets.differences),
        ("task_difference", report.tasks.differences),
    ):
        for difference in differences:
            fields = difference._asdict()
            yield {"found": word, **fields.pop("key")._asdict(), **fields}
    for ledger_difference in report.ledger_differences or ():
        yield {"found": "ledger_difference", **ledger_difference._asdict()}
    for finding in report.ledger.findings:
        word = "breach" if isinstance(finding.kind, Breach) else "residual"
        yield {"found": word, **finding._asdict()}
    for source in report.undecodable:
        yield {"found": "undecodable", **source._asdict()}
    for line in report.invoice:
        known = line.known
        yield {
            "found": "invoice",
            "day": line.day,
            "tokens": line.billed.tokens,
            "amount_usd": None if line.billed.amount is None else f"{line.billed.amount:f}",
            "low_tokens": known.low_tokens,
            "high_tokens": known.high_tokens,
            "low_usd": usd(known.low_micronanos),
            "high_usd": None if known.unpriced_tokens else usd(known.high_micronanos),
            "provable": line.provable,
            "inside": line.inside,
        }


def print_audit(report: AuditReport, console: Console) -> None:
    """The report, the verdict last."""
    for sentence in _sentences(report):
        console.print(visible(sentence), markup=False, highlight=False)
    console.print(_ledger_table(report.ledger))
    for finding in sentences(report.ledger.findings):
        console.print(visible(finding), markup=False, highlight=False)
    if report.invoice:
        console.print(_invoice_table(report.invoice))
    if report.invoice_note:
        console.print(visible(report.invoice_note), markup=False, highlight=False)
    verdict = "clean: everything is explained" if report.clean else "NOT CLEAN: see what differs above"
    console.print(f"{verdict} ({report.seconds:.1f} s)", markup=False, highlight=False)


def _sentences(report: AuditReport) -> Iterator[str]:
    usage, totals = report.usage, report.totals
    yield (
        f"usage: {usage.events:,} events, {usage.charges:,} charges, {usage.duplicates:,} duplicates, "
        f"{usage.late.attempts:,} late ({usage.late.tokens:,} tokens, {_cost(usage.late)}), "
        f"{usage.others:,} of others, {usage.not_folded:,} not folded yet"
    )
    yield (
        f"totals: {totals.buckets:,} buckets, {totals.proven:,} proven, {totals.not_provable:,} not provable from this "
        f"log, {len(totals.differences):,} differences"
    )
    for key, partition, name, published, recomputed in totals.differences:
        where, who = f", usage partition {partition}", "the log says"
        if partition is None:
            where, who = "", "its partitions come to"
        yield f"DIFFERENCE {'/'.join(filter(None, key))}{where}: {name} is {published:,}, {who} {recomputed:,}"
    budgets = report.budgets
    waiting = "" if budgets.compared else "; they may lag while charges wait to be folded"
    yield f"budgets: {budgets.states:,} states, {len(budgets.differences):,} differences{waiting}"
    for (payer_id, month), name, theirs, ours in budgets.differences:
        payer = payer_id or "everybody else"
        yield f"DIFFERENCE budget of {payer}, {month}: {name} is {_told(theirs)}, the log says {_told(ours)}"
    tasks = report.tasks
    yield f"tasks: {tasks.tasks:,} tasks, {tasks.proven:,} proven, {len(tasks.differences):,} differences"
    for (tenant_id, task_id), name, shown, counted in tasks.differences:
        yield f"DIFFERENCE task {task_id} of {tenant_id}: {name} is {_told(shown)}, the log says {_told(counted)}"
    if report.ledger_differences is not None:
        yield f"the aggregator's own ledger: {len(report.ledger_differences)} differences"
    else:
        yield f"the aggregator's own ledger: {report.store_note}"
    for name, stored, recomputed in report.ledger_differences or ():
        yield f"DIFFERENCE ledger: {name} is {stored:,}, the log says {recomputed:,}"
    for topic, partition, offset, _ in report.undecodable:
        yield f"undecodable: {topic}:{partition}:{offset}; it is a dead letter, and counts nowhere"
    if not report.ledger.balanced:
        yield "DIFFERENCE ledger: billed is not attributed + residuals"


def _ledger_table(ledger: LedgerCheck) -> Table:
    view = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    view.add_column("provider calls")
    for name in ("attempts", "tokens", "cost"):
        view.add_column(name, justify="right")
    lines = {"billed (receipts)": ledger.billed, "attributed (receipts)": ledger.attributed}
    lines |= {str(kind): line for kind, line in ledger.residuals.items() if line.attempts}
    lines["recovered (no receipt)"] = ledger.recovered
    lines |= {f"BREACH {kind}": line for kind, line in ledger.breaches.items() if line.attempts}
    for name, line in lines.items():
        view.add_row(name, f"{line.attempts:,}", f"{line.tokens:,}", _cost(line))
    view.add_row("failed (billed nothing)", f"{ledger.failed_attempts:,}", "0", money(0))
    return view


def _invoice_table(lines: Sequence[InvoiceLine]) -> Table:
    view = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    view.add_column("invoice")
    for name in ("tokens", "receipts", "and unconfirmed", "amount", "receipts", "and unconfirmed"):
        view.add_column(name, justify="right")
    view.add_column("")
    for line in lines:
        billed, known = line.billed, line.known
        view.add_row(
            line.day,
            "" if billed.tokens is None else f"{billed.tokens:,}",
            f"{known.low_tokens:,}",
            f"{known.high_tokens:,}",
            "" if billed.amount is None else f"${billed.amount:f}",
            f"${usd(known.low_micronanos)}",
            f"{known.unpriced_tokens:,} unpriced" if known.unpriced_tokens else f"${usd(known.high_micronanos)}",
            "not provable" if not line.provable else "inside" if line.inside else "OUTSIDE",
        )
    return view


def _told(value: int | str | None) -> str:
    if value is None:
        return "not named"
    return value if isinstance(value, str) else f"{value:,}"


def _cost(line: Line) -> str:
    return money(line.cost_nanos) + (f" + {line.unpriced_tokens:,} unpriced" if line.unpriced_tokens else "")


def usd(micronanos: int) -> str:
    """Exact dollars of a product of tokens and nano-dollars a million tokens, never in scientific notation."""
    return f"{Decimal(micronanos).scaleb(-15).normalize():f}"
