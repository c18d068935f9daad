"""`usage rebuild`: the aggregator's store is set aside; totals and tasks of a log that is no more are forgotten."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path

from processor.adapters import rebuild
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.adapters.sqlite_store import SqliteStore
from processor.app import folded_topics
from processor.errors import StoreError
from processor.ports import Span
from processor.settings import Settings
from processor.totals import FORGET_TOTALS, FoldedTopics, merge_totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a rebuild does. `buckets`, `tasks`: keys of published totals and progress to delete -> their partition."""

    store: Path | None
    buckets: Mapping[bytes, int]
    tasks: Mapping[bytes, int]
    offsets: Mapping[tuple[str, int], int]
    losses: Sequence[str]

    def sentences(self) -> Iterator[str]:
        """For people, in the order of doing."""
        if self.store is None:
            yield "there is no store here: nothing to set aside"
        else:
            yield f"set {self.store} aside"
        if self.buckets:
            yield f"delete {len(self.buckets)} published totals"
        if self.tasks:
            yield f"delete the progress of {len(self.tasks)} tasks"
        if self.offsets:
            yield f"put the aggregator's committed offset back in {len(self.offsets)} partitions"
        yield from self.losses


async def plan(settings: Settings, *, forget_totals: bool) -> Plan:
    """What is to be done; nothing is changed. Raises StoreError while the aggregator runs, and, without
    `forget_totals`, when the published totals are those of another log."""
    await rebuild.refuse_while_active(settings)
    topics = folded_topics(settings)
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    spans = {topic: await reader.spans(topic) for topic in (topics.usage, topics.calls, topics.documents)}
    losses = []
    try:
        await _check_totals(settings, topics, spans[topics.usage], reader)
    except StoreError as error:
        if not forget_totals or FORGET_TOTALS not in str(error):
            raise
    else:
        if forget_totals:
            losses.append("NOT NEEDED: the published totals are those of this log; without --forget-totals they stay")
    offsets = {}
    for topic, partitions in spans.items():
        for partition, committed in (await reader.committed(topic)).items():
            span = partitions.get(partition, Span(0, 0))
            if committed > span.end or (forget_totals and topic == topics.usage and committed > span.begin):
                offsets[topic, partition] = span.begin
    if forget_totals:
        losses += [
            f"LOST: {topics.usage} partition {partition} begins at offset {span.begin}: charges that have expired "
            "will be in no total and no task, and others older than 30 days that may have had an expired first copy in "
            "no total"
            for partition, span in sorted(spans[topics.usage].items())
            if span.begin > 0
        ]
    return Plan(
        store=settings.aggregator_store if settings.aggregator_store.exists() else None,
        buckets=await _live_keys(reader, topics.totals) if forget_totals else {},
        tasks=await _live_keys(reader, topics.progress) if forget_totals else {},
        offsets=offsets,
        losses=losses,
    )


async def carry_out(settings: Settings, planned: Plan) -> Path | None:
    """Do it; done again after a failure it ends the same. Returns where the store lies now."""
    await rebuild.refuse_while_active(settings)
    aside = None if planned.store is None else _set_aside(planned.store)
    topics = folded_topics(settings)
    await rebuild.delete_keys(settings, topics.totals, planned.buckets)
    await rebuild.delete_keys(settings, topics.progress, planned.tasks)
    await rebuild.commit_offsets(settings, planned.offsets)
    return aside


async def _check_totals(
    settings: Settings, topics: FoldedTopics, spans: Mapping[int, Span], reader: KafkaReader
) -> None:
    """What the aggregator does when it starts without a store, in a store that nobody keeps."""
    codec = Codec.from_settings(settings)
    try:
        with tempfile.TemporaryDirectory() as folder, closing(SqliteStore(Path(folder) / "store.sqlite")) as store:
            store.claim()
            await merge_totals(topics, spans, store, reader, codec)
    finally:
        await codec.close()


async def _live_keys(reader: KafkaReader, topic: str) -> dict[bytes, int]:
    keys: dict[bytes, int] = {}
    async with aclosing(reader.read(topic)) as fetched:
        async for records in fetched:
            for record in records:
                if record.key is not None and record.value is not None:
                    keys[record.key] = record.source.partition
                elif record.key is not None:
                    keys.pop(record.key, None)
    return keys


def _set_aside(store: Path) -> Path:
    """Rename the file and what SQLite keeps beside it, so that it can still be looked into."""
    aside = store.with_name(f"{store.name}.aside-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    try:
        for end in ("-wal", "-shm", ""):  # the store itself last: it is what is looked for, should this be cut short
            part = store.with_name(store.name + end)
            if part.exists():
                part.rename(aside.with_name(aside.name + end))
    except OSError as error:
        raise StoreError(f"aggregator_store: can't rename {store}: {error.strerror}; fix the rights") from None
    return aside
