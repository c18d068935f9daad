"""What the client refuses, and how it cuts what is too large for one request."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters.avro import encode_request, request_key
from processor.client import Client
from processor.client.requests import MAX_CHUNKS, as_chunks, check, split
from processor.domain import Chunk, ReplyTo, Request
from processor.errors import RequestRefused
from processor.settings import Settings
from tests.support.builders import a_request, some_chunks

HALF = "\ud800"


def parts_of(request: Request, max_bytes: int = 900_000) -> list[Request]:
    return split(request, max_bytes=max_bytes, encode=encode_request)


def texts(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=size)


@given(
    chunks=st.lists(
        st.builds(Chunk, texts(12), texts(600), st.dictionaries(texts(8), texts(30), max_size=4)),
        min_size=1,
        max_size=40,
    ),
    max_bytes=st.integers(6_000, 9_000),
)
@settings(max_examples=60, deadline=None)
def test_every_part_fits_and_all_of_them_are_the_whole(chunks: list[Chunk], max_bytes: int) -> None:
    """As encoded no part is over the limit, and in order the parts hold each chunk once, at its index."""
    request = a_request(chunks=tuple(chunks), reply_to=ReplyTo("embedding-replies", 7, "callback"))
    parts = parts_of(request, max_bytes)
    assert all(len(encode_request(part)) <= max_bytes for part in parts)
    assert [chunk for part in parts for chunk in part.chunks] == chunks
    indices = [part.first_chunk_index + place for part in parts for place in range(part.length)]
    assert indices == list(range(len(chunks)))
    assert {part.whole_count for part in parts} == {len(chunks)}


def test_a_request_that_fits_is_left_alone() -> None:
    """Only a split request names the whole's count: the digest of an unsplit one does not depend on the client."""
    request = a_request(some_chunks_texts(MAX_CHUNKS))
    assert parts_of(request) == [request]


def some_chunks_texts(count: int) -> list[str]:
    return [f"text {place}" for place in range(count)]


@pytest.mark.parametrize("kind", ["chunks", "chunk_ids"])
def test_more_than_2048_are_split(kind: str) -> None:
    """One chunk (or id of a delete) too many makes a second part that says where it begins."""
    count = MAX_CHUNKS + 1
    if kind == "chunks":
        request = a_request(some_chunks_texts(count))
    else:
        ids = tuple(map(str, range(count)))
        request = a_request(action="delete", chunks=(), chunk_ids=ids, vector_spaces=("s",))
    parts = parts_of(request)
    assert [(part.first_chunk_index, part.length, part.chunk_count) for part in parts] == [
        (0, MAX_CHUNKS, count),
        (MAX_CHUNKS, 1, count),
    ]


def test_a_text_that_fits_no_request_is_refused_by_its_place() -> None:
    """The error names the chunk and both sizes, not the text."""
    with pytest.raises(RequestRefused, match=r"chunks\[1\]: 2\d{3} bytes, a request has room for \d+"):
        parts_of(a_request(["short", "long " * 400]), max_bytes=2_000)


