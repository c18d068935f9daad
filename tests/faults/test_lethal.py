"""A record that ends every process that reads it does not stop its partition."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import OffsetAndMetadata

from processor.suspicion import OPEN, WAITING, Suspicion
from tests.support.brokers import Broker
from tests.support.engines import create_topic, group_of, produce

RECORDS = 40
SESSION = {"session_timeout_s": 6, "heartbeat_interval_s": 1, "lease_margin_s": 1, "commit_interval_s": 0.2}


@pytest.fixture
async def topic(kafka: Broker, unique: str) -> str:
    await create_topic(kafka.bootstrap_servers, unique, 1)
    await produce(kafka.bootstrap_servers, unique, 1, RECORDS)
    return unique


async def _life(broker: Broker, topic: str, done: Callable[[list[dict[str, Any]]], bool], **options: Any) -> list[Any]:
    """One process from start to its end, or until `done`; what it said."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.engine_process"),
        json.dumps({"bootstrap_servers": broker.bootstrap_servers, "topic": topic, "settings": SESSION, **options}),
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    said: list[dict[str, Any]] = []
    asked = False
    try:
        async with asyncio.timeout(120):
            async for line in child.stdout:
                if line.startswith(b"{"):
                    said.append(json.loads(line))
                    if done(said) and not asked:  # it may be gone before its last lines are read
                        asked = True
                        child.terminate()
            await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return said


async def _commit(broker: Broker, place: TopicPartition, offset: int, suspicion: Suspicion) -> None:
    async with AIOKafkaConsumer(
        bootstrap_servers=broker.bootstrap_servers, group_id=place.topic, enable_auto_commit=False
    ) as consumer:
        consumer.assign([place])
        await consumer.commit({place: OffsetAndMetadata(offset, str(suspicion))})


def _worked(said: list[dict[str, Any]]) -> int:
    return sum(event["records"] for event in said if event["event"] == "run")


async def test_a_record_that_ends_processes_is_given_up_and_its_neighbours_are_not(kafka: Broker, topic: str) -> None:
    """Within seven lives the partition is past it; the record is handed over as lethal once, no other ever is."""
    lethal: list[int] = []
    for _ in range(7):
        said = await _life(kafka, topic, lambda said: _worked(said) >= RECORDS - 17, die_at=17)
        lethal += [event["offset"] for event in said if event["event"] == "lethal"]
        if lethal:
            break
    assert lethal == [17]
    async with group_of(kafka.bootstrap_servers, topic) as group:
        assert await group.committed() == {0: RECORDS}


async def test_processes_killed_while_a_dependency_is_paused_make_nothing_lethal(kafka: Broker, topic: str) -> None:
    """An outage, and whoever restarts workers meanwhile, is no fault of the record that waits."""
    for _ in range(7):
        said = await _life(kafka, topic, lambda said: False, die_at=0, waiting=True)
        assert [event for event in said if event["event"] == "lethal"] == []


async def test_an_end_for_want_of_an_acknowledgement_is_not_held_against_the_record(kafka: Broker, topic: str) -> None:
    """A topic that takes nothing for an hour ends every process after its delivery timeout: nothing is counted."""
    before, after = Suspicion(OPEN, 3, 1), Suspicion(WAITING, 4, 1)
    await _commit(kafka, TopicPartition(topic, 0), 0, before)
    said = await _life(kafka, topic, lambda said: False, undelivered_at=0)
    assert [event for event in said if event["event"] == "lethal"] == []
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        (known,) = (await admin.list_consumer_group_offsets(topic)).values()
    finally:
        await admin.close()
    assert (known.offset, known.metadata) == (0, str(after))


async def test_a_suspect_partition_without_a_record_holds_no_other_back(kafka: Broker, unique: str) -> None:
    """Its log ends with the marker of a transaction: nothing is there that could run alone, whatever its end says."""
    await create_topic(kafka.bootstrap_servers, unique, 2)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=unique)
    async with producer, producer.transaction():
        for partition in range(2):
            await producer.send_and_wait(unique, b"1", partition=partition)
    await _commit(kafka, TopicPartition(unique, 0), 1, Suspicion(OPEN, 3, 1))
    said = await _life(kafka, unique, lambda said: _worked(said) == 1)
    assert _worked(said) == 1
