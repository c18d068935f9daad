"""The published totals, read back: what an aggregator with an old store or none takes over from their topic."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from processor.accounts import BucketKey, UsageTotal
from processor.aggregate import bucket_of_key, buckets_of
from processor.domain import Usage
from processor.errors import StoreError
from processor.ports import AggregateStore, RecordReader, Span, TopicReader, Undecodable

log = structlog.get_logger(__name__)

FORGET_TOTALS = "run `embedding-processor usage rebuild --forget-totals`"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedTopics:
    """Full names of what the aggregator reads: three as a group member, the totals when it has to catch up, and at an
    assignment the budgets. `late` and `progress` are read by the audit alone."""

    usage: str
    calls: str
    documents: str
    totals: str
    budgets: str
    late: str
    progress: str


async def merge_totals(
    topics: FoldedTopics,
    spans: Mapping[int, Span],
    store: AggregateStore,
    reader: TopicReader,
    decoder: RecordReader,
) -> None:
    """Take the published totals into the store; a null value forgets its bucket. `spans` are those of the usage topic.

    Raises StoreError when they count what is not in the usage topic: it was made again, and charges of its log below
    an old `last_offset` would be passed over. For that the oldest and the newest retained offset that the totals name
    are looked at: the charge there must count in that very bucket.
    """
    merged = 0
    async with aclosing(reader.read(topics.totals)) as runs:
        async for records in runs:
            totals: dict[BucketKey, list[UsageTotal]] = {}
            forgotten: set[BucketKey] = set()
            for record in records:
                if record.value is None:
                    if (key := bucket_of_key(record.key)) is not None:
                        forgotten.add(key)
                        totals.pop(key, None)
                    continue
                total = await decoder.read(UsageTotal, record.value)
                if not isinstance(total, Undecodable):
                    totals.setdefault(total.key, []).append(total)
            store.forget_totals(forgotten)
            store.merge_totals([total for versions in totals.values() for total in versions])
            merged += len(records)
    log.info("aggregator.totals_merged", records=merged)
    counted = store.counted({partition: span.begin for partition, span in spans.items()})
    for partition, last_offset in counted:
        if partition not in spans or last_offset >= spans[partition].end:
            raise _foreign_totals(topics, partition, last_offset)
    retained = sorted((partition, offset) for partition, offset in counted if offset >= spans[partition].begin)
    for offsets in (dict(retained), dict(reversed(retained))):  # the greatest of each, then the least
        for partition, record in (await reader.records_at(topics.usage, offsets)).items():
            usage = await decoder.read(Usage, record.value)
            keys = counted[partition, record.source.offset]
            if isinstance(usage, Undecodable) or not keys <= set(buckets_of(usage)):
                raise _foreign_totals(topics, partition, record.source.offset)


def _foreign_totals(topics: FoldedTopics, partition: int, last_offset: int) -> StoreError:
    return StoreError(
        f"{topics.totals} counts offset {last_offset} of {topics.usage} partition {partition}, and that charge is not "
        f"there: {topics.usage} was made again; {FORGET_TOTALS}"
    )
