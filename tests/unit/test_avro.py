"""The codec: what is sent comes back, and keys and headers are as documented."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import BucketKey, TaskProgress, UsageSums, UsageTotal
from processor.adapters import avro_records
from processor.adapters.avro import DLQ_SPARE_BYTES, Codec, encode_request, key_of, request_key
from processor.adapters.murmur2 import partition_of
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import (
    Amounts,
    CallKind,
    CallOutcome,
    DeadLetter,
    DlqClass,
    DocumentManifest,
    ErrorCode,
    Fault,
    Part,
    ProviderCall,
    ReceivedResult,
    Record,
    ReplyTo,
    Request,
    Status,
    Tombstone,
    Usage,
)
from processor.ports import Destination, Undecodable
from tests.support.avro_data import encode, values_of
from tests.support.builders import NOW_MS, a_call, a_record, a_request, a_result, a_source, a_usage, some_chunks
from tests.support.codec import CODEC, can_be_answered, decoded, read, value_of

MANIFEST = DocumentManifest(
    tenant_id="acme",
    collection=None,
    document_id="doc-1",
    chunk_ids=("c0", "c1"),
    vector_spaces=("m@1/4/l2",),
    source_version=a_source(7).version,
    request_id="r",
)
TOTAL = UsageTotal(
    key=BucketKey("acme", "2026-09", "model", "m"),
    partitions={3: (17, UsageSums(requests=2, billed_tokens=5)), 1: (4, UsageSums(requests=1, billed_tokens=7))},
    updated_at_ms=NOW_MS,
)
PROGRESS = TaskProgress(tenant_id="acme", task_id="t", done=3, failed=1, total=None, updated_at_ms=NOW_MS)
RECEIPT = a_call(
    CallKind.RECEIPT, items=(), outcome=CallOutcome.INVALID, billed_tokens=9, http_status=200, price_version="p"
)


# What is sent comes back.


def framed(record: str, fields: dict[str, Any]) -> bytes:
    return current(record).single_object_header + encode(current(record).parsed, fields)


def test_a_request_comes_back_as_it_was_sent() -> None:
    """Every field of a request survives the wire, with null apart from empty."""
    request = a_request(
        chunks=some_chunks(["one", "\x00", "", "<|endoftext|>", "日本語 🚂"], {"page": "1"}),
        model="m",
        dimensions=8,
        input_type="query",
        use_cache=False,
        truncate="truncate_end",
        collection="",
        task_id="t",
        task_total=9,
        agent_id="a",
        agent_owner_id="o",
        conversation_id="c",
        reply_to=ReplyTo("embedding-replies", 3, None),
        deadline_ms=NOW_MS,
        run_id="r",
        vector_spaces=("s",),
        metadata={"k": "v"},
        first_chunk_index=2048,
        chunk_count=4096,
        chunk_ids=("c0",),
    )
    assert decoded(encode_request(request)) == request


@settings(max_examples=60, deadline=None)
@given(values_of(json.loads(current("EmbeddingRequest").text)))
def test_any_request_of_the_schema_is_decoded(fields: dict[str, Any]) -> None:
    """Whatever a producer may send by the schema becomes a request or a dead letter without identity."""
    value = current("EmbeddingRequest").single_object_header + encode(current("EmbeddingRequest").parsed, fields)
    request = decoded(value)
    if not fields["tenant_id"] or not fields["correlation_id"]:
        assert request.reason is DlqClass.NO_IDENTITY
    elif isinstance(request, Request):
        assert decoded(encode_request(request)) == request
        assert can_be_answered(request)
    else:
        assert request == Undecodable(DlqClass.NO_IDENTITY, "identity_too_long")


def test_a_usage_event_comes_back_with_what_it_repeats_of_its_request() -> None:
    """All of a usage event survives but its request's texts and parameters, which it does not carry."""
    request = a_request(
        ["one", "two"], agent_owner_id="o", task_id="t", task_total=4, first_chunk_index=2, metadata={"k": "v"}
    )
    usage = a_usage(
        request,
        source=a_source(41, partition=3),
        billed=Amounts(1, 3, 3, None),
        saved=Amounts(1, 2, 3, None),
        price_nanos_per_million=None,
        price_version=None,
        parts=(Part("a", 1), Part("b", 2)),
    )
    expected = replace(usage, request=replace(request, chunks=()))
    assert read(Usage, value_of("usage", usage)) == expected


