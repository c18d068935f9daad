"""Framing with a schema registry over HTTP: our own server, and the one that EMBEDDING_TEST_REGISTRY_URL names."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from processor.adapters.avro import Codec, encode_request
from processor.adapters.registry import SchemaRegistry
from processor.adapters.schemas import confluent_header, current
from processor.adapters.topics import subjects
from processor.domain import DlqClass, ReceivedResult
from processor.errors import RegistryUnavailable
from processor.ports import Destination, Undecodable
from processor.settings import Settings
from tests.support.builders import a_record, a_request, a_result
from tests.support.schema_registry import RegistryServer

TOPIC = "embedding-requests"
REAL = os.environ.get("EMBEDDING_TEST_REGISTRY_URL")


@pytest.fixture
async def server() -> AsyncIterator[RegistryServer]:
    async with RegistryServer() as server:
        yield server


@pytest.fixture(params=["own", *(["real"] if REAL else [])])
async def url(request: pytest.FixtureRequest, server: RegistryServer) -> str:
    """The address of each registry to be had."""
    return REAL if REAL and request.param == "real" else server.url


@pytest.fixture
async def codec(url: str) -> AsyncIterator[Codec]:
    async for opened in opened_codec(url):
        yield opened


async def opened_codec(url: str, **options: Any) -> AsyncIterator[Codec]:
    codec = Codec(registry=SchemaRegistry(url, timeout_s=10), **options)
    try:
        yield codec
    finally:
        await codec.close()


@pytest.fixture
async def own(server: RegistryServer) -> AsyncIterator[Codec]:
    async for opened in opened_codec(server.url):
        yield opened


def of_id(schema_id: int) -> bytes:
    """A request's body behind that id."""
    return confluent_header(schema_id) + encode_request(a_request())[10:]


async def test_a_record_is_framed_with_its_id_and_comes_back(codec: Codec, url: str, unique: str) -> None:
    """One process writes in Confluent's format, another that knows only the registry reads it."""
    await codec.start([(f"{unique}-{TOPIC}", "EmbeddingRequest")])
    value = codec.encode_request(a_request(["one"]))
    assert value[0] == 0
    async for reader in opened_codec(url):
        assert await reader.decode(a_record(value)) == a_request(["one"])


async def test_starting_again_finds_the_same_id(codec: Codec, url: str, unique: str) -> None:
    """A schema that is registered already is looked up, so every process writes the same header."""
    values = [(f"{unique}-{TOPIC}", "EmbeddingRequest")]
    await codec.start(values)
    async for other in opened_codec(url):
        await other.start(values)
        assert other.encode_request(a_request()) == codec.encode_request(a_request())


async def test_every_topic_of_ours_can_be_registered(codec: Codec, unique: str) -> None:
    """Each value of topics.yaml has a schema, and results are framed with theirs."""
    await codec.start(subjects(Settings(topic_prefix=f"{unique}-")))
    value = codec.encode(Destination("results", a_result())).value
    received = await codec.read(ReceivedResult, value)
    assert isinstance(received, ReceivedResult)
    assert received.request_id == a_result().request_id


async def test_single_objects_are_read_as_well(codec: Codec) -> None:
    """Records from before the registry stay readable."""
    assert await codec.decode(a_record(encode_request(a_request()))) == a_request()


async def test_an_unknown_id_is_an_unknown_schema(codec: Codec) -> None:
    """What the registry never gave out can't be decoded, now or later."""
    assert await codec.decode(a_record(of_id(2**31 - 1))) == Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")


async def test_new_subjects_are_full_transitive(own: Codec, server: RegistryServer) -> None:
    """The registry then refuses a change that a reader could not follow."""
    await own.start([(TOPIC, "EmbeddingRequest")])
    assert server.compatibility == {f"{TOPIC}-value": "FULL_TRANSITIVE"}


FOREIGN = {
    "recursive": json.dumps({"type": "record", "name": "R", "fields": [{"name": "n", "type": ["null", "R"]}]}),
    "array of null": json.dumps({"type": "array", "items": "null"}),
    "one more field": json.dumps(
        (ours := json.loads(current("EmbeddingRequest").text))
        | {"fields": [*ours["fields"], {"name": "x", "type": "string"}]}
    ),
    "no schema": "{",
}


