"""What is not ours: every value that cannot be read has its reason, and none ends a process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters.avro import MAX_CORRELATION_BYTES, MAX_TENANT_BYTES, encode_request
from processor.adapters.schemas import MAX_SCHEMA_CHARACTERS, allowed, canonical_fingerprint, confluent_header, current
from processor.domain import DlqClass, ReplyTo, Request
from processor.ports import Undecodable
from tests.support.avro_data import encode
from tests.support.builders import a_request
from tests.support.codec import can_be_answered, decoded


def test_single_objects_begin_as_the_specification_says() -> None:
    """C3 01, then the fingerprint of the canonical form, little-endian."""
    value = encode_request(a_request())
    assert value[:10] == b"\xc3\x01" + canonical_fingerprint(json.loads(current("EmbeddingRequest").text))


VALID = encode_request(a_request(["one", "two"], metadata={"k": "v"}, reply_to=ReplyTo("t", 1, "w")))
BODY = VALID[10:]


@pytest.mark.parametrize(
    "value,expected",
    [
        (None, (DlqClass.UNDECODABLE, "null_value")),
        (b"", (DlqClass.UNDECODABLE, "no_frame")),
        (b"\xc3\x01short", (DlqClass.UNDECODABLE, "no_frame")),
        (b"\x00\x00\x00\x01", (DlqClass.UNDECODABLE, "no_frame")),
        (b'{"tenant_id": "acme"}', (DlqClass.UNDECODABLE, "no_frame")),
        (VALID[:10], (DlqClass.UNDECODABLE, "malformed")),
        (VALID[:-1], (DlqClass.UNDECODABLE, "malformed")),
        (VALID + b"\x00", (DlqClass.UNDECODABLE, "trailing_bytes")),
        (VALID + VALID, (DlqClass.UNDECODABLE, "trailing_bytes")),
        (b"\xc3\x01" + bytes(8) + BODY, (DlqClass.UNKNOWN_SCHEMA, "unknown_schema")),
        (confluent_header(1) + BODY, (DlqClass.UNKNOWN_SCHEMA, "no_registry")),
        (current("TokenUsage").single_object_header + BODY, (DlqClass.UNKNOWN_SCHEMA, "other_record")),
        (VALID + bytes(1_000_000), (DlqClass.TOO_LARGE, "over_max_record_bytes")),
    ],
    ids=lambda case: case[1] if isinstance(case, tuple) else "",
)
def test_what_is_no_request_says_why(value: bytes | None, expected: tuple[DlqClass, str]) -> None:
    """Each kind of unreadable record has its class and code."""
    assert decoded(value) == Undecodable(*expected)


@pytest.mark.parametrize(
    "change,code",
    [
        ({"tenant_id": ""}, "no_tenant_id"),
        ({"correlation_id": ""}, "no_correlation_id"),
        ({"tenant_id": "ü" * (MAX_TENANT_BYTES // 2 + 1)}, "identity_too_long"),
        ({"correlation_id": "x" * (MAX_CORRELATION_BYTES + 1)}, "identity_too_long"),
    ],
)
def test_a_request_without_identity_is_a_dead_letter(change: dict[str, str], code: str) -> None:
    """No result could be keyed or be told apart without tenant and correlation id."""
    assert decoded(encode_request(a_request(**change))) == Undecodable(DlqClass.NO_IDENTITY, code)


def test_the_longest_identity_passes() -> None:
    """The control: at the limit a request is a request."""
    request = a_request(tenant_id="ü" * (MAX_TENANT_BYTES // 2), correlation_id="x" * MAX_CORRELATION_BYTES)
    assert decoded(encode_request(request)) == request


def test_lone_surrogates_are_no_text() -> None:
    """UTF-8 has none, so they end as malformed bytes on the way in and as an error on the way out."""
    assert decoded(VALID.replace(b"one", "\ud800".encode("utf-8", "surrogatepass"))) == Undecodable(
        DlqClass.UNDECODABLE, "malformed"
    )
    with pytest.raises(UnicodeEncodeError):
        encode_request(a_request(["\ud800"]))


def recursive() -> Any:
    return {"type": "record", "name": "R", "fields": [{"name": "next", "type": ["null", "R"]}]}


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '"null"' + "}" * depth


CRASHERS = {
    "recursive record": json.dumps(recursive()),
    "array of null": json.dumps({"type": "array", "items": "null"}),
    "fixed of no bytes": json.dumps({"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}),
    "huge decimal": json.dumps({"type": "bytes", "logicalType": "decimal", "precision": 10**9, "scale": 10**9}),
    "enum": json.dumps({"type": "enum", "name": "E", "symbols": ["A"]}),
    "deepest nesting": nested(MAX_SCHEMA_CHARACTERS // 26),
    "deepest nesting of types": '{"type":' * (MAX_SCHEMA_CHARACTERS // 10)
    + '"null"'
    + "}" * (MAX_SCHEMA_CHARACTERS // 10),
    "deepest nesting of unions": "[" * (MAX_SCHEMA_CHARACTERS // 2) + "]" * (MAX_SCHEMA_CHARACTERS // 2),
    "too long": " " * MAX_SCHEMA_CHARACTERS + current("EmbeddingRequest").text,
    "no JSON": "{",
    "no schema": "42",
    "unknown type": '{"type": "nothing"}',
}


@pytest.mark.parametrize("text", CRASHERS.values(), ids=CRASHERS)
def test_schemas_that_crash_a_permissive_decoder_are_never_used(text: str) -> None:
    """A schema that is not ours, whatever it is, is refused without decoding anything by it."""
    assert allowed(text) is None


@pytest.mark.parametrize("name", ["recursive record", "array of null", "fixed of no bytes", "huge decimal", "enum"])
def test_records_of_crashing_schemas_end_as_unknown_schema(name: str) -> None:
    """A record that names such a schema by its fingerprint reaches no decoder."""
    value = b"\xc3\x01" + canonical_fingerprint(json.loads(CRASHERS[name])) + b"\xff" * 100
    assert decoded(value) == Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")


def test_a_schema_of_ours_is_known_in_any_spelling() -> None:
    """Order of attributes, docs and a Java producer's additions don't make a schema foreign."""
    text = current("EmbeddingRequest").text
    document = json.loads(text)
    java = json.loads(text.replace('"string"', '{"type": "string", "avro.java.string": "String"}'))
    plain = {key: document[key] for key in reversed(document) if key != "doc"}
    assert [allowed(json.dumps(schema)) for schema in (document, java, plain)] == [current("EmbeddingRequest")] * 3


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise(body: bytes) -> None:
    """Bad bytes are a value, with and without a frame before them."""
    for value in (body, VALID[:10] + body):
        assert isinstance(decoded(value), Undecodable | Request)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * len(VALID) - 1))
def test_a_flipped_bit_never_raises(bit: int) -> None:
    """A damaged record is another request or a dead letter, and never an exception."""
    damaged = bytearray(VALID)
    damaged[bit // 8] ^= 1 << bit % 8
    request = decoded(bytes(damaged))
    assert isinstance(request, Undecodable) or can_be_answered(request)


@pytest.mark.parametrize("size", range(len(VALID)))
def test_a_cut_record_is_undecodable(size: int) -> None:
    """No head of a record is a record."""
    assert decoded(VALID[:size]).reason is DlqClass.UNDECODABLE


@pytest.mark.parametrize("count", [2**31, 2**62, -(2**62), -(2**63)], ids=str)
def test_a_huge_count_allocates_nothing(count: int) -> None:
    """A list that claims more items than there are bytes ends as malformed."""
    assert decoded(VALID[:-1] + encode("long", count)).reason is DlqClass.UNDECODABLE


def with_union_index(index: int) -> bytes:
    """A request whose optional model names that branch."""
    value, without = encode_request(a_request(model="m")), encode_request(a_request())
    at = next(i for i, (one, other) in enumerate(zip(value, without, strict=False)) if one != other)
    assert value[at : at + 3] == b"\x02\x02m"
    return value[:at] + encode("long", index) + value[at + 1 :]


@pytest.mark.parametrize("index", [2, 2**31, 2**62, -3, -(2**31), -(2**63)])
def test_a_union_index_without_branch_is_malformed(index: int) -> None:
    """An index outside of the union leads nowhere."""
    assert decoded(with_union_index(index)) == Undecodable(DlqClass.UNDECODABLE, "malformed")


@pytest.mark.parametrize("index", [-1, -2])
def test_a_union_index_counted_from_the_end_harms_nothing(index: int) -> None:
    """The Avro library takes -1 for the last branch, which reads a valid request or none."""
    assert isinstance(decoded(with_union_index(index)), Undecodable | Request)
