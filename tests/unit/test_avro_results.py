"""The fast reader of results: what it takes is what the general reader finds, and it takes what is ordinary."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters import avro_records
from processor.adapters.avro_results import read_result
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import ErrorCode, Fault, ReceivedResult, Status
from processor.ports import Undecodable
from tests.support.avro_data import encode, left_when_cut, left_when_damaged, values_of
from tests.support.builders import a_request, a_result
from tests.support.codec import value_of

SCHEMA = current("EmbeddingResult")
START = SINGLE_OBJECT_HEADER_BYTES
ANY = values_of(json.loads(SCHEMA.text)).map(lambda values: SCHEMA.single_object_header + encode(SCHEMA.parsed, values))


def generally(value: bytes) -> ReceivedResult | None:
    """What fastavro reads, or None."""
    try:
        read = avro_records._read_fields(value, START, SCHEMA)
        return None if isinstance(read, Undecodable) else avro_records._received(read)
    except Exception:  # noqa: BLE001 - bad bytes end in any
        return None


def plain(result: ReceivedResult | None) -> Any:
    """All of it as one value that can be compared, the vector bit by bit, but any NaN is like another."""
    if result is None:
        return None
    vector = result.vector
    values = {field.name: getattr(result, field.name) for field in fields(ReceivedResult)}
    return values | {
        "vector": None if vector is None else (vector.dtype, np.where(vector == vector, vector, np.nan).tobytes())
    }


def fast_or_left(value: bytes) -> ReceivedResult | None:
    """What the fast reader says, after the check that it left the record alone or agrees with fastavro."""
    found = read_result(value, START)
    assert found is None or plain(found) == plain(generally(value))
    return found


@settings(max_examples=150, deadline=None)
@given(ANY)
def test_any_result_is_read_as_fastavro_reads_it(value: bytes) -> None:
    """Whatever the fields hold, a record that an ordinary writer wrote is taken and equal."""
    assert fast_or_left(value) is not None


@settings(max_examples=150, deadline=None)
@given(ANY, st.data())
def test_damaged_results_are_equal_or_left(value: bytes, data: st.DataObject) -> None:
    """Flipped bits, cut ends, bytes put in or left over: never anything that fastavro does not read the same."""
    left_when_damaged(fast_or_left, value, START, data)


def test_every_bit_and_every_end_of_a_result() -> None:
    """The same, for each bit and each length of one result with labels, and of one with an error."""
    fault = Fault(ErrorCode.TEXT_TOO_LONG, "chunks.text", "too long", retryable=True)
    request = a_request(metadata={"language": "en"}, task_total=300)
    for result in (a_result(request), a_result(request, status=Status.ERROR, error=fault)):
        value = value_of("results", result)
        left_when_cut(fast_or_left, value, START)