@pytest.mark.parametrize("schema", FOREIGN.values(), ids=FOREIGN)
async def test_foreign_schemas_are_never_used(own: Codec, server: RegistryServer, schema: str) -> None:
    """That a schema lies in the registry does not make it ours."""
    record = a_record(of_id(server.put(schema)))
    assert await own.decode(record) == Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")


async def test_other_kinds_of_schema_are_never_used(own: Codec, server: RegistryServer) -> None:
    """A JSON schema that happens to spell ours is none of ours."""
    number = server.put(current("EmbeddingRequest").text, "JSON")
    assert await own.decode(a_record(of_id(number))) == Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")


async def test_a_respelled_schema_of_ours_is_known(own: Codec, server: RegistryServer) -> None:
    """A registry may store our schema without its docs or blanks."""
    number = server.put(json.dumps(json.loads(current("EmbeddingRequest").text) | {"doc": "other"}))
    assert await own.decode(a_record(of_id(number))) == a_request()


async def test_an_id_is_asked_for_once(own: Codec, server: RegistryServer) -> None:
    """What an id stands for never changes, so a stream of records costs one request."""
    ours, foreign = server.put(current("EmbeddingRequest").text), server.put(FOREIGN["recursive"])
    for _ in range(3):
        await own.decode(a_record(of_id(ours)))
        await own.decode(a_record(of_id(foreign)))
    assert server.requests == [f"GET /schemas/ids/{ours}", f"GET /schemas/ids/{foreign}"]


async def test_a_request_is_decoded_at_once_when_its_schema_is_known(own: Codec, server: RegistryServer) -> None:
    """An unknown id has to be asked for first; after that no record waits, whether it is a request or not."""
    ours, foreign = server.put(current("EmbeddingRequest").text), server.put(FOREIGN["recursive"])
    assert own.decode_now(a_record(of_id(ours))) is None
    assert own.decode_now(a_record(of_id(foreign))) is None
    await own.decode(a_record(of_id(ours)))
    await own.decode(a_record(of_id(foreign)))
    asked = len(server.requests)
    for _ in range(3):
        assert own.decode_now(a_record(of_id(ours))) == a_request()
        malformed = own.decode_now(a_record(of_id(ours) + b"\0"))
        assert malformed == Undecodable(DlqClass.UNDECODABLE, "trailing_bytes")
        unknown = own.decode_now(a_record(of_id(foreign)))
        assert unknown == Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")
    assert len(server.requests) == asked


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_a_registry_in_trouble_makes_no_dead_letters(own: Codec, server: RegistryServer, status: int) -> None:
    """An answer that settles nothing is an outage of ours, and the record is tried again when it is over."""
    record = a_record(of_id(server.put(current("EmbeddingRequest").text)))
    server.fails_with = status
    with pytest.raises(RegistryUnavailable, match=f"HTTP {status}") as raised:
        await own.decode(record)
    assert "canary" not in str(raised.value)
    server.fails_with = None
    assert await own.decode(record) == a_request()


async def test_an_unreachable_registry_is_an_outage() -> None:
    """Nobody listening is no reason to give a record up, and the message holds no password."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        async for codec in opened_codec(f"http://user:canary@{address}"):
            with pytest.raises(RegistryUnavailable) as raised:
                await codec.decode(a_record(of_id(1)))
    assert "canary" not in str(raised.value)


async def test_a_read_only_registry_will_do(server: RegistryServer) -> None:
    """Where somebody else registers our schemas, a look-up suffices."""
    async for codec in opened_codec(server.url):
        await codec.start([(TOPIC, "EmbeddingRequest")])
    server.read_only = True
    async for codec in opened_codec(server.url):
        await codec.start([(TOPIC, "EmbeddingRequest")])
        assert codec.encode_request(a_request())[0] == 0
        with pytest.raises(RegistryUnavailable, match="403"):
            await codec.start([("other-topic", "EmbeddingRequest")])
