"""What is produced on Apache Kafka: where it lands, in what order, and what is never sent."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from processor.adapters import outbox, topics
from processor.adapters.avro import Codec
from processor.adapters.faust_engine import Engine, engine
from processor.adapters.kafka import METADATA_POLL_S
from processor.adapters.murmur2 import partition_of
from processor.adapters.outbox import REQUEST_BYTES, KafkaOutbox
from processor.domain import DeadLetter, DlqClass, ReceivedResult
from processor.errors import DeliveryFailed, LeaseLost, RecordTooLarge
from processor.ports import Destination
from processor.settings import Settings
from tests.support.brokers import Broker, create_topic
from tests.support.builders import a_call, a_record, a_request, a_result
from tests.support.engines import Handler, engine_settings
from tests.support.stack import PATIENCE_S, until

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


@dataclass
class LeaseFor(ALease):
    """A lease that is lost once it was looked at so many times."""

    looks: int = 0

    def held(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


class Posted:
    """An outbox and a look at what it sent."""

    def __init__(self, settings: Settings, outbox: KafkaOutbox, producer: AIOKafkaProducer) -> None:
        self.settings = settings
        self.outbox = outbox
        self.producer = producer

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

    async def chunks(self) -> list[str | None]:
        """Chunk ids of the results, partition by partition in offset order."""
        received = [await Codec().read(ReceivedResult, value) for value in await self.values("results")]
        return [each.chunk_id for each in received if isinstance(each, ReceivedResult)]


@asynccontextmanager
async def posting(broker: Broker, unique: str, **overrides: Any) -> AsyncIterator[Posted]:
    """An outbox on the engine's own producer, without the engine; the topics are made first."""
    settings = engine_settings(broker.bootstrap_servers, topic_prefix=f"{unique}-", **overrides)
    await topics.create(settings, partitions=PARTITIONS, replication=1)
    producer: AIOKafkaProducer = Engine(settings, app_id=unique, topics=[], handler=Handler()).new_producer()
    await producer.start()
    try:
        yield Posted(settings, KafkaOutbox(settings, Codec.from_settings(settings), lambda: producer), producer)
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


async def test_a_receipt_travels_with_the_results_after_it(
    kafka: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is posted waits a moment for what is sent next, which then waits for no request but its own."""
    async with posting(kafka, unique) as posted:
        send, requests = posted.producer.client.send, []

        async def counted(node: int, request: Any, **options: Any) -> Any:
            requests.append(type(request).__name__)
            return await send(node, request, **options)

        async def takes_one_request() -> bool:
            requests.clear()
            await posted.outbox.send([result("next", "c0"), Destination("calls", a_call())])
            return len([name for name in requests if name.startswith("Produce")]) == 1

        monkeypatch.setattr(posted.producer.client, "send", counted)
        await until(takes_one_request, within_s=PATIENCE_S, what="the new partitions have their leaders")
        monkeypatch.setattr(outbox, "POST_WAIT_S", 2 * PATIENCE_S)
        requests.clear()
        receipt = await posted.outbox.post(Destination("calls", a_call()))
        await asyncio.sleep(0.01)  # others have had their turns
        await posted.outbox.send([result("next", "c0")])
        await receipt
        assert len([name for name in requests if name.startswith("Produce")]) == 1
        monkeypatch.undo()
        async with asyncio.timeout(PATIENCE_S):
            await (await posted.outbox.post(Destination("calls", a_call())))  # alone it goes too


async def test_order_is_kept_within_and_across_calls(kafka: Broker, unique: str) -> None:
    """Calls whose messages wait for a batch in flight don't overtake one another."""
    async with posting(kafka, unique) as posted:
        big = a_request(metadata={"pad": "x" * 7_000})
        calls = [
            [Destination("results", a_result(big, chunk_id=f"{call}.{part}")) for part in range(10)]
            for call in range(60)
        ]
        sending = []
        for call in calls:
            sending.append(asyncio.create_task(posted.outbox.send(call)))
            await asyncio.sleep(0.0005)  # so that some find a batch in flight, and others do not
        await asyncio.gather(*sending)
        order = await posted.chunks()
    assert order == [f"{call}.{part}" for call in range(60) for part in range(10)]


async def test_whoever_waits_for_a_topic_s_partitions_is_not_overtaken(kafka: Broker, unique: str) -> None:
    """A call with a message for a topic that is yet unknown comes before the next call, in every partition."""
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([result("corr-1", "first")])
        await create_topic(kafka.bootstrap_servers, f"{unique}-new")
        async with asyncio.TaskGroup() as group:
            waits = [Destination("replies", a_result(), topic=f"{unique}-new", partition=0), result("corr-1", "second")]
            group.create_task(posted.outbox.send(waits))
            group.create_task(posted.outbox.send([result("corr-1", "third")]))
        assert await posted.chunks() == ["first", "second", "third"]


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


async def test_a_lease_that_is_not_held_is_noticed_before_anything_is_encoded(kafka: Broker, unique: str) -> None:
    """Whoever waits for a late lease tries ten times a second: that costs a look, not the encoding of thousands."""
    large = Destination("results", a_result(a_request(metadata={"pad": "x" * 70_000})))
    async with posting(kafka, unique, max_record_bytes=60_000, max_request_bytes=10_000) as posted:
        with pytest.raises(LeaseLost):
            await posted.outbox.send([large], leases=[ALease(is_held=False)])


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


@contextmanager
def frozen(broker: Broker) -> Iterator[None]:
    """The broker takes what is sent to it and answers nothing."""
    if broker.pid is None:
        pytest.skip("this broker is no child of ours: it can't be frozen")
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        while not all(map(_is_stopped, Path(f"/proc/{broker.pid}/task").iterdir())):
            time.sleep(0.001)  # a thread that is not stopped yet may still answer
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def _is_stopped(thread: Path) -> bool:
    try:
        return ") T " in (thread / "stat").read_text()
    except OSError:  # it ended meanwhile
        return True


async def until_sending(posted: Posted, calls: int) -> None:
    """Until so many calls wait for the broker, and the first has been handed over.

    Their topics are known: nothing but turns of the loop lies before that.
    """
    async with asyncio.timeout(PATIENCE_S):
        while posted.outbox.sending < calls:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)