def test_a_manifest_is_never_split() -> None:
    """The list of a document's chunk ids is one record or an error."""
    ids = tuple(f"chunk {place}" for place in range(MAX_CHUNKS + 500))
    manifest = a_request(action="document_manifest", chunks=(), chunk_ids=ids, vector_spaces=("s",))
    assert parts_of(manifest) == [manifest]
    with pytest.raises(RequestRefused, match="chunk_ids: a manifest is at most 10000 bytes"):
        parts_of(manifest, max_bytes=10_000)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tenant_id": ""}, "tenant_id: is empty"),
    ({"tenant_id": "t" * 257}, "tenant_id: is over 256 bytes"),
    ({"correlation_id": ""}, "correlation_id: is empty"),
    ({"correlation_id": "c" * 1025}, "correlation_id: is over 1024 bytes"),
    ({"action": "sing"}, "action: must be one of"),
    ({"chunks": ()}, "chunks: is empty"),
    ({"chunks": (), "action": "delete"}, "chunk_ids: is empty"),
    ({"chunks": some_chunks([f"secret {HALF}"])}, r"chunks\[0\].text: character 7 is half of a surrogate pair"),
    ({"chunks": (Chunk("a", "x", {"k": HALF}),)}, r"chunks\[0\].metadata: character 0"),
    (
        {"chunks": (Chunk("a", "x"), Chunk("b", "y"), Chunk("a", "z"))},
        r"chunks\[2\].chunk_id: is the same as chunks\[0\]",
    ),
    ({"chunks": (), "action": "delete", "chunk_ids": ("a", "a")}, r"chunk_ids\[1\]: is the same as chunk_ids\[0\]"),
    ({"chunks": (Chunk("a", 5),)}, r"chunks\[0\].text: must be text, not int"),  # type: ignore[arg-type]
    ({"collection": HALF}, "collection: character 0"),
    ({"metadata": {"k": "v" * 8_192}}, "metadata: is over 8192 bytes"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_bad_input_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    """The caller reads which field is wrong, before anything was sent, and no text is quoted."""
    with pytest.raises(RequestRefused, match=message) as raised:
        check(a_request(**fields))
    assert "secret" not in str(raised.value)
    assert raised.value.__context__ is None


def test_what_a_worker_answers_by_itself_is_not_refused() -> None:
    """Empty texts and an empty manifest have outcomes of their own; astral characters are whole ones."""
    check(a_request(["", " ", "\U0001f600"]))
    check(a_request(action="document_manifest", chunks=(), chunk_ids=(), vector_spaces=("s",)))


def test_plain_texts_are_named_by_their_place() -> None:
    """The caller who names no chunks still gets ids, and one text alone is not taken for a list of letters."""
    assert [chunk.chunk_id for chunk in as_chunks(["a", Chunk("mine", "b"), "c"])] == ["0", "mine", "2"]
    with pytest.raises(RequestRefused, match="texts: is one text"):
        as_chunks("hello")


def test_a_documents_requests_share_a_key() -> None:
    """Parts, manifests and deletes of one document stay in order; its three ids can't run into one another."""
    request = a_request(some_chunks_texts(MAX_CHUNKS + 1))
    manifest = dataclasses.replace(request, action="document_manifest", chunks=(), chunk_ids=("c0",))
    assert {request_key(part) for part in [*parts_of(request), manifest]} == {b'["acme","docs","doc-1"]'}
    others = [
        a_request(tenant_id="a", collection="b,c", document_id="d"),
        a_request(tenant_id="a,b", collection="c", document_id="d"),
        a_request(tenant_id="a", collection=None, document_id="d"),
        a_request(tenant_id="a", collection="", document_id="d"),
    ]
    assert len(set(map(request_key, others))) == len(others)
    assert request_key(a_request(document_id=None)) is None


async def test_a_delete_means_the_spaces_given_or_set_or_of_the_model() -> None:
    """The caller's word goes before the settings', and without both the model's own space is meant."""
    default = Client(Settings(provider="openai"))
    listed = Client(Settings(provider="openai", vector_spaces=("a@1/8/l2", "b@1/8/l2")))
    assert listed._spaces(["c@1/8/l2"], a_request()) == ("c@1/8/l2",)
    assert listed._spaces([], a_request()) == ("a@1/8/l2", "b@1/8/l2")
    assert default._spaces([], a_request()) == ("text-embedding-3-small@1/1536/l2",)
    large = a_request(model="text-embedding-3-large", dimensions=256)
    assert default._spaces([], large) == ("text-embedding-3-large@1/256/l2",)
    with pytest.raises(RequestRefused, match="vector_spaces: the model is not in this client's catalogue"):
        default._spaces([], a_request(model="nobody-knows"))


def test_settings_may_be_given_in_part() -> None:
    """An address alone is enough, and goes before the one in the settings."""
    assert Client(bootstrap_servers="b:1").settings.bootstrap_servers == "b:1"
    client = Client(Settings(topic_prefix="p."), bootstrap_servers="b:2")
    assert (client.settings.topic_prefix, client.settings.bootstrap_servers) == ("p.", "b:2")
