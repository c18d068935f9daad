"""The engine when its broker dies under it, or cuts its log."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from structlog.testing import capture_logs

from processor.ports import Run
from tests.support.brokers import Broker
from tests.support.engines import Handler, create_topic, engine_settings, group_of, produce, running, until
from tests.support.kafka import ApacheKafka

PARTITIONS = 4


@pytest.mark.faults
async def test_a_broker_that_dies_and_returns_costs_nothing(own_kafka: ApacheKafka, unique: str) -> None:
    """The engine waits for it, in the same process; every record is finished and the log's end is committed."""
    await create_topic(own_kafka.bootstrap_servers, unique, PARTITIONS)
    await produce(own_kafka.bootstrap_servers, unique, PARTITIONS, 2_000)
    handler = Handler()
    async with running(engine_settings(own_kafka.bootstrap_servers, session_timeout_s=6), unique, handler) as engine:
        await until(lambda: len(handler.finished) == 2_000, "the records before")
        await asyncio.to_thread(own_kafka.kill)
        last = handler.runs[-1].lease
        await until(lambda: not last.held(), "the lease to be over while nobody answers")
        await asyncio.to_thread(own_kafka.start)
        await produce(own_kafka.bootstrap_servers, unique, PARTITIONS, 2_000)
        await until(lambda: len(handler.finished) == 4_000, "the records after")
        await until(lambda: engine.status()["state"] == "consuming", "it to be at work")
    async with group_of(own_kafka.bootstrap_servers, unique) as group:
        assert await group.committed() == dict.fromkeys(range(PARTITIONS), 1_000)


async def test_records_deleted_unread_are_told(kafka: Broker, unique: str) -> None:
    """Retention that overtakes a reader loses requests: reading goes on behind the hole, and the log says so loudly."""
    await create_topic(kafka.bootstrap_servers, unique, 1)
    go = asyncio.Event()

    async def wait(run: Run) -> None:
        await go.wait()
        await handler.finish_all(run)

    handler = Handler(wait)
    place, ends = TopicPartition(unique, 0), 200
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        with capture_logs() as told:
            async with running(engine_settings(kafka.bootstrap_servers), unique, handler):
                async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
                    for _ in range(ends):  # more than is read ahead
                        await producer.send_and_wait(unique, bytes(100_000), partition=0)
                await until(lambda: bool(handler.runs), "a run")
                await admin.delete_records({place: RecordsToDelete(before_offset=ends - 10)})
                go.set()
                await until(lambda: (0, ends - 1) in handler.finished, "the last record")
    finally:
        await admin.close()
    assert (0, ends - 11) not in handler.finished
    assert {(0, offset) for offset in range(ends - 10, ends)} <= handler.finished
    assert [each["log_level"] for each in told if each["event"].startswith("records were deleted unread")] == ["error"]
    async with group_of(kafka.bootstrap_servers, unique) as group:
        assert await group.committed() == {0: ends}
