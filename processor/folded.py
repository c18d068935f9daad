"""Where the folds of the aggregator's topics stand, by its store, and whether these are still the topics it folded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import aclosing

import structlog

from processor.accounts import Cursor
from processor.domain import Record
from processor.errors import StoreError
from processor.ports import AggregateStore, Span, TopicReader

log = structlog.get_logger(__name__)

REBUILD = "run `embedding-processor usage rebuild`"


async def check_same(topic: str, spans: Mapping[int, Span], store: AggregateStore, reader: TopicReader) -> None:
    """Raises StoreError when the topic is not the one that was folded. A place that has expired since is forgotten."""
    known = store.bind(topic, len(spans))
    if known != len(spans):
        raise StoreError(f"{topic} had {known} partitions and has {len(spans)} now: {REBUILD}")
    cursors = {partition: store.cursor(topic, partition) for partition in spans}
    folded = {partition: cursor for partition, cursor in cursors.items() if cursor is not None}
    for partition, cursor in folded.items():
        if spans[partition].end < cursor.next_offset:
            raise StoreError(
                f"{topic} partition {partition} ends at {spans[partition].end}, before the folded "
                f"{cursor.next_offset}: it was made again; {REBUILD}"
            )
        if spans[partition].begin > cursor.next_offset:
            log.warning(
                "aggregator.store_too_old",
                topic=topic,
                partition=partition,
                next_offset=cursor.next_offset,
                begin_offset=spans[partition].begin,
            )
            store.forget(topic, partition)
    retained = {
        partition: cursor.last_offset
        for partition, cursor in folded.items()
        if cursor.last_offset >= spans[partition].begin
    }
    for partition, record in (await reader.records_at(topic, retained)).items():
        cursor = folded[partition]
        if (record.source.append_ms, crc_of(record)) != (cursor.last_append_ms, cursor.last_crc):
            raise StoreError(
                f"{topic} partition {partition} holds another record at offset {cursor.last_offset} than the "
                f"one that was folded: it was made again; {REBUILD}"
            )


def is_behind(topic: str, partition: int, committed: Mapping[int, int], store: AggregateStore) -> bool:
    """Whether somebody may have published totals that this store does not know: it is new, or another led."""
    cursor = store.cursor(topic, partition)
    return cursor is None or partition not in committed or committed[partition] > cursor.next_offset


def acted_on(committed: int, span: Span) -> int:
    """Up to where somebody sent what is sent once per record. An offset beyond the end was committed of another log:
    then from the begin on, since what is sent twice is better than a late charge or a delete that never is."""
    return committed if committed <= span.end else span.begin


def position(topic: str, partition: int, span: Span, store: AggregateStore) -> int:
    """From where on the partition is to be folded."""
    cursor = store.cursor(topic, partition)
    return span.begin if cursor is None else cursor.next_offset


async def with_ends_of_records(
    topic: str, spans: Mapping[int, Span], store: AggregateStore, reader: TopicReader
) -> Mapping[int, Span]:
    """What is still to be folded ends with a record: other services may write in transactions, whose markers take
    offsets for which no record ever comes. Without this, a partition that is quiet after one is a backlog for ever.
    """
    begins = {partition: position(topic, partition, span, store) for partition, span in spans.items()}
    last = {partition: span.end - 1 for partition, span in spans.items() if begins[partition] < span.end}
    odd = last.keys() - (await reader.records_at(topic, last)).keys()
    if not odd:
        return spans
    ends = {partition: begins[partition] if partition in odd else span.end for partition, span in spans.items()}
    async with aclosing(reader.read(topic, ends)) as runs:
        async for records in runs:
            source = records[-1].source
            if source.partition in odd:
                ends[source.partition] = source.offset + 1
    return {partition: span._replace(end=ends[partition]) for partition, span in spans.items()}


def crc_of(record: Record) -> int:
    """CRC-32 of key and value, as the cursor keeps it."""
    return zlib.crc32(record.value or b"", zlib.crc32(record.key or b""))


def cursor_after(last: Record, seen_only_until_ms: int | None = None) -> Cursor:
    """Where a partition stands once this record is folded."""
    source = last.source
    return Cursor(source.offset + 1, source.offset, source.append_ms, crc_of(last), seen_only_until_ms)
