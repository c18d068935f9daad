"""Topics on a broker: made as described, found wrong when they are, and named with what to do."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from processor.adapters.topics import Severity, check, create, topics, verify
from processor.errors import BrokerUnavailable, TopicsError
from processor.settings import Settings
from tests.support.brokers import Broker, create_topic


def settings_of(broker: Broker, unique: str, **fields: Any) -> Settings:
    return Settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=f"{unique}-", **fields)


async def test_topics_are_made_once_and_are_right(kafka: Broker, unique: str) -> None:
    """A second `create` makes nothing, and what the first made passes the check."""
    settings = settings_of(kafka, unique)
    assert sorted(await create(settings, partitions=2)) == sorted(settings.topic(t.name) for t in topics().values())
    assert await create(settings) == []
    assert await check(settings) == []


async def test_a_single_missing_topic_is_made(kafka: Broker, unique: str) -> None:
    """What exists is left as it is, though it be wrong."""
    settings = settings_of(kafka, unique)
    name = settings.topic("token-usage")
    await create_topic(kafka.bootstrap_servers, name, configs={"cleanup.policy": "compact"})
    assert name not in await create(settings, partitions=1)
    findings = await check(settings)
    assert {(finding.topic, finding.severity) for finding in findings} == {(name, Severity.ERROR)}


async def test_a_start_is_refused_with_every_reason_at_once(kafka: Broker, unique: str) -> None:
    """The operator reads each topic, what is wrong with it and the command, in one message."""
    settings = settings_of(kafka, unique)
    requests, results = settings.topic("embedding-requests"), settings.topic("embedding-results")
    await create_topic(kafka.bootstrap_servers, requests, configs={"cleanup.policy": "compact"})
    await create_topic(kafka.bootstrap_servers, results, configs={"max.message.bytes": "1000"})
    with pytest.raises(TopicsError) as raised:
        await verify(settings, {"requests", "results", "usage"})
    message = str(raised.value)
    assert f"{requests}: cleanup.policy is compact" in message
    assert f"{requests}: message.timestamp.type is not LogAppendTime" in message
    assert f"{results}: max.message.bytes is 1000" in message
    assert f"{settings.topic('token-usage')}: is missing; run `embedding-processor topics create`" in message


async def test_only_the_topics_that_a_process_needs_are_checked(kafka: Broker, unique: str) -> None:
    """A missing topic of somebody else keeps nobody from starting."""
    settings = settings_of(kafka, unique)
    await create_topic(kafka.bootstrap_servers, settings.topic("embedding-results"))
    assert await verify(settings, {"results"}) == []


async def test_the_check_makes_no_topic(kafka: Broker, unique: str) -> None:
    """To ask for a topic must not create it with the broker's defaults."""
    settings = settings_of(kafka, unique)
    for _ in range(2):
        findings = await check(settings, {"requests"})
        assert [finding.what for finding in findings] == ["is missing"]


async def test_the_brokers_time_is_what_a_request_gets(kafka: Broker, unique: str) -> None:
    """On a request topic as we make it a client's clock moves no charge."""
    settings = settings_of(kafka, unique)
    await create(settings, partitions=1)
    topic = settings.topic("embedding-requests")
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
    await producer.start()
    await consumer.start()
    try:
        sent = await producer.send_and_wait(topic, b"x", timestamp_ms=1_000)
        record = await consumer.getone()
        assert record.offset == sent.offset
        assert record.timestamp > 1_700_000_000_000
        assert record.timestamp_type == 1
    finally:
        await consumer.stop()
        await producer.stop()


async def test_the_embedded_broker_passes_with_its_two_settings_relaxed(embedded_broker: Broker, unique: str) -> None:
    """Demo and smoke tests make the same topics, and the check has nothing worse than a warning to say."""
    settings = settings_of(embedded_broker, unique, require_log_append_time=False)
    await create(settings, partitions=1)
    assert await create(settings) == []
    assert {finding.severity for finding in await verify(settings)} <= {Severity.WARNING}


async def test_brokers_that_do_not_answer_are_named() -> None:
    """The message names the address and the settings to look at."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(BrokerUnavailable, match=f"{address}.*EMBEDDING_BOOTSTRAP_SERVERS"):
            await check(Settings(bootstrap_servers=address))
