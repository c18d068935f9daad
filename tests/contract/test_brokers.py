"""What the servers of the tests promise, on each kind to be had; a gap is a strict xfail with its reason."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from redis.asyncio import Redis

from processor.adapters.embedded import ChildServer, EmbeddedBroker, EmbeddedCache
from processor.errors import EmbeddedUnavailable
from tests.support.brokers import KINDS, Broker, NotToBeHad, Servers, create_topic
from tests.support.kafka import ApacheKafka

HOUR_MS = 3_600_000


@pytest.fixture(params=KINDS)
def any_broker(servers: Servers, request: pytest.FixtureRequest) -> Broker:
    """Each kind that is to be had, in turn."""
    try:
        return servers.broker_of(request.param)
    except NotToBeHad as error:
        pytest.skip(str(error))


@asynccontextmanager
async def a_consumer(broker: Broker, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.bootstrap_servers,
        group_id=topic,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        session_timeout_ms=30_000 if broker.is_apache_kafka else 6000,  # the embedded one waits half of it
        heartbeat_interval_ms=1000,
    ) as consumer:
        yield consumer


async def next_record(consumer: AIOKafkaConsumer) -> ConsumerRecord:
    return await asyncio.wait_for(consumer.getone(), 60)


async def test_what_is_produced_is_consumed_and_committed(any_broker: Broker, unique: str) -> None:
    """A record comes back with its key, value and headers at the offset that was acknowledged."""
    await create_topic(any_broker.bootstrap_servers, unique, partitions=3)
    async with AIOKafkaProducer(bootstrap_servers=any_broker.bootstrap_servers, acks="all") as producer:
        sent = await producer.send_and_wait(unique, b"value", b"key", partition=2, headers=[("h", b"1")])

    async with a_consumer(any_broker, unique) as consumer:
        record = await next_record(consumer)
        partition = TopicPartition(unique, 2)
        await consumer.commit({partition: record.offset + 1})
        committed = await consumer.committed(partition)

    assert (record.key, record.value, record.headers) == (b"key", b"value", (("h", b"1"),))
    assert (record.partition, record.offset) == (2, sent.offset)
    assert committed == sent.offset + 1


async def test_an_idempotent_producer_is_served(
    any_broker: Broker, unique: str, request: pytest.FixtureRequest
) -> None:
    """A producer with idempotence on gets its record acknowledged."""
    if not any_broker.is_apache_kafka:
        request.applymarker(pytest.mark.xfail(raises=KafkaError, reason="Tansu fails InitProducerId"))
    await create_topic(any_broker.bootstrap_servers, unique)
    producer = AIOKafkaProducer(bootstrap_servers=any_broker.bootstrap_servers, enable_idempotence=True)
    try:
        await producer.start()
        assert (await producer.send_and_wait(unique, b"value")).offset == 0
    finally:
        await producer.stop()


async def test_a_topic_of_append_time_ignores_the_clock_of_the_producer(
    any_broker: Broker, unique: str, request: pytest.FixtureRequest
) -> None:
    """Under LogAppendTime a record carries the broker's time, whatever the producer says."""
    if not any_broker.is_apache_kafka:
        request.applymarker(pytest.mark.xfail(raises=AssertionError, reason="Tansu ignores LogAppendTime"))
    configs = {"message.timestamp.type": "LogAppendTime"}
    await create_topic(any_broker.bootstrap_servers, unique, configs=configs)
    now_ms = int(time.time() * 1000)
    async with AIOKafkaProducer(bootstrap_servers=any_broker.bootstrap_servers) as producer:
        await producer.send_and_wait(unique, b"value", timestamp_ms=now_ms - 24 * HOUR_MS)

    async with a_consumer(any_broker, unique) as consumer:
        record = await next_record(consumer)

    assert record.timestamp_type == 1
    assert abs(record.timestamp - now_ms) < HOUR_MS


async def test_apache_kafka_keeps_its_records_across_a_crash(unique: str) -> None:
    """A broker that was killed and started again still has what it acknowledged, at the same address."""
    try:
        server = ApacheKafka()
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))
    with server:
        own = Broker(server.bootstrap_servers, "kafka", "one that may crash")
        await create_topic(own.bootstrap_servers, unique)
        async with AIOKafkaProducer(bootstrap_servers=own.bootstrap_servers, acks="all") as producer:
            sent = await producer.send_and_wait(unique, b"value")
        server.kill()
        server.start()
        async with a_consumer(own, unique) as consumer:
            record = await next_record(consumer)

    assert (record.value, record.offset) == (b"value", sent.offset)


async def test_a_cache_keeps_what_it_was_given(redis_url: str, unique: str) -> None:
    """The cache of this run stores bytes, and sets only if absent when asked to."""
    async with Redis.from_url(redis_url) as redis:
        assert await redis.set(unique, b"first", nx=True, ex=60)
        assert not await redis.set(unique, b"second", nx=True)
        assert await redis.get(unique) == b"first"


async def test_the_embedded_cache_speaks_the_redis_protocol(unique: str) -> None:
    """The embedded cache serves the same commands as the one of this run."""
    with EmbeddedCache() as cache:
        await test_a_cache_keeps_what_it_was_given(cache.url, unique)


def test_embedded_servers_are_gone_when_left() -> None:
    """No process is left of a server whose block has ended."""
    with EmbeddedBroker() as broker, EmbeddedCache() as cache:
        running = (broker.pid, cache.pid)
        for pid in running:
            os.kill(pid, 0)

    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_server_dies_with_its_parent() -> None:
    """A parent that is killed outright takes its servers along."""
    program = (
        "import sys; from processor.adapters.embedded import EmbeddedCache\n"
        "with EmbeddedCache() as cache: print(cache.pid, flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        server_pid = int(parent.stdout.readline())
        assert is_running(server_pid)
        parent.send_signal(signal.SIGKILL)

    deadline = time.monotonic() + 60
    while is_running(server_pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.01)


def test_a_server_that_ends_at_start_is_quoted() -> None:
    """The error of a program that does not start says what the program said."""
    server = ChildServer(
        "no server", ["sh", "-c", "echo port in use; exit 1"], answers=lambda: False, start_timeout_s=60
    )

    with pytest.raises(EmbeddedUnavailable, match="no server ended at start: port in use"):
        server.start()


def is_running(pid: int) -> bool:
    """Whether the process runs; one that is dead but not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")
