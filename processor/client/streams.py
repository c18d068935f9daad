"""Reads a topic of ours outside of any group: to its present end, or on and on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from processor.adapters.kafka import connection
from processor.adapters.reader import KafkaReader
from processor.domain import Record, Source
from processor.errors import BrokerUnavailable, TopicsError
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
    consumer = AIOKafkaConsumer(
        topic,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        **connection(settings),
    )
    try:
        await consumer.start()
        if not consumer.assignment():
            raise TopicsError(f"{topic}: is missing; run `embedding-processor topics create`")
        if not from_beginning:
            for place, end in (await consumer.end_offsets(consumer.assignment())).items():
                consumer.seek(place, end)
        async for record in consumer:
            source = Source(record.topic, record.partition, record.offset, record.timestamp)
            yield Record(source, record.key, record.value, record.headers)
    except (KafkaError, OSError) as error:
        raise BrokerUnavailable(f"Kafka did not answer a reader: {type(error).__name__}") from None
    finally:
        await consumer.stop()
