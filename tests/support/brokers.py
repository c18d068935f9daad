"""The broker and the cache that tests talk to: the most real ones to be had, started when first asked for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from processor.adapters.embedded import EmbeddedBroker, EmbeddedCache, answers_kafka
from processor.errors import EmbeddedUnavailable
from tests.support.kafka import VERSION, ApacheKafka
from tests.support.redis_server import own_redis

Kind = Literal["env", "docker", "kafka", "embedded"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORCED = "EMBEDDING_TEST_BROKER"
KAFKA_IMAGE = "confluentinc/cp-kafka:7.6.0"
REDIS_IMAGE = "redis:7"


class NotToBeHad(Exception):
    """This machine has no such server; the message says what is missing."""


@dataclass(frozen=True)
class Broker:
    """A running broker. `bootstrap_servers` is "host:port"; `description` is for a test report's reader.

    `pid` is its process if that is a child of ours.
    """

    bootstrap_servers: str
    kind: Kind
    description: str
    pid: int | None = None

    @property
    def is_apache_kafka(self) -> bool:
        """Whether laws that need idempotence, LogAppendTime or durability can be tested on it."""
        return self.kind != "embedded"


class Servers:
    """The servers of one test run: each is started at most once, and all end with the run."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._brokers: dict[Kind, Broker | NotToBeHad] = {}
        self._redis_url: str | None = None
        #: Lines for the test report.
        self.report: list[str] = []

    def close(self) -> None:
        """Stop all of them."""
        self._stack.close()

    def broker(self) -> Broker:
        """The broker of this run: `EMBEDDING_TEST_BROKER`'s, or the first of `KINDS` that is to be had."""
        forced = os.environ.get(FORCED)
        if forced:
            for kind in KINDS:
                if kind == forced:
                    return self.broker_of(kind)
            raise NotToBeHad(f"{FORCED}={forced}: choose one of {', '.join(KINDS)}")
        for kind in KINDS:
            try:
                return self.broker_of(kind)
            except NotToBeHad:
                continue
        raise NotToBeHad("no broker at all: see the reasons at the end of the report")

    def broker_of(self, kind: Kind) -> Broker:
        """The broker of this kind. Raises `NotToBeHad`."""
        if kind not in self._brokers:
            try:
                started = self._start_broker(kind)
                self._brokers[kind] = started
                self.report.append(f"broker {kind}: {started.description}")
            except (NotToBeHad, EmbeddedUnavailable) as error:
                self._brokers[kind] = NotToBeHad(str(error))
                self.report.append(f"broker {kind}: not to be had: {error}")
        found = self._brokers[kind]
        if isinstance(found, NotToBeHad):
            raise found
        return found

    def redis_url(self) -> str:
        """Of the first to be had: `REDIS_URL`, Docker, a redis-server on PATH, the embedded one."""
        if self._redis_url is None:
            self._redis_url = self._start_redis()
        return self._redis_url

    def _start_broker(self, kind: Kind) -> Broker:
        match kind:
            case "env":
                named = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
                if not named:
                    raise NotToBeHad("KAFKA_BOOTSTRAP_SERVERS is not set")
                return Broker(named, kind, f"KAFKA_BOOTSTRAP_SERVERS={named}")
            case "docker":
                return Broker(self._from_docker(_kafka_container), kind, f"container {KAFKA_IMAGE}")
            case "kafka":
                kafka = self._stack.enter_context(ApacheKafka())
                description = f"Apache Kafka {VERSION} from Maven artifacts, one node"
                return Broker(kafka.bootstrap_servers, kind, description, kafka.pid)
            case "embedded":
                tansu = self._stack.enter_context(EmbeddedBroker())
                return Broker(tansu.bootstrap_servers, kind, "the embedded broker, in memory", tansu.pid)

    def _start_redis(self) -> str:
        if named := os.environ.get("REDIS_URL"):
            self.report.append("cache: REDIS_URL")
            return named
        try:
            url = f"redis://{self._from_docker(_redis_container)}/0"
            self.report.append(f"cache: container {REDIS_IMAGE}")
        except NotToBeHad as error:
            server, url = own_redis()
            self._stack.enter_context(server)
            which = "the embedded Valkey" if isinstance(server, EmbeddedCache) else "redis-server on PATH"
            self.report.append(f"cache: {which} (Docker: {error})")
        return url

    def _from_docker(self, start: Callable[[ExitStack], str]) -> str:
        host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if not answers_docker(host):
            raise NotToBeHad(f"no Docker engine answers at {host}")
        # Left alone, testcontainers reports a container's private address where the tests themselves run in a
        # container; the published port on loopback is right unless the user says otherwise.
        from testcontainers.core.config import ConnectionMode, testcontainers_config

        if testcontainers_config.tc_host_override is None:
            testcontainers_config.tc_host_override = "127.0.0.1"
            testcontainers_config.connection_mode_override = ConnectionMode.docker_host
        try:
            with ExitStack() as starting:
                address = start(starting)
                self._stack.push(starting.pop_all())
                return address
        except Exception as error:  # an image, Ryuk or a port that can't be had: the next kind serves
            raise NotToBeHad(f"the engine answers, the container is not to be had: {error!r:.300}") from error


def _kafka_container(stack: ExitStack) -> str:
    from testcontainers.community.kafka import KafkaContainer

    container = stack.enter_context(KafkaContainer(KAFKA_IMAGE).with_kraft())
    host, port = container.get_container_host_ip(), container.get_exposed_port(container.port)
    if not answers_kafka(host, port):
        raise NotToBeHad(f"{KAFKA_IMAGE} runs, but {host}:{port} does not answer")
    return f"{host}:{port}"


def _redis_container(stack: ExitStack) -> str:
    from testcontainers.community.redis import RedisContainer

    container = stack.enter_context(RedisContainer(REDIS_IMAGE))
    return f"{container.get_container_host_ip()}:{container.get_exposed_port(container.port)}"


def answers_docker(host: str) -> bool:
    """Whether an engine answers a ping at a DOCKER_HOST. One reached by TLS or SSH is taken at its word.

    The Docker library is not asked: it leaves a socket open when nobody answers.
    """
    address = urlsplit(host)
    if address.scheme not in ("unix", "tcp") or os.environ.get("DOCKER_TLS_VERIFY"):
        return True
    family = socket.AF_UNIX if address.scheme == "unix" else socket.AF_INET
    try:
        with socket.socket(family) as connection:
            connection.settimeout(5)
            connection.connect(address.path if family == socket.AF_UNIX else (address.hostname, address.port))
            connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


async def create_topic(
    bootstrap_servers: str, name: str, *, partitions: int = 1, configs: Mapping[str, str] | None = None
) -> None:
    """Make a topic with one replica, whose partitions have their leaders: nobody's first request is a retry.

    Raises `AssertionError` with the broker's code when it refuses.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        answer = await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=dict(configs or {}))])
        assert [error[1] for error in answer.topic_errors] == [0], answer
    finally:
        await admin.close()
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap_servers) as consumer:
        await ends_of(consumer, name, partitions)  # said by leaders alone


async def ends_of(consumer: AIOKafkaConsumer, topic: str, partitions: int) -> dict[int, int]:
    """Partition to the offset after its last record."""
    ends = await consumer.end_offsets([TopicPartition(topic, each) for each in range(partitions)])
    return {place.partition: end for place, end in ends.items()}


async def limit_topic(bootstrap_servers: str, name: str, max_message_bytes: int) -> None:
    """Set `max.message.bytes` of a topic, which may be in use."""
    configs = {"max.message.bytes": str(max_message_bytes)}
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs)])
    finally:
        await admin.close()
