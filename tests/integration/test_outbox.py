"""What is produced on Apache Kafka: where it lands, in what order, and what is never sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from processor.adapters import topics
from processor.adapters.avro import Codec, partition_of
from processor.adapters.faust_engine import Engine
from processor.adapters.outbox import KafkaOutbox
from processor.domain import DeadLetter, DlqClass, ReceivedResult
from processor.errors import DeliveryFailed, LeaseLost, RecordTooLarge
from processor.ports import Destination
from processor.settings import Settings
from tests.support.brokers import Broker
from tests.support.builders import a_call, a_record, a_request, a_result
from tests.support.engines import Handler, engine_settings

PARTITIONS = 3


@dataclass
class ALease:
    """A lease that is held or not, as the test says."""

    topic: str = "embedding-requests"
    partition: int = 0
    generation: int = 1
    revoked: bool = False
    is_held: bool = True

    def held(self) -> bool:
        return self.is_held

    def finish(self, offset: int) -> None:
        raise AssertionError("an outbox finishes nothing")


class Posted:
    """An outbox and a look at what it sent."""

    def __init__(self, settings: Settings, outbox: KafkaOutbox) -> None:
        self.settings = settings
        self.outbox = outbox

    async def log(self, name: str) -> Mapping[int, list[Any]]:
        """All records of a topic by partition, in offset order."""
        topic = self.settings.topic(topics.topics()[name].name)
        partitions = [TopicPartition(topic, each) for each in range(PARTITIONS)]
        async with AIOKafkaConsumer(bootstrap_servers=self.settings.bootstrap_servers) as consumer:
            consumer.assign(partitions)
            await consumer.seek_to_beginning()
            ends = await consumer.end_offsets(partitions)
            records: dict[int, list[Any]] = {each: [] for each in range(PARTITIONS)}
            while any([await consumer.position(each) < end for each, end in ends.items()]):
                for partition, fetched in (await consumer.getmany(timeout_ms=500)).items():
                    records[partition.partition] += fetched
        return records

    async def values(self, name: str) -> list[bytes | None]:
        return [record.value for records in (await self.log(name)).values() for record in records]


@asynccontextmanager
async def posting(broker: Broker, unique: str, **overrides: Any) -> AsyncIterator[Posted]:
    """An outbox on the engine's own producer, without the engine; the topics are made first."""
    settings = engine_settings(broker.bootstrap_servers, topic_prefix=f"{unique}-", **overrides)
    await topics.create(settings, partitions=PARTITIONS, replication=1)
    producer: AIOKafkaProducer = Engine(settings, app_id=unique, topics=[], handler=Handler()).new_producer()
    await producer.start()
    try:
        yield Posted(settings, KafkaOutbox(settings, Codec.from_settings(settings), lambda: producer))
    finally:
        await producer.stop()


def result(correlation_id: str, chunk_id: str) -> Destination:
    return Destination("results", a_result(a_request(correlation_id=correlation_id), chunk_id=chunk_id))


async def test_a_message_lands_in_the_partition_of_its_key(kafka: Broker, unique: str) -> None:
    """Java's partitioner finds what was sent, and a reply goes where it was asked for."""
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([])
        reply_topic = posted.settings.topic("embedding-replies")
        reply = Destination("replies", a_result(), topic=reply_topic, partition=2)
        await posted.outbox.send([reply, *(result(f"corr-{n}", "c0") for n in range(20))])
        landed = await posted.log("results")
        assert sum(map(len, landed.values())) == 20
        for partition, records in landed.items():
            assert [partition_of(record.key, PARTITIONS) for record in records] == [partition] * len(records)
        assert [len(records) for records in (await posted.log("replies")).values()] == [0, 0, 1]


async def test_order_is_kept_within_and_across_calls(kafka: Broker, unique: str) -> None:
    """Calls that wait for room in the producer's buffer don't overtake one another."""
    codec = Codec()
    async with posting(kafka, unique) as posted:
        big = a_request(metadata={"pad": "x" * 7_000})
        calls = [
            [Destination("results", a_result(big, chunk_id=f"{call}.{part}")) for part in range(10)]
            for call in range(60)
        ]
        sending = []
        for call in calls:
            sending.append(asyncio.create_task(posted.outbox.send(call)))
            await asyncio.sleep(0.0005)  # so that some arrive when room was just made and others still wait for it
        await asyncio.gather(*sending)
        records = [record for records in (await posted.log("results")).values() for record in records]
    received = [await codec.read(ReceivedResult, record.value) for record in records]
    order = [each.chunk_id for each in received if isinstance(each, ReceivedResult)]
    assert order == [f"{call}.{part}" for call in range(60) for part in range(10)]


async def test_without_its_lease_nothing_is_sent(kafka: Broker, unique: str) -> None:
    """One lease that is not held stops the whole call; when all are held it passes."""
    held, lost = ALease(), ALease(partition=1, is_held=False)
    async with posting(kafka, unique) as posted:
        with pytest.raises(LeaseLost, match="embedding-requests/1"):
            await posted.outbox.send([result("corr-1", "c0")], leases=[held, lost])
        assert await posted.values("results") == []
        lost.is_held = True
        await posted.outbox.send([result("corr-1", "c0")], leases=[held, lost])
        assert len(await posted.values("results")) == 1


async def test_a_message_that_is_too_large_does_not_poison_the_producer(kafka: Broker, unique: str) -> None:
    """It is refused before anything of its call is sent, and what comes after it is delivered."""
    large = Destination("results", a_result(a_request(metadata={"pad": "x" * 70_000})))
    async with posting(kafka, unique, max_record_bytes=60_000, max_request_bytes=10_000) as posted:
        with pytest.raises(RecordTooLarge, match="EMBEDDING_MAX_RECORD_BYTES is 60000"):
            await posted.outbox.send([result("corr-1", "c0"), large])
        assert await posted.values("results") == []
        await posted.outbox.send([result("corr-1", "c1")])
        assert len(await posted.values("results")) == 1


async def test_a_receipt_is_awaited_later(kafka: Broker, unique: str) -> None:
    """`post` hands over; awaiting what it returns means that the broker has it."""
    async with posting(kafka, unique) as posted:
        acknowledgement = await posted.outbox.post(Destination("calls", a_call()))
        await acknowledgement
        assert len(await posted.values("calls")) == 1


async def test_a_dead_letter_with_neither_key_nor_value_is_delivered(kafka: Broker, unique: str) -> None:
    """The oddest record still ends where somebody finds it, with its place in the headers."""
    letter = DeadLetter(record=a_record(None, offset=7), reason=DlqClass.UNDECODABLE, code="null_value", at_ms=1)
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([Destination("dlq", letter)])
        (record,) = [record for records in (await posted.log("dlq")).values() for record in records]
        assert dict(record.headers)["source_offset"] == b"7"


async def test_after_a_failed_delivery_nothing_more_is_sent(kafka: Broker, unique: str) -> None:
    """A topic that does not exist can't be delivered to in time; from then on every call fails at once."""
    async with posting(kafka, unique, delivery_timeout_s=1) as posted:
        nowhere = Destination("replies", a_result(), topic=f"{unique}-nowhere", partition=0)
        with pytest.raises(DeliveryFailed):
            await posted.outbox.send([nowhere])
        with pytest.raises(DeliveryFailed, match="an earlier delivery failed"):
            await posted.outbox.send([result("corr-1", "c0")])
        with pytest.raises(DeliveryFailed, match="an earlier delivery failed"):
            await posted.outbox.post(Destination("calls", a_call()))
        assert await posted.values("results") == []
