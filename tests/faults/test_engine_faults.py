"""The engine when its broker dies under it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from processor.errors import EmbeddedUnavailable
from tests.support.brokers import Broker
from tests.support.engines import Handler, create_topic, engine_settings, group_of, produce, running, until
from tests.support.kafka import ApacheKafka

PARTITIONS = 4


@pytest.fixture
def own_kafka(kafka: Broker) -> Iterator[ApacheKafka]:
    """A broker of this test alone, since it is killed; needs Java and Maven."""
    try:
        with ApacheKafka() as own:
            yield own
    except EmbeddedUnavailable as error:
        pytest.skip(f"NOT RUN, needs Apache Kafka from Maven artifacts: {error}")


@pytest.mark.faults
async def test_a_broker_that_dies_and_returns_costs_nothing(own_kafka: ApacheKafka, unique: str) -> None:
    """The engine waits for it, in the same process; every record is finished and the log's end is committed."""
    await create_topic(own_kafka.bootstrap_servers, unique, PARTITIONS)
    await produce(own_kafka.bootstrap_servers, unique, PARTITIONS, 2_000)
    handler = Handler()
    async with running(engine_settings(own_kafka.bootstrap_servers), unique, handler) as engine:
        await until(lambda: len(handler.finished) == 2_000, "the records before")
        await asyncio.to_thread(own_kafka.kill)
        first = handler.runs[0].lease
        await until(lambda: not first.held(), "the lease to be over while nobody answers")
        await asyncio.to_thread(own_kafka.start)
        await produce(own_kafka.bootstrap_servers, unique, PARTITIONS, 2_000)
        await until(lambda: len(handler.finished) == 4_000, "the records after", within_s=60)
        assert engine.status()["state"] == "consuming"
    async with group_of(own_kafka.bootstrap_servers, unique) as group:
        assert await group.committed() == dict.fromkeys(range(PARTITIONS), 1_000)
