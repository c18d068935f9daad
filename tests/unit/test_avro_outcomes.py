"""Results, usage events and totals as bytes: whatever their fields hold, they are those that fastavro writes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import BucketKey, UsageSums, UsageTotal
from processor.adapters import avro_outcomes
from processor.adapters.avro import encode_request
from processor.adapters.avro_outcomes import OutcomeWriter, encode_long, write_total
from processor.adapters.avro_requests import RequestReader
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import (
    Amounts,
    CacheLevel,
    ErrorCode,
    Fault,
    Operation,
    Part,
    ReplyTo,
    Request,
    Result,
    Source,
    Status,
    TokenSource,
    TokenType,
    Usage,
)
from tests.support.avro_data import LONG, TEXT, encode, result_fields, total_fields, usage_fields
from tests.support.builders import NOW_MS, a_request, a_result, a_source, a_usage, a_vector, some_chunks

WRITER = OutcomeWriter()
"""Shared by all tests of this file, as one is by all records of a worker: what it remembers must harm no other."""

PLAIN, PLAIN_USAGE = a_result(), a_usage()
READER = RequestReader()
RESULT, USAGE = current("EmbeddingResult").parsed, current("TokenUsage").parsed
TOTAL = current("UsageTotal").parsed

COUNT = st.sampled_from([0, 1, 3, 63, 64, 8_191, 8_192, 2**31, 2**63 - 1]) | st.integers(0, 2**62)
TIME = st.sampled_from([NOW_MS, NOW_MS + 1, 0]) | LONG
TEXTS = TEXT | st.builds(lambda text, times: text * times, TEXT, st.sampled_from([10, 1_000]))
OPTIONAL = st.none() | TEXTS
LABELS = st.dictionaries(TEXT, TEXTS, max_size=3)
SOURCE = st.builds(Source, TEXTS, st.integers(0, 99_999), COUNT, TIME)
REQUEST = st.builds(
    Request,
    tenant_id=st.sampled_from(["acme", "other"]) | TEXTS,
    correlation_id=TEXTS,
    action=st.sampled_from(["generate", "embedding.batch.process", "validate", "delete", "?"]),
    input_type=OPTIONAL,
    collection=OPTIONAL,
    document_id=OPTIONAL,
    task_id=OPTIONAL,
    task_total=st.none() | LONG,
    agent_id=OPTIONAL,
    agent_owner_id=OPTIONAL,
    conversation_id=OPTIONAL,
    reply_to=st.none() | st.builds(ReplyTo, TEXTS, COUNT, OPTIONAL),
    source_service=TEXTS,
    requested_at_ms=TIME,
    run_id=OPTIONAL,
    metadata=LABELS,
    first_chunk_index=COUNT,
    chunk_count=st.none() | COUNT,
    chunks=st.just(some_chunks(["x"])),
)
VECTOR = st.none() | st.builds(a_vector, st.integers(0, 70) | st.sampled_from([384, 1536, 2048]), st.integers(0, 3))
RESULTS = st.builds(
    Result,
    request=REQUEST,
    source=SOURCE,
    request_id=TEXTS,
    chunk_index=LONG,
    first_chunk_index=COUNT,
    length=COUNT,
    chunk_id=TEXTS,
    chunk_metadata=LABELS,
    status=st.sampled_from(Status),
    vector=VECTOR,
    vector_id=OPTIONAL,
    provider=TEXTS,
    model=TEXTS,
    vector_space=TEXTS,
    dimensions=COUNT,
    token_count=COUNT,
    token_source=st.sampled_from(TokenSource),
    cache=st.sampled_from(CacheLevel),
    cut_tokens=st.integers(0, 10_000),
    cost_nanos=st.none() | LONG,
    time_taken_ms=LONG,
    completed_at_ms=TIME,
    error=st.none() | st.builds(Fault, st.sampled_from(ErrorCode), TEXTS, TEXTS, st.booleans()),
)
AMOUNTS = st.builds(Amounts, COUNT, COUNT, COUNT, st.none() | LONG)
USAGES = st.builds(
    Usage,
    request=REQUEST,
    source=SOURCE,
    request_id=TEXTS,
    payer_id=TEXTS,
    operation=st.sampled_from(Operation),
    model=TEXTS,
    provider=TEXTS,
    vector_space=TEXTS,
    billed=AMOUNTS,
    saved=AMOUNTS,
    texts=COUNT,
    characters=COUNT,
    failed_texts=COUNT,
    cached_texts=COUNT,
    parts=st.lists(st.builds(Part, TEXTS, COUNT), max_size=3).map(tuple),
    token_source=st.sampled_from(TokenSource),
    token_type=st.sampled_from(TokenType),
    event_key=st.none() | TEXTS,
    price_nanos_per_million=st.none() | LONG,
    price_version=OPTIONAL,
    charged_at_ms=TIME,
    completed_at_ms=TIME,
    time_taken_ms=LONG,
)


SUMS = st.builds(UsageSums, *[COUNT.map(lambda count: count // 4) for _ in fields(UsageSums)])
TOTALS = st.builds(
    UsageTotal,
    key=st.builds(BucketKey, TEXTS, TEXTS, TEXTS, TEXTS),
    partitions=st.dictionaries(st.integers(0, 99_999), st.tuples(COUNT, SUMS), max_size=3),
    updated_at_ms=TIME,
)


def assert_as_fastavro_writes(result: Result) -> None:
    assert WRITER.result(b"head", result) == b"head" + encode(RESULT, result_fields(result))


@settings(max_examples=150, deadline=None)
@given(RESULTS)
def test_any_result_is_written_as_fastavro_writes_it(result: Result) -> None:
    """All statuses, errors, vectors and numbers; and a second time, when its parts are remembered."""
    assert_as_fastavro_writes(result)
    assert_as_fastavro_writes(replace(result))


@settings(max_examples=150, deadline=None)
@given(TOTALS)
def test_any_total_is_written_as_fastavro_writes_it(total: UsageTotal) -> None:
    """Of none, one and several partitions, which are sorted and summed."""
    assert write_total(b"head", total) == b"head" + encode(TOTAL, total_fields(total))


@settings(max_examples=150, deadline=None)
@given(USAGES)
def test_any_usage_event_is_written_as_fastavro_writes_it(usage: Usage) -> None:
    """All parts, nulls and doubles; and a second time, when its parts are remembered."""
    expected = b"head" + encode(USAGE, usage_fields(usage))
    assert WRITER.usage(b"head", usage) == expected
    assert WRITER.usage(b"head", usage) == expected


def sent(request: Request) -> Request:
    """As a worker reads it, which knows its sender."""
    found = READER.read(encode_request(request), SINGLE_OBJECT_HEADER_BYTES)
    assert found is not None
    return found


@settings(max_examples=100, deadline=None)
@given(REQUEST, REQUEST, st.sampled_from([field.name for field in fields(Request) if field.init]))
def test_requests_that_differ_in_one_field_are_not_mixed_up(one: Request, other: Request, field: str) -> None:
    """What is remembered of a sender depends on every field that is repeated from the request."""
    for request in map(sent, (one, replace(one, **{field: getattr(other, field)}), one)):
        assert_as_fastavro_writes(replace(PLAIN, request=request))
        usage = replace(PLAIN_USAGE, request=request)
        assert WRITER.usage(b"", usage) == encode(USAGE, usage_fields(usage))


@pytest.mark.parametrize(
    "number", [*(sign * 2**bits + more for bits in range(63) for sign in (1, -1) for more in (-1, 0)), 2**63 - 1]
)
def test_every_size_of_an_integer_is_written_as_fastavro_writes_it(number: int) -> None:
    """At each power of two, below and above zero."""
    assert encode_long(number) == encode("long", number)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_an_integer_over_64_bits_is_refused(number: int) -> None:
    """As fastavro refuses it."""
    with pytest.raises(OverflowError):
        encode_long(number)
    with pytest.raises(OverflowError):
        encode("long", number)


@pytest.mark.parametrize(
    "vector",
    [
        a_vector(8).astype(">f4"),
        a_vector(16)[::2],
        a_vector(8)[::-1],
        a_vector(8).astype(np.float64),
        a_vector(1)[::-1],
        np.frombuffer(b"x" + a_vector(8).tobytes(), np.float32, 8, 1),
    ],
    ids=["big endian", "strided", "reversed", "float64", "one", "unaligned and read-only"],
)
def test_an_array_of_any_layout_is_written_right(vector: Any) -> None:
    """Byte order, strides, alignment and precision in memory don't reach the wire."""
    result = replace(PLAIN, vector=vector)
    assert WRITER.result(b"", result) == encode(RESULT, result_fields(replace(PLAIN, vector=vector.astype(np.float32))))


