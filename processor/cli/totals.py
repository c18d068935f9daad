"""Usage totals as analytics and billing read them: of each key of the compacted topic the highest last_offset, and
nothing once a null value has deleted it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields
from datetime import date
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from processor.accounts import BucketKey, PublishedTotal, UsageSums
from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.aggregate import PartitionTotals, newest_totals, total_of
from processor.cli.console import money, visible
from processor.ports import RecordReader, TopicReader, Undecodable
from processor.settings import Settings


class Published(NamedTuple):
    """What the topic says of a bucket: of each usage partition the sums of the highest last_offset, and the newest
    record, which stands where a table is just upserted."""

    partitions: PartitionTotals
    newest: PublishedTotal


async def read_totals(settings: Settings) -> dict[BucketKey, UsageSums]:
    """Every bucket with its sums as of now. Raises BrokerUnavailable or TopicsError."""
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    codec = Codec.from_settings(settings)
    try:
        published = await read_published(reader, codec, settings.topic(topics.topics()["totals"].name))
    finally:
        await codec.close()
    return {key: total_of(bucket.partitions) for key, bucket in sorted(published.items())}


async def read_published(reader: TopicReader, decoder: RecordReader, topic: str) -> dict[BucketKey, Published]:
    """The same by usage partition, with the last folded offset of each."""
    buckets: dict[bytes | None, Published] = {}
    async with aclosing(reader.read(topic)) as fetched:
        async for records in fetched:
            for record in records:
                if record.value is None:
                    buckets.pop(record.key, None)
                    continue
                newest = await decoder.read(PublishedTotal, record.value)
                if not isinstance(newest, Undecodable):
                    known = buckets[record.key].partitions if record.key in buckets else {}
                    buckets[record.key] = Published(newest_totals(known, newest.total.partitions), newest)
    return {bucket.newest.total.key: bucket for bucket in buckets.values()}


def is_bucket(text: str) -> bool:
    """Whether it is a day such as 2026-11-21 or a month such as 2026-11."""
    day = text if len(text) == len("2026-11-21") else f"{text}-01"
    try:
        return date.fromisoformat(day).isoformat() == day  # 2026-W47-1 is one too
    except ValueError:
        return False


def add(parts: Iterable[UsageSums]) -> UsageSums:
    parts = list(parts)
    return UsageSums(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(UsageSums)})


def table(totals: Mapping[BucketKey, UsageSums]) -> Table:
    """A row for each bucket; `of` is the value of its dimension."""
    rows = []
    for key, sums in totals.items():
        of = "all" if key.dimension == "all" else escape(f"{key.dimension} {key.value}")
        rows.append(((escape(key.payer_id), key.bucket, of), sums))
    return sums_table(("payer", "bucket", "of"), rows)


def sums_table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], UsageSums]]) -> Table:
    """Rows of sums, each with what they are of."""
    view = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in heads:
        view.add_column(name, overflow="fold")
    for name in (
        "requests",
        "billed texts",
        "billed tokens",
        "cost",
        "cached texts",
        "saved tokens",
        "saved",
        "failed",
    ):
        view.add_column(name, justify="right")
    for names, sums in rows:
        unpriced = "" if not sums.unpriced_tokens else f" + {sums.unpriced_tokens:,} unpriced"
        view.add_row(
            *map(visible, names),
            f"{sums.requests:,}",
            f"{sums.billed_texts:,}",
            f"{sums.billed_tokens:,}",
            money(sums.billed_cost_nanos) + unpriced,
            f"{sums.cached_texts:,}",
            f"{sums.saved_tokens:,}",
            money(sums.saved_cost_nanos),
            f"{sums.failed_texts:,}",
        )
    return view