@pytest.mark.parametrize(
    "name,message",
    [("calls", a_call()), ("calls", RECEIPT), ("documents", MANIFEST), ("totals", TOTAL), ("progress", PROGRESS)],
    ids=["intent", "receipt", "manifest", "total", "progress"],
)
def test_a_message_comes_back_as_it_was_sent(name: str, message: Any) -> None:
    """Ledger, manifests, totals and progress survive the wire."""
    assert read(type(message), value_of(name, message)) == message


def test_a_total_is_the_sum_over_its_partitions() -> None:
    """A reader of totals needs no sum of its own."""
    schema = current("UsageTotal")
    fields = avro_records._read_fields(value_of("totals", TOTAL), SINGLE_OBJECT_HEADER_BYTES, schema)
    assert not isinstance(fields, Undecodable)
    assert fields["totals"] == avro_records._plain_fields(UsageSums(requests=3, billed_tokens=12))


def test_a_failed_request_comes_back_as_one_result() -> None:
    """An error of the whole request has no vector, index -1, and the range it stands for."""
    request = a_request(
        ["one", "two", "three"], first_chunk_index=5, chunk_count=9, reply_to=ReplyTo("embedding-replies", 0, "word")
    )
    fault = Fault(ErrorCode.UNKNOWN_MODEL, "model", "not listed", retryable=False)
    result = a_result(request, chunk_index=-1, length=3, chunk_id="", status=Status.ERROR, error=fault, vector=None)
    received = read(ReceivedResult, value_of("results", result))
    assert (received.error, received.vector, received.vector_id) == (fault, None, None)
    assert (received.reply_type, received.operation, received.chunk_count) == ("word", "document", 9)
    assert [index for index in range(10) if received.stands_for(index)] == [5, 6, 7]


def test_words_of_a_newer_writer_pass() -> None:
    """An unknown word of an open set is read as that text and harms nothing."""
    fields = avro_records._call_fields(RECEIPT) | {"outcome": "refunded"}
    call = read(ProviderCall, framed("ProviderCall", fields))
    assert call.outcome == "refunded"


FIRST = a_result(a_request(["a", "b"]))


