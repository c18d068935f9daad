"""What a client takes for an answer, told by a responder of the test's own that also says what is not one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest
from aiokafka import AIOKafkaProducer

from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.kafka import connection
from processor.client import Client
from processor.client.streams import read_records
from processor.domain import Request, Result
from processor.errors import BrokerUnavailable
from processor.ports import Destination
from processor.settings import Settings
from tests.support.brokers import Broker
from tests.support.builders import a_request, a_result
from tests.support.schema_registry import RegistryServer


class Responder:
    """Reads a request of the topic, `skip` of them left out, and writes to the partition where its sender listens."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer, codec: Codec) -> None:
        self._settings = settings
        self._producer = producer
        self._codec = codec

    async def next_request(self, *, skip: int = 0) -> Request:
        async with aclosing(
            read_records(self._settings, self._settings.topic("embedding-requests"), from_beginning=True, follow=True)
        ) as records:
            async for record in records:
                request = await self._codec.decode(record)
                assert isinstance(request, Request)
                if not skip:
                    return request
                skip -= 1
        raise AssertionError("a followed topic has no end")

    async def say(self, to: Request, value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        assert to.reply_to is not None
        place = to.reply_to
        await self._producer.send_and_wait(place.topic, value, partition=place.partition, headers=list(headers))

    async def reply(self, to: Request, result: Result, *, header: str | None = None) -> None:
        encoded = self._codec.encode(Destination("replies", result))
        assert encoded.value is not None
        headers = [("request_id", header.encode())] if header else encoded.headers
        await self.say(to, encoded.value, headers)


@asynccontextmanager
async def responding(settings: Settings) -> AsyncIterator[Responder]:
    await topics.create(settings, partitions=2, replication=1)
    codec, producer = Codec.from_settings(settings), AIOKafkaProducer(**connection(settings))
    await codec.start(topics.subjects(settings))
    await producer.start()
    try:
        yield Responder(settings, producer, codec)
    finally:
        await producer.stop()
        await codec.close()


async def test_only_first_copies_of_its_own_outcomes_are_taken(broker: Broker, unique: str) -> None:
    """A partition is shared: junk, strangers' replies and later copies in it change nothing."""
    settings = Settings(
        bootstrap_servers=broker.bootstrap_servers,
        topic_prefix=f"{unique}.",
        producer_idempotent=broker.is_apache_kafka,
    )
    async with responding(settings) as responder, Client(settings) as client:
        call = asyncio.create_task(client.embed(["a", "b"], tenant_id="acme", timeout_s=60))
        mine = await responder.next_request()
        ok = a_result(mine, 0)
        stranger = a_result(a_request(["x"], correlation_id="stranger"))
        await responder.say(mine, b"junk")
        await responder.say(mine, b"junk", [("request_id", ok.request_id.encode())])
        await responder.reply(mine, stranger)
        await responder.reply(mine, stranger, header=ok.request_id)
        await responder.reply(mine, ok)
        await responder.reply(mine, replace(ok, token_count=99))
        assert not call.done()
        await responder.reply(mine, a_result(mine, 1))
        outcomes = await call
    assert [(outcome.chunk_id, outcome.ok) for outcome in outcomes] == [("0", True), ("1", True)]
    assert outcomes[0].result is not None
    assert outcomes[0].result.token_count == ok.token_count


async def test_with_a_registry_requests_carry_its_ids_and_replies_are_read_by_them(kafka: Broker, unique: str) -> None:
    """The client registers the request's schema on both lanes and reads what others registered."""
    async with RegistryServer() as registry:
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.", schema_registry_url=registry.url
        )
        async with responding(settings) as responder, Client(settings) as client:
            call = asyncio.create_task(client.embed(["a"], tenant_id="acme", timeout_s=60))
            mine = await responder.next_request()
            await responder.reply(mine, a_result(mine))
            assert (await call)[0].ok
        lanes = {f"{unique}.embedding-requests-value", f"{unique}.embedding-queries-value"}
        assert lanes <= registry.compatibility.keys()


async def test_a_registry_that_fails_while_replies_are_read_is_an_error_not_a_silence(
    kafka: Broker, unique: str
) -> None:
    """The caller learns at once that it can't hear, and the next call hears again."""
    async with RegistryServer() as registry:
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.", schema_registry_url=registry.url
        )
        async with responding(settings) as responder, Client(settings) as client:
            call = asyncio.create_task(client.embed(["a"], tenant_id="acme", correlation_id="same", timeout_s=60))
            mine = await responder.next_request()
            registry.fails_with = 503
            await responder.reply(mine, a_result(mine))
            with pytest.raises(BrokerUnavailable, match="same correlation_id"):
                await call
            registry.fails_with = None
            call = asyncio.create_task(client.embed(["a"], tenant_id="acme", correlation_id="same", timeout_s=60))
            again = await responder.next_request(skip=1)
            await responder.reply(again, a_result(again))
            assert (await call)[0].ok
