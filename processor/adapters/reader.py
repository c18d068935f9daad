"""Reads topics from their beginning to their end, outside of any group: how a lost store is made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from processor.adapters import topics
from processor.adapters.kafka import connection, unavailable
from processor.domain import Record, Source
from processor.errors import BrokerUnavailable, TopicsError
from processor.ports import Span
from processor.settings import Settings

POLL_MS = 1_000
IDLE_POLLS = 60
"""Empty polls in a row, short of the end, after which the broker is held to be gone."""
COORDINATOR_WAIT_S, COORDINATOR_POLL_S = 10.0, 0.2
"""How long a group's coordinator may take to appear, and between two looks for it."""


class KafkaReader:
    """Implements `ports.TopicReader` over plain consumers, one per call. `group_id`: whose commits are asked for."""

    def __init__(self, settings: Settings, *, group_id: str) -> None:
        self._settings = settings
        self._group_id = group_id

    async def spans(self, topic: str) -> Mapping[int, Span]:
        """Raises TopicsError when there is no such topic."""
        async with self._consumer(topic) as consumer:
            spans = await self._spans(consumer)
            return {place.partition: span for place, span in spans.items()}

    async def records_at(self, topic: str, offsets: Mapping[int, int]) -> Mapping[int, Record]:
        found: dict[int, Record] = {}
        if not offsets:
            return found
        async with self._consumer(topic) as consumer:
            begin = {TopicPartition(topic, partition): offset for partition, offset in offsets.items()}
            async for place, records in _fetch(consumer, begin, stop_after_first=True):
                if records[0].offset == begin[place]:
                    found[place.partition] = _record(records[0])
        return found

    async def committed(self, topic: str) -> Mapping[int, int]:
        places = await self._places(topic)
        async with self._admin() as admin, asyncio.timeout(COORDINATOR_WAIT_S):
            while True:
                try:
                    found = await admin.list_consumer_group_offsets(self._group_id, partitions=places)
                    break
                except GroupCoordinatorNotAvailableError:  # the first question about any group makes brokers get ready
                    await asyncio.sleep(COORDINATOR_POLL_S)
        return {place.partition: known.offset for place, known in found.items() if known.offset >= 0}

    async def offsets_at(self, topic: str, at_ms: int) -> Mapping[int, int]:
        """Of every partition the first offset that was appended at that time or later, else its end."""
        async with self._consumer(topic) as consumer:
            spans = await self._spans(consumer)
            found = await consumer.offsets_for_times(dict.fromkeys(spans, at_ms))
            return {
                place.partition: span.end if found.get(place) is None else found[place].offset
                for place, span in spans.items()
            }

    async def read(self, topic: str, begin: Mapping[int, int] | None = None) -> AsyncGenerator[Sequence[Record], None]:
        async with self._consumer(topic) as consumer:
            wanted, spans = begin or {}, await self._spans(consumer)
            first = {
                place: offset if span.begin <= (offset := wanted.get(place.partition, -1)) <= span.end else span.begin
                for place, span in spans.items()
            }
            async for _, records in _fetch(consumer, first, {place: span.end for place, span in spans.items()}):
                yield [_record(record) for record in records]

    async def _spans(self, consumer: Any) -> Mapping[TopicPartition, Span]:
        spans = await _spans(consumer)
        return spans if self._settings.producer_idempotent else await _with_last_batch(consumer, spans)

    async def _places(self, topic: str) -> list[TopicPartition]:
        """Every partition of the topic. TopicsError when there is none."""
        count = (await topics.partition_counts(self._settings, [topic])).get(topic)
        if not count:
            raise TopicsError(f"{topic}: is missing; run `{topics.CREATE_COMMAND}`")
        return [TopicPartition(topic, partition) for partition in range(count)]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings, error) from error

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        with self._translated():
            admin = AIOKafkaAdminClient(**connection(self._settings))
            try:
                await admin.start()
                yield admin
            finally:
                await admin.close()

    @asynccontextmanager
    async def _consumer(self, topic: str) -> AsyncIterator[Any]:
        """A consumer that has every partition of the topic."""
        places = await self._places(topic)
        with self._translated():
            consumer = AIOKafkaConsumer(
                group_id=None, enable_auto_commit=False, auto_offset_reset="earliest", **connection(self._settings)
            )
            try:
                await consumer.start()
                consumer.assign(places)
                yield consumer
            finally:
                await consumer.stop()


async def _spans(consumer: Any) -> dict[TopicPartition, Span]:
    places = consumer.assignment()
    begins = await consumer.beginning_offsets(places)
    ends = await consumer.end_offsets(places)
    return {place: Span(begins[place], ends[place]) for place in places}


async def _with_last_batch(consumer: Any, spans: Mapping[TopicPartition, Span]) -> dict[TopicPartition, Span]:
    """The embedded broker (Tansu 0.6) calls the second offset of the last batch the end: read that batch to see."""
    async for _ in _fetch(consumer, {place: span.end - 1 for place, span in spans.items() if span.end > span.begin}):
        pass
    return {
        place: span._replace(end=await consumer.position(place)) if span.end > span.begin else span
        for place, span in spans.items()
    }


async def _fetch(
    consumer: Any,
    begin: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int] | None = None,
    *,
    stop_after_first: bool = False,
) -> AsyncIterator[tuple[TopicPartition, Sequence[ConsumerRecord]]]:
    """What these partitions hold from there to these ends, by default the present ones, or each one's first fetch."""
    ends = await consumer.end_offsets(consumer.assignment()) if ends is None else ends
    left = {place for place, offset in begin.items() if offset < ends[place]}
    consumer.pause(*(consumer.assignment() - left))
    consumer.resume(*left)
    for place in left:
        consumer.seek(place, begin[place])
    idle = 0
    while left:
        fetched = await consumer.getmany(*left, timeout_ms=POLL_MS)
        idle = 0 if fetched else idle + 1
        if idle == IDLE_POLLS:
            raise BrokerUnavailable("the broker sends nothing more of a topic that it says is longer")
        for place, records in fetched.items():
            if records:
                yield place, records
        # The position, not the last record's offset: the end of a compacted log may hold no record.
        done = {
            place
            for place in left
            if await consumer.position(place) >= ends[place] or (stop_after_first and fetched.get(place))
        }
        if done:
            consumer.pause(*done)
            left -= done


def _record(record: ConsumerRecord) -> Record:
    return Record(
        Source(record.topic, record.partition, record.offset, record.timestamp),
        record.key,
        record.value,
        record.headers,
    )
