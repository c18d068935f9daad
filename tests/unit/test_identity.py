"""Identities against golden vectors that an independent implementation made, and against collisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any
from uuid import UUID, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor import identity
from processor.adapters.avro import encode_request
from processor.adapters.avro_requests import RequestReader
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, schema_directory
from processor.domain import ACTION_ALIASES, Chunk, ReplyTo, Request
from tests.support.avro_data import TEXT
from tests.support.builders import a_request

GOLDEN = json.loads((schema_directory() / "examples" / "identity.json").read_text(encoding="utf-8"))


def golden_request(fields: dict[str, Any]) -> Request:
    fields = GOLDEN["defaults"] | fields
    return Request(**(fields | {"chunks": tuple(Chunk(**chunk) for chunk in fields["chunks"])}))


def test_namespaces_are_the_published_ones() -> None:
    """Whoever computes ids elsewhere starts from the namespaces of the golden file."""
    assert str(identity.REQUEST_NAMESPACE) == GOLDEN["request_namespace"]
    assert str(identity.VECTOR_NAMESPACE) == GOLDEN["vector_namespace"]


@pytest.mark.parametrize("case", GOLDEN["requests"], ids=lambda case: case["case"])
def test_request_ids_equal_the_golden_ones(case: dict[str, Any]) -> None:
    """A request id never changes from release to release, else replays would be charged again."""
    request = golden_request(case["request"])
    assert identity.digest(request).hex() == case["digest"]
    assert identity.request_id(request) == case["request_id"]


@pytest.mark.parametrize("case", GOLDEN["refusals"], ids=lambda case: case["case"])
def test_refusal_keys_equal_the_golden_ones(case: dict[str, Any]) -> None:
    """They never change either, and are plain UUIDv5 for who has a library."""
    assert identity.refusal_key(case["request_id"]) == case["refusal_key"]
    assert str(uuid5(UUID(case["request_id"]), "refusal")) == case["refusal_key"]


@pytest.mark.parametrize("case", GOLDEN["vectors"], ids=lambda case: case["case"])
def test_vector_ids_equal_the_golden_ones(case: dict[str, Any]) -> None:
    """A vector id never changes from release to release, else sinks would keep both."""
    parts = [case[name] for name in ("tenant_id", "collection", "document_id", "chunk_id", "vector_space")]
    assert identity.vector_id(*parts) == case["vector_id"]


@pytest.mark.parametrize(
    "change",
    [
        {"reply_to": ReplyTo("embedding-replies", 1)},
        {"deadline_ms": 1},
        {"requested_at_ms": 1},
        {"source_service": "other"},
        {"task_id": "task", "task_total": 3},
        {"conversation_id": "c"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_and_when_it_was_sent_is_no_part_of_the_identity(change: dict[str, Any]) -> None:
    """The same request sent again, from elsewhere or later, is the same charge."""
    request = a_request()
    assert identity.request_id(replace(request, **change)) == identity.request_id(request)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_id": "other"},
        {"correlation_id": "other"},
        {"action": "generate_query"},
        {"agent_id": "a"},
        {"agent_owner_id": "o"},
        {"collection": "other"},
        {"document_id": None},
        {"model": "m"},
        {"dimensions": 8},
        {"input_type": "query"},
        {"use_cache": False},
        {"truncate": "error"},
        {"metadata": {"k": "v"}},
        {"vector_spaces": ("s",)},
        {"first_chunk_index": 1},
        {"chunk_count": 1},
        {"chunks": (Chunk("c0", "other"),)},
        {"chunks": (Chunk("c1", "hello"),)},
        {"chunks": (Chunk("c0", "hello", {"k": "v"}),)},
        {"chunk_ids": ("c0",)},
        {"run_id": "r"},
    ],
    ids=str,
)
def test_what_is_asked_for_and_who_pays_is_part_of_the_identity(change: dict[str, Any]) -> None:
    """A constant correlation id is no free ride: each change of the body is a charge of its own."""
    request = a_request()
    assert identity.request_id(replace(request, **change)) != identity.request_id(request)


OPTIONAL = st.none() | TEXT
PARTS = st.tuples(TEXT, OPTIONAL, OPTIONAL, TEXT, TEXT)


@given(PARTS, PARTS)
def test_different_parts_have_different_vector_ids(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """No two chunks share a vector id, wherever their names are cut."""
    assert (identity.vector_id(*one) == identity.vector_id(*other)) == (one == other)


@given(st.lists(OPTIONAL, max_size=6), st.lists(OPTIONAL, max_size=6))
def test_the_encoding_can_be_told_apart(one: list[str | None], other: list[str | None]) -> None:
    """Two lists of texts share an encoding only when they are equal."""
    encoded = [b"".join(map(identity.encode_text, parts)) for parts in (one, other)]
    assert (encoded[0] == encoded[1]) == (one == other)


LABELS = st.dictionaries(TEXT, TEXT, max_size=2)
REQUESTS = st.builds(
    Request,
    tenant_id=TEXT,
    correlation_id=TEXT,
    action=st.sampled_from(["generate", "embedding.generate", "?"]),
    model=OPTIONAL,
    dimensions=st.none() | st.integers(0, 2),
    input_type=OPTIONAL,
    use_cache=st.booleans(),
    truncate=OPTIONAL,
    collection=OPTIONAL,
    document_id=OPTIONAL,
    agent_id=OPTIONAL,
    agent_owner_id=OPTIONAL,
    run_id=OPTIONAL,
    vector_spaces=st.lists(TEXT, max_size=2).map(tuple),
    metadata=LABELS,
    first_chunk_index=st.integers(0, 2),
    chunk_count=st.none() | st.integers(0, 2),
    chunks=st.lists(st.builds(Chunk, TEXT, TEXT, LABELS), max_size=2).map(tuple),
    chunk_ids=st.just(()) | st.lists(TEXT, max_size=2).map(tuple),
)


def plain_map(entries: Mapping[str, str]) -> bytes:
    pairs = sorted((key.encode(), value.encode()) for key, value in entries.items())
    return b"m%d:" % len(pairs) + b"".join(b"%d:%b%d:%b" % (len(k), k, len(v), v) for k, v in pairs)


def plain_digest(request: Request) -> bytes:
    """As the documentation spells it, part by part."""
    texts = (
        *(ACTION_ALIASES.get(request.action, request.action), request.tenant_id, request.agent_id),
        *(request.agent_owner_id, request.collection, request.document_id, request.model),
        None if request.dimensions is None else str(request.dimensions),
        *(request.input_type, str(request.use_cache).lower(), request.truncate),
    )
    chunks = [
        identity.encode_text(chunk.chunk_id) + identity.encode_text(chunk.text) + plain_map(chunk.metadata)
        for chunk in request.chunks
    ]
    parts = (
        *map(identity.encode_text, texts),
        plain_map(request.metadata),
        identity.encode_list([identity.encode_text(space) for space in request.vector_spaces]),
        identity.encode_int(request.first_chunk_index),
        identity.encode_int(request.chunk_count),
        identity.encode_list(chunks),
        identity.encode_list([identity.encode_text(chunk_id) for chunk_id in request.chunk_ids]),
    )
    return hashlib.sha256(b"".join(parts)).digest()


READER = RequestReader()


def sent(request: Request) -> Request:
    """As a worker reads it, which knows its sender, if there are chunks."""
    return READER.read(encode_request(request), SINGLE_OBJECT_HEADER_BYTES) or request


@settings(deadline=None)
@given(REQUESTS, REQUESTS, st.sampled_from([field.name for field in fields(Request) if field.init]))
def test_what_is_remembered_of_a_sender_changes_no_identity(one: Request, other: Request, field: str) -> None:
    """Digest and id are those of the parts one by one, also right after a request that differs in one field."""
    for request in map(sent, (one, replace(one, **{field: getattr(other, field)}), one)):
        digest = plain_digest(request)
        assert identity.digest(request) == digest
        parts = (request.tenant_id, request.correlation_id, digest.hex(), request.run_id)
        name = identity.REQUEST_NAMESPACE.bytes + b"".join(map(identity.encode_text, parts))
        assert identity.request_id(request) == str(UUID(bytes=hashlib.sha1(name).digest()[:16], version=5))


def test_what_is_remembered_of_senders_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new senders push out the old ones, and what nobody compared is not kept."""
    monkeypatch.setattr(identity, "MAX_SENDERS", 4)
    for number in range(20):
        request = a_request(tenant_id=f"t{number}")
        assert identity.digest(sent(request)) == identity.digest(request) == plain_digest(request)
    assert 0 < len(identity._senders) <= 4
    assert None not in identity._senders


@given(st.dictionaries(TEXT | st.sampled_from(["\uffff", "\U00010000", "~", "\x7f", "\x80"]), TEXT, max_size=4))
def test_a_map_is_in_the_order_of_its_keys_bytes(entries: dict[str, str]) -> None:
    """Whatever the order of the map and however many bytes its keys' characters take."""
    assert identity.encode_map(entries) == plain_map(entries)
    assert identity.encode_map(dict(reversed(entries.items()))) == plain_map(entries)
