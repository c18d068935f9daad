"""One suite for every `TopicReader`: the one on Kafka, and the log in memory that the aggregator's unit tests use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from processor.adapters.reader import KafkaReader
from processor.client.streams import read_records
from processor.domain import Record
from processor.errors import BrokerUnavailable, TopicsError
from processor.ports import Span, TopicReader
from processor.settings import Settings
from tests.support.aggregation import MemoryLog
from tests.support.brokers import Broker
from tests.support.stack import until

VALUES: dict[int, list[bytes | None]] = {0: [b"a", None, b"c"], 1: [b"d"], 2: []}
"""What is written to each partition of the topic under test; the first record of partition 0 is deleted after."""


class Arranged:
    """A reader and its topic, written, with its first record deleted and one offset committed."""

    def __init__(self, reader: TopicReader, topic: str) -> None:
        self.reader = reader
        self.topic = topic


@asynccontextmanager
async def in_memory(topic: str) -> AsyncIterator[Arranged]:
    log = MemoryLog()
    log.partitions[topic] = len(VALUES)
    for partition, values in VALUES.items():
        for value in values:
            log.append_bytes(topic, partition, value, key=b"k", headers=[("h", b"v")])
    log.expire(topic, 0, 1)
    log.commits[topic, 0] = 2
    yield Arranged(log, topic)


@asynccontextmanager
async def on_kafka(topic: str, broker: Broker) -> AsyncIterator[Arranged]:
    servers = {"bootstrap_servers": broker.bootstrap_servers}
    admin = AIOKafkaAdminClient(**servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, len(VALUES), 1)])
        async with AIOKafkaProducer(**servers) as producer:
            for partition, values in VALUES.items():
                for value in values:
                    await producer.send_and_wait(topic, value, key=b"k", partition=partition, headers=[("h", b"v")])
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=1)})
        async with AIOKafkaConsumer(**servers, group_id=topic, enable_auto_commit=False) as consumer:
            consumer.assign([TopicPartition(topic, 0)])
            await consumer.commit({TopicPartition(topic, 0): 2})
        yield Arranged(KafkaReader(Settings(bootstrap_servers=broker.bootstrap_servers), group_id=topic), topic)
    finally:
        await admin.close()


@pytest.fixture(params=["memory", "kafka"])
async def arranged(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[Arranged]:
    if request.param == "memory":
        async with in_memory(unique) as memory:
            yield memory
    else:
        async with on_kafka(unique, request.getfixturevalue("kafka")) as kafka:
            yield kafka


async def all_of(reader: TopicReader, topic: str, begin: Mapping[int, int] | None = None) -> list[Record]:
    return [record for records in [each async for each in reader.read(topic, begin)] for record in records]


def places(records: Sequence[Record]) -> list[tuple[int, int, bytes | None]]:
    return sorted((record.source.partition, record.source.offset, record.value) for record in records)


async def test_spans_are_those_of_the_retained_log(arranged: Arranged) -> None:
    """Each partition has its first retained offset and its end, empty ones too."""
    spans = await arranged.reader.spans(arranged.topic)
    assert spans == {0: Span(1, 3), 1: Span(0, 1), 2: Span(0, 0)}


async def test_a_topic_is_read_from_its_beginning_to_its_end(arranged: Arranged) -> None:
    """Every retained record comes once, as it was written."""
    records = await all_of(arranged.reader, arranged.topic)
    assert places(records) == [(0, 1, None), (0, 2, b"c"), (1, 0, b"d")]
    assert {(record.source.topic, record.key, tuple(record.headers)) for record in records} == {
        (arranged.topic, b"k", (("h", b"v"),))
    }
    assert all(record.source.append_ms > 0 for record in records)


@pytest.mark.parametrize(
    "begin, first",
    [({0: 2}, [(0, 2), (1, 0)]), ({0: 3, 1: 1}, []), ({0: 0, 1: 2}, [(0, 1), (0, 2), (1, 0)])],
    ids=["within", "at_the_end", "outside"],
)
async def test_a_topic_is_read_from_given_offsets(
    arranged: Arranged, begin: dict[int, int], first: list[tuple[int, int]]
) -> None:
    """A partition begins where it is told to; from its beginning when that offset is not in the log."""
    records = await all_of(arranged.reader, arranged.topic, begin)
    assert [place[:2] for place in places(records)] == first


async def test_records_are_found_by_offset_and_missing_ones_left_out(arranged: Arranged) -> None:
    """What was deleted, or is not written yet, is no error."""
    found = await arranged.reader.records_at(arranged.topic, {0: 2, 1: 0})
    assert {partition: record.value for partition, record in found.items()} == {0: b"c", 1: b"d"}
    assert set(await arranged.reader.records_at(arranged.topic, {1: 1, 2: 0})) == set()
    assert await arranged.reader.records_at(arranged.topic, {}) == {}


async def test_commits_are_those_of_the_group(arranged: Arranged) -> None:
    """Partitions without a commit are left out."""
    assert await arranged.reader.committed(arranged.topic) == {0: 2}


async def test_reading_stops_where_the_reader_stops(arranged: Arranged) -> None:
    """A reader that is given up half way leaves nothing behind."""
    records = arranged.reader.read(arranged.topic)
    assert await anext(records)
    await records.aclose()


async def test_a_compacted_tail_ends(kafka: Broker, unique: str) -> None:
    """A topic whose last offsets hold no record any more is read to its end."""
    servers = {"bootstrap_servers": kafka.bootstrap_servers}
    async with on_kafka(unique, kafka) as arranged, AIOKafkaProducer(**servers, transactional_id=unique) as producer:
        async with producer.transaction():
            await producer.send_and_wait(unique, b"e", partition=2)

        async def marked() -> bool:
            return (await arranged.reader.spans(unique))[2].end > 1

        await until(marked, within_s=60, what="the end of the transaction is in the log, which is no record")
        async with asyncio.timeout(60):
            assert (2, 0, b"e") in places(await all_of(arranged.reader, arranged.topic))


async def test_the_last_batch_of_the_embedded_broker_counts(embedded_broker: Broker, unique: str) -> None:
    """The end is behind the last record, though this broker names an earlier one after a batch."""
    servers = {"bootstrap_servers": embedded_broker.bootstrap_servers}
    admin = AIOKafkaAdminClient(**servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(unique, 2, 1)])
    finally:
        await admin.close()
    async with AIOKafkaProducer(**servers, linger_ms=100) as producer:
        await producer.send_and_wait(unique, b"first", partition=0)
        await asyncio.gather(*[await producer.send(unique, b"%d" % number, partition=0) for number in range(5)])
    reader = KafkaReader(
        Settings(bootstrap_servers=embedded_broker.bootstrap_servers, producer_idempotent=False), group_id=unique
    )
    assert await reader.spans(unique) == {0: Span(0, 6), 1: Span(0, 0)}
    assert len(await all_of(reader, unique)) == 6
    assert [len(await all_of(reader, unique, {0: offset})) for offset in (4, 5, 6, 7)] == [2, 1, 0, 6]


@pytest.mark.parametrize("broker", ["kafka", "embedded_broker"])
async def test_a_topic_that_is_not_there_names_the_command(
    broker: str, unique: str, request: pytest.FixtureRequest
) -> None:
    """Who reads a missing topic is told to create it, each time: brokers that make what is named make nothing."""
    settings = Settings(bootstrap_servers=request.getfixturevalue(broker).bootstrap_servers)
    reader = KafkaReader(settings, group_id=unique)
    for _ in range(2):
        with pytest.raises(TopicsError, match="topics create"):
            await reader.spans(unique)
        with pytest.raises(TopicsError, match="topics create"):
            await all_of(reader, unique)
        with pytest.raises(TopicsError, match="topics create"):
            await anext(read_records(settings, unique, from_beginning=True, follow=True))


async def test_a_broker_out_of_reach_is_said_so(unique: str) -> None:
    """An address where nobody answers is an error of the infrastructure."""
    reader = KafkaReader(Settings(bootstrap_servers="127.0.0.1:1"), group_id=unique)
    with pytest.raises(BrokerUnavailable):
        await reader.spans(unique)