async def test_a_lease_is_looked_at_right_before_the_request(kafka: Broker, unique: str) -> None:
    """What waits for a broker that answers nothing is not sent when its lease is lost meanwhile; the rest is."""
    held, lost = ALease(), ALease()
    async with posting(kafka, unique) as posted, asyncio.TaskGroup() as group:
        await posted.outbox.send([result("corr-1", "first")])
        with frozen(kafka):
            group.create_task(posted.outbox.send([result("corr-1", "in flight")], leases=[held]))
            await until_sending(posted, 1)
            group.create_task(posted.outbox.send([result("corr-2", "held")], leases=[held]))
            late = asyncio.create_task(posted.outbox.send([result("corr-1", "late")], leases=[lost]))
            await until_sending(posted, 3)
            lost.is_held = False
        with pytest.raises(LeaseLost):
            await late
        await posted.outbox.send([result("corr-1", "last")])
        assert sorted(filter(None, await posted.chunks())) == ["first", "held", "in flight", "last"]


async def test_a_lease_lost_in_the_middle_ends_the_call_and_sending_it_again_keeps_the_order(
    kafka: Broker, unique: str
) -> None:
    """What the broker has is the beginning of the call, and then all of it: copies, and nothing before its turn."""
    big = a_request(metadata={"pad": "x" * (engine.BATCH_BYTES // 2 - 10_000)})  # two of them fill a batch
    call = [Destination("results", a_result(big, chunk_id=str(part))) for part in range(20)]
    async with posting(kafka, unique) as posted:
        with pytest.raises(LeaseLost):
            await posted.outbox.send(call, leases=[LeaseFor(looks=4)])
        await posted.outbox.send(call, leases=[ALease()])
        order = await posted.chunks()
    copies = len(order) - len(call)
    assert 0 < copies < len(call)
    assert order == [str(part) for part in [*range(copies), *range(20)]]


async def test_whoever_is_cancelled_leaves_the_way_free(kafka: Broker, unique: str) -> None:
    """What it had not handed over is not sent, what others send after it is, and a posted receipt goes all the same."""
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([result("corr-1", "first"), Destination("calls", a_call())])
        with frozen(kafka):
            flying = asyncio.create_task(posted.outbox.send([result("corr-1", "in flight")]))
            await until_sending(posted, 1)
            queued = asyncio.create_task(posted.outbox.send([result("corr-1", "queued")]))
            receipt = asyncio.ensure_future(await posted.outbox.post(Destination("calls", a_call())))
            await until_sending(posted, 3)
            for each in (flying, queued, receipt):
                each.cancel()
            await asyncio.wait({flying, queued})
        async with asyncio.timeout(PATIENCE_S):
            await posted.outbox.send([result("corr-1", "last")])
            assert await posted.chunks() == ["first", "in flight", "last"]
            assert len(await posted.values("calls")) == 2


async def test_the_producer_holds_one_batch_a_partition(
    kafka: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the broker answers nothing, what many calls send waits here, and then goes out together."""
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([result("corr-1", "first")])
        batches: list[Any] = []
        create = posted.producer.create_batch

        def create_and_note() -> Any:
            batches.append(create())
            return batches[-1]

        monkeypatch.setattr(posted.producer, "create_batch", create_and_note)
        async with asyncio.TaskGroup() as group:
            with frozen(kafka):
                for call in range(50):
                    group.create_task(posted.outbox.send([result("corr-1", str(call))]))
                    await until_sending(posted, call + 1)
                assert [batch.record_count() for batch in batches] == [1]
        assert [batch.record_count() for batch in batches] == [1, 49]


async def test_partitions_take_turns_in_requests_of_a_bounded_size(
    kafka: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many have full batches waiting: a larger request is packed in one piece, which holds the loop."""
    big = a_request(metadata={"pad": "x" * (engine.BATCH_BYTES - 20_000)})  # one of them fills a batch
    handed: list[tuple[TopicPartition, int]] = []
    async with posting(kafka, unique) as posted:
        send = posted.producer.send_batch

        async def note_and_send(batch: Any, topic: str, *, partition: int) -> Any:
            handed.append((TopicPartition(topic, partition), batch.size()))
            return await send(batch, topic, partition=partition)

        monkeypatch.setattr(posted.producer, "send_batch", note_and_send)
        call = [
            Destination(
                "replies", a_result(big), topic=posted.settings.topic(topics.topics()[name].name), partition=each
            )
            for name in ("results", "replies")
            for each in range(PARTITIONS)
        ]
        await posted.outbox.send(call)
        handed.clear()
        async with asyncio.TaskGroup() as group:
            with frozen(kafka):
                group.create_task(posted.outbox.send(call * 3))
                await until_sending(posted, 1)
                assert REQUEST_BYTES <= sum(size for _, size in handed) < REQUEST_BYTES + engine.BATCH_BYTES
    assert len(handed) == 3 * len(call)
    assert len({partition for partition, _ in handed[: len(call)]}) == len(call)


async def test_a_broker_that_answers_nothing_fails_a_delivery_in_time(
    kafka: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in flight and what stands in line behind it fail together, long before the client's own time is over."""
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([result("corr-1", "first")])
        monkeypatch.setattr(posted.outbox, "_timeout_s", 1)  # not before: the first may take its time
        with frozen(kafka):
            started = time.monotonic()
            sending = [asyncio.create_task(posted.outbox.send([result("corr-1", str(n))])) for n in range(3)]
            outcomes = await asyncio.gather(*sending, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [DeliveryFailed] * 3
            assert 1 <= time.monotonic() - started < engine.REQUEST_TIMEOUT_MS / 1000 - 5
            assert posted.outbox.sending == 0


async def test_batches_are_no_larger_than_a_record_may_be(kafka: Broker, unique: str) -> None:
    """A topic that takes no more than that takes whatever number of small records we send at once."""
    topic = f"{unique}-narrow"
    await create_topic(kafka.bootstrap_servers, topic, configs={"max.message.bytes": "60000"})
    async with posting(kafka, unique, max_record_bytes=60_000, max_request_bytes=1_000) as posted:
        await posted.outbox.send([Destination("replies", a_result(), topic=topic, partition=0)] * 1_000)


async def test_a_partition_without_a_leader_is_waited_for_with_the_lease_in_view(kafka: Broker, unique: str) -> None:
    """Once there is one, what still has its lease is sent, and what has lost it is not."""
    held, lost = ALease(), ALease()
    async with posting(kafka, unique) as posted, AsyncExitStack() as stack:
        topic = posted.settings.topic("embedding-replies")
        await posted.outbox.send([Destination("replies", a_result(), topic=topic, partition=0)])
        reply = Destination("replies", a_result(), topic=topic, partition=PARTITIONS)
        kept = asyncio.create_task(posted.outbox.send([reply], leases=[held]))
        late = asyncio.create_task(posted.outbox.send([reply], leases=[lost]))
        await until_sending(posted, 2)
        lost.is_held = False
        admin = AIOKafkaAdminClient(bootstrap_servers=posted.settings.bootstrap_servers)
        await admin.start()
        stack.push_async_callback(admin.close)
        await admin.create_partitions({topic: NewPartitions(PARTITIONS + 1)})
        await kept
        with pytest.raises(LeaseLost):
            await late


async def test_a_topic_that_is_gone_fails_a_delivery_in_time_and_is_not_asked_for_in_a_hot_loop(
    kafka: Broker, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted while it is used: the deadline ends it, and the time until then is not spent at full speed."""
    monkeypatch.setattr(engine, "REQUEST_TIMEOUT_MS", 8_000)  # a stopping producer waits so long for its batches
    async with posting(kafka, unique) as posted:
        await posted.outbox.send([result("corr-1", "first")])
        monkeypatch.setattr(posted.outbox, "_timeout_s", 3)  # not before: the first may take its time
        topic = posted.settings.topic(topics.topics()["results"].name)
        admin = AIOKafkaAdminClient(bootstrap_servers=posted.settings.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_topics([topic])
            while topic in await admin.list_topics():
                await asyncio.sleep(0.05)
        finally:
            await admin.close()
        looks: list[Any] = []
        posted.producer.client.cluster.add_listener(looks.append)  # told of each answer
        started, busy = time.monotonic(), time.thread_time()
        with pytest.raises(DeliveryFailed):
            await posted.outbox.send([result("corr-1", "nowhere")])
        lasted_s, busy_s = time.monotonic() - started, time.thread_time() - busy
        assert lasted_s < PATIENCE_S
        assert busy_s < lasted_s / 2
        assert len(looks) <= lasted_s / METADATA_POLL_S + 3
