"""Reads a topic of ours outside of any group: to its present end, or on and on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from processor.adapters import topics
from processor.adapters.kafka import connection, unavailable
from processor.adapters.reader import KafkaReader
from processor.domain import Record, Source
from processor.errors import TopicsError
from processor.settings import Settings


async def read_records(
    settings: Settings, topic: str, *, from_beginning: bool, follow: bool
) -> AsyncGenerator[Record, None]:
    """Records of a topic (full name), each partition in offset order. BrokerUnavailable, or TopicsError if missing."""
    if not follow:
        if from_beginning:
            fetched = KafkaReader(settings, group_id=settings.aggregator_group_id).read(topic)
            async with aclosing(fetched):
                async for records in fetched:
                    for record in records:
                        yield record
        return
    if topic not in await topics.partition_counts(settings, [topic]):  # a consumer that names it may make it
        raise TopicsError(f"{topic}: is missing; run `{topics.CREATE_COMMAND}`")
    consumer = AIOKafkaConsumer(
        topic,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        **connection(settings),
    )
    try:
        await consumer.start()
        if not from_beginning:
            for place, end in (await consumer.end_offsets(consumer.assignment())).items():
                consumer.seek(place, end)
        async for record in consumer:
            source = Source(record.topic, record.partition, record.offset, record.timestamp)
            yield Record(source, record.key, record.value, record.headers)
    except (KafkaError, OSError) as error:
        raise unavailable(settings, error) from None
    finally:
        await consumer.stop()