@pytest.mark.parametrize(
    "change",
    [
        {"request": a_request(["a", "b"], task_id="other")},
        {"source": a_source(9)},
        {"request_id": "other"},
        {"chunk_index": 1, "chunk_id": "c1"},
        {"first_chunk_index": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_memory_of_shared_parts_mixes_up_no_results(change: dict[str, Any]) -> None:
    """A result written after one that it differs from in one point equals that of a codec without memory."""
    results = [FIRST, replace(FIRST, **change), FIRST]
    assert [value_of("results", result) for result in results] == [
        Codec().encode(Destination("results", result)).value for result in results
    ]


# Keys, headers, partitions.


RESULT = a_result()


@pytest.mark.parametrize(
    "name,message,key",
    [
        ("results", RESULT, b"corr-1"),
        ("replies", RESULT, None),
        ("sink", RESULT, (RESULT.vector_id or "").encode()),
        ("sink", Tombstone("v", "1"), b"v"),
        ("usage", a_usage(a_request(agent_owner_id="owner")), b"owner"),
        ("late", a_usage(), b"acme"),
        ("calls", a_call(), b"attempt-1"),
        ("documents", MANIFEST, b'["acme",null,"doc-1"]'),
        ("documents", replace(MANIFEST, collection="Größe"), '["acme","Größe","doc-1"]'.encode()),
        ("totals", TOTAL, b'["acme","2026-09","model","m"]'),
        ("progress", PROGRESS, b'["acme","t"]'),
        ("dlq", DeadLetter(record=a_record(b"x", key=b"k"), reason=DlqClass.LETHAL, code="c", at_ms=1), b"k"),
    ],
)
def test_messages_are_keyed_as_described(name: str, message: Any, key: bytes | None) -> None:
    """The key of each topic is a function of the ids that topics.yaml names."""
    assert key_of(Destination(name, message)) == CODEC.encode(Destination(name, message)).key == key


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_composite_keys_are_never_shared(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two tasks have one key only when they are one."""
    keys = [key_of(Destination("progress", replace(PROGRESS, tenant_id=t, task_id=i))) for t, i in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_a_request_is_keyed_by_its_document() -> None:
    """Requests of one document keep their order; without a document there is none to keep."""
    assert request_key(a_request()) == b'["acme","docs","doc-1"]'
    assert request_key(a_request(document_id=None)) is None


def test_results_name_their_request_in_a_header() -> None:
    """A reader of replies finds its own without decoding; the sink view names the version as well."""
    request_id = ("request_id", RESULT.request_id.encode())
    version = ("source_version", RESULT.source.version.encode())
    headers = {name: list(CODEC.encode(Destination(name, RESULT)).headers) for name in ("results", "replies", "sink")}
    assert headers == {"results": [request_id], "replies": [request_id], "sink": [request_id, version]}


def test_a_tombstone_is_a_null_with_its_version() -> None:
    """A delete carries the version that a sink compares."""
    encoded = CODEC.encode(Destination("sink", Tombstone("v", a_source(3).version)))
    assert (encoded.value, encoded.headers) == (None, [("source_version", a_source(3).version.encode())])


OURS = [
    ("error_class", b"undecodable"),
    ("error_code", b"malformed"),
    ("source_topic", b"embedding-requests"),
    ("source_partition", b"2"),
    ("source_offset", b"5"),
    ("failed_at_ms", b"%d" % NOW_MS),
]


def dead_letter(record: Record, **fields: Any) -> Any:
    letter = DeadLetter(record=record, reason=DlqClass.UNDECODABLE, code="malformed", at_ms=NOW_MS, **fields)
    return CODEC.encode(Destination("dlq", letter))


def test_a_dead_letter_keeps_key_bytes_and_headers() -> None:
    """The original is untouched, and headers say what was wrong and where it stood."""
    headers = [("traceparent", b"00-1"), ("error_code", b"of an earlier time")]
    encoded = dead_letter(Record(a_source(5, partition=2), b"k", b"\xff\x00", headers))
    assert (encoded.key, encoded.value) == (b"k", b"\xff\x00")
    assert list(encoded.headers) == [("traceparent", b"00-1"), *OURS]


def test_a_dead_letter_by_reference_has_no_value() -> None:
    """What is too large or lethal is named by topic, partition and offset."""
    encoded = dead_letter(Record(a_source(5, partition=2), b"k", b"x", [("h", b"v")]), by_reference=True)
    assert (encoded.key, encoded.value, list(encoded.headers)) == (b"k", None, OURS)


@pytest.mark.parametrize("where", ["key", "value", "headers", "many headers"])
def test_a_dead_letter_always_fits_into_a_record(where: str) -> None:
    """A record too large for us becomes a reference, so that it can't stop the stream on its way out."""
    large = bytes(1_000_000)
    source = a_source(5, partition=2)
    record = {
        "key": Record(source, large, b"x"),
        "value": Record(source, b"k", large),
        "headers": Record(source, b"k", b"x", [("h", large)]),
        "many headers": Record(source, b"k", b"x", [("h", b"")] * 340_000),
    }[where]
    encoded = dead_letter(record)
    assert (encoded.value, list(encoded.headers)) == (None, OURS)
    assert len(encoded.key or b"") <= 1_000_000 - DLQ_SPARE_BYTES


def test_partitions_are_those_of_a_java_producer() -> None:
    """Hashes of Kafka's own test of its murmur2 lead to the partitions that its clients choose."""
    hashes = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    assert {key: partition_of(key, 1009) for key in hashes} == {
        key: (value & 0x7FFFFFFF) % 1009 for key, value in hashes.items()
    }


def test_nothing_that_is_printed_holds_a_text_or_a_vector() -> None:
    """Encoded messages and records show sizes alone."""
    canary = "the canary sings"
    request = a_request([canary], metadata={"m": canary}, correlation_id="c")
    record = a_record(request, key=b"k")
    encoded = CODEC.encode(Destination("dlq", DeadLetter(record=record, reason=DlqClass.LETHAL, code="c", at_ms=1)))
    received = read(ReceivedResult, value_of("results", a_result(request)))
    for shown in (record, encoded, decoded(record.value), received):
        assert canary not in repr(shown)
    assert "array" not in repr(received)