def test_a_lone_surrogate_is_no_text() -> None:
    """It can't be written, wherever it stands."""
    for change in ({"chunk_id": "\ud800"}, {"model": "\ud800"}, {"request": a_request(tenant_id="\ud800")}):
        with pytest.raises(UnicodeEncodeError):
            WRITER.result(b"", replace(PLAIN, **change))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new senders, words and numbers push out the old ones, too long ones are not kept, and all are right."""
    monkeypatch.setattr(avro_outcomes, "MAX_SENDERS", 4)
    monkeypatch.setattr(avro_outcomes, "MAX_REMEMBERED", 300)
    for number in range(600):
        request = sent(a_request(tenant_id=f"t{number}", metadata={"k": "v"}))
        assert_as_fastavro_writes(replace(PLAIN, request=request, model=f"m{number}", token_count=number))
    assert_as_fastavro_writes(replace(PLAIN, model="x" * avro_outcomes.MAX_REMEMBERED_BYTES))
    assert 0 < len(WRITER._echo._senders) <= 4
    assert None not in WRITER._echo._senders
    for memory in (avro_outcomes.TEXTS, avro_outcomes.LONGS):
        assert len(memory) <= 300
        assert max(map(len, memory.values())) <= avro_outcomes.MAX_REMEMBERED_BYTES


def test_a_usage_event_says_its_request_id_twice() -> None:
    """Its idempotency key is the request id, whatever that is."""
    usage = a_usage(request_id="some id", source=a_source(7))
    assert WRITER.usage(b"", usage).startswith(b"\x0esome id\x0esome id")
