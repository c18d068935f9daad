"""The fast reader of requests: what it takes is what the general reader finds, and it takes what is ordinary."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters import avro_requests
from processor.adapters.avro import encode_request
from processor.adapters.avro_records import read
from processor.adapters.avro_requests import RequestReader
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import Chunk, ReplyTo, Request
from processor.ports import Undecodable
from tests.support.avro_data import LONG, TEXT, encode, left_when_cut, left_when_damaged, values_of, zigzag
from tests.support.builders import NOW_MS, a_request, some_chunks

SCHEMA = current("EmbeddingRequest")
HEADER = SCHEMA.single_object_header
START = SINGLE_OBJECT_HEADER_BYTES
READER = RequestReader()
"""Shared by all tests of this file, as one is by all records of a worker: what it remembers must harm no other."""

LONG_TEXT = st.builds(lambda text, times: text * times, TEXT, st.sampled_from([1, 1, 7, 100, 1_000]))
LABELS = st.dictionaries(TEXT, TEXT, max_size=3)
REQUESTS = st.builds(
    Request,
    tenant_id=st.sampled_from(["", "acme", "ö" * 40]),
    correlation_id=LONG_TEXT,
    action=st.sampled_from(["generate", "something else"]),
    dimensions=st.none() | LONG,
    use_cache=st.booleans(),
    document_id=st.none() | LONG_TEXT,
    task_total=st.none() | LONG,
    reply_to=st.none() | st.builds(ReplyTo, TEXT, LONG, st.none() | TEXT),
    deadline_ms=st.none() | LONG,
    requested_at_ms=st.sampled_from([0, NOW_MS, NOW_MS + 1, -1]) | LONG,
    vector_spaces=st.lists(TEXT, max_size=2).map(tuple),
    metadata=LABELS,
    first_chunk_index=st.sampled_from([0, 0, 70]) | LONG,
    chunk_count=st.none() | LONG,
    chunks=st.lists(st.builds(Chunk, LONG_TEXT, LONG_TEXT, LABELS), min_size=1, max_size=3).map(tuple)
    | st.just(some_chunks(["x"] * 100)),
)


def generally(value: bytes) -> Any:
    """What the general reader says, which is fastavro."""
    try:
        return read(Request, value, START, SCHEMA)
    except Exception:  # noqa: BLE001 - bad bytes end in any
        return None


def fast_or_left(value: bytes) -> Request | None:
    """What the fast reader says, after the check that it left the record alone or agrees with fastavro."""
    found = READER.read(value, START)
    assert found is None or found == generally(value)
    return found


@settings(max_examples=150, deadline=None)
@given(REQUESTS)
def test_requests_with_chunks_are_read_as_fastavro_reads_them(request: Request) -> None:
    """Whatever the fields hold, a request that one block of chunks was written for is taken and equal."""
    value = encode_request(request)
    found = READER.read(value, START)
    assert found == generally(value) == request


@settings(max_examples=100, deadline=None)
@given(values_of(json.loads(SCHEMA.text)))
def test_any_request_of_the_schema_is_equal_or_left(fields: dict[str, Any]) -> None:
    """Requests of other shapes (no chunks, chunk ids) are left to the general reader, and only those."""
    found = fast_or_left(HEADER + encode(SCHEMA.parsed, fields))
    assert (found is None) == (not fields["chunks"] or bool(fields["chunk_ids"]))


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.data())
def test_damaged_requests_are_equal_or_left(request: Request, data: st.DataObject) -> None:
    """Flipped bits, cut ends, bytes put in or left over: never anything that fastavro does not read the same."""
    left_when_damaged(fast_or_left, encode_request(request), START, data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_equal_or_left(body: bytes) -> None:
    """Random bytes, alone and before the tail of a request."""
    tail = encode_request(a_request())[-40:]
    fast_or_left(HEADER + body)
    fast_or_left(HEADER + body + tail)


def test_every_bit_and_every_end_of_a_request() -> None:
    """The same, for each bit and each length of one request with everything in it."""
    value = encode_request(
        a_request(
            chunks=(Chunk("ü" * 50, "text " * 30, {"page": "1"}), Chunk("c1", "", {})),
            deadline_ms=NOW_MS,
            chunk_count=70,
            first_chunk_index=68,
            reply_to=ReplyTo("replies", 3, "kind"),
            metadata={"language": "en"},
        )
    )
    left_when_cut(fast_or_left, value, START)


@pytest.mark.parametrize(
    "chunks",
    [
        zigzag(-1) + zigzag(5) + b"\x04c0\x00\x00" + b"\x00",
        zigzag(1) + b"\x04c0\x00\x00" + zigzag(1) + b"\x04c1\x00\x00" + b"\x00",
        zigzag(1) + b"\x04c0\x00" + zigzag(-1) + zigzag(4) + b"\x02k\x02v\x00" + b"\x00",
        b"\x82\x00" + b"\x04c0\x00\x00" + b"\x00",
        zigzag(1) + b"\x84\x80\x00c0\x00\x00" + b"\x00",
    ],
    ids=["sized block", "two blocks", "sized map", "overlong count", "overlong length"],
)
def test_unusual_spellings_are_read_all_the_same(chunks: bytes) -> None:
    """What other Avro writers may send is valid: it is equal or left, and the general reader reads it."""
    value = encode_request(a_request(chunks=(Chunk("c0", "", {}),)))
    spelled = value.replace(zigzag(1) + b"\x04c0\x00\x00\x00", chunks, 1)
    assert spelled != value
    fast_or_left(spelled)
    assert isinstance(generally(spelled), Request)


@pytest.mark.parametrize("at_byte", [b"correlation", b"document", b"chunk", b"text", b"service"])
def test_text_that_is_no_utf_8_is_left(at_byte: bytes) -> None:
    """Wherever it stands."""
    value = encode_request(
        a_request(
            correlation_id="correlation",
            document_id="document",
            chunks=(Chunk("chunk", "text"),),
            source_service="service",
        )
    )
    assert fast_or_left(value) is not None
    assert fast_or_left(value.replace(at_byte, b"\xff" + at_byte[1:], 1)) is None


def test_what_a_sender_repeats_is_the_same_object() -> None:
    """Equal tails give the same strings and maps, so that look-ups by them compare no characters."""
    reader = RequestReader()
    one, other = (
        reader.read(encode_request(a_request(correlation_id=name, metadata={"a": "b"})), START) for name in "xy"
    )
    assert one is not None
    assert other is not None
    assert one.tenant_id is other.tenant_id
    assert one.metadata is other.metadata
    assert one.sender is other.sender is not None
    assert replace(one, tenant_id="other").sender is None
    assert (one.correlation_id, other.correlation_id) == ("x", "y")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new tails and times push out the old ones, too long ones are not kept, and all are read right."""
    monkeypatch.setattr(avro_requests, "MAX_TAILS", 4)
    monkeypatch.setattr(avro_requests, "MAX_TIMES", 4)
    reader = RequestReader()
    base = a_request(metadata={"k": "v"})
    for number in range(20):
        request = replace(base, tenant_id=f"t{number}", requested_at_ms=NOW_MS + number)
        assert reader.read(encode_request(request), START) == request
    long_tail = replace(base, metadata={"k": "v" * avro_requests.MAX_TAIL_BYTES})
    long_read = reader.read(encode_request(long_tail), START)
    assert long_read == long_tail
    assert long_read.sender is None
    assert len(reader._tails) <= 4
    assert len(reader._times) <= 4
    assert max(map(len, reader._tails)) <= avro_requests.MAX_TAIL_BYTES


def test_the_general_reader_alone_names_what_is_wrong() -> None:
    """Control: bytes left over are refused by both, and only the general reader says why."""
    value = encode_request(a_request()) + b"\x00"
    assert READER.read(value, START) is None
    assert isinstance(generally(value), Undecodable)
