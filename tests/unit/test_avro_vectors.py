"""Vectors on the wire: copied instead of converted, and yet byte for byte what any Avro library writes and reads."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from fastavro import schemaless_reader, schemaless_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters.schemas import current
from processor.domain import DlqClass, ReceivedResult, Status, Vector
from processor.ports import Undecodable
from tests.support.avro_data import LONG, TEXT, zigzag
from tests.support.builders import a_request, a_result, a_source, a_vector, some_chunks
from tests.support.codec import read, value_of

SCHEMA = current("EmbeddingResult").parsed
HEADER = current("EmbeddingResult").single_object_header
MAPS = st.dictionaries(TEXT, TEXT, max_size=3)


def encoded(result: Any) -> bytes:
    return value_of("results", result)


def plain_fields(value: bytes) -> dict[str, Any]:
    """As a reader sees them that knows nothing of ours."""
    stream = BytesIO(value[10:])
    fields = schemaless_reader(stream, SCHEMA, None)
    assert stream.read() == b""
    assert isinstance(fields, dict)
    return fields


def plain_bytes(fields: dict[str, Any]) -> bytes:
    out = BytesIO()
    schemaless_writer(out, SCHEMA, fields)
    return HEADER + out.getvalue()


def received(value: bytes) -> Any:
    return read(ReceivedResult, value)


def same_bits(one: Vector, other: Vector) -> bool:
    return one.dtype == other.dtype == np.float32 and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dimensions", [1, 8, 63, 64, 384, 1536, 3072])
def test_a_vector_is_written_as_fastavro_writes_a_list(dimensions: int) -> None:
    """The bytes equal those of the plain writer, given the same floats as a list."""
    vector = a_vector(dimensions)
    value = encoded(a_result(dimensions=dimensions, vector=vector))
    assert value == plain_bytes(plain_fields(value) | {"vector": vector.tolist()})
    assert plain_fields(value)["vector"] == vector.tolist()
    assert same_bits(received(value).vector, vector)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=80),
    st.builds(lambda text, number, labels: (text, number, labels), TEXT, LONG, MAPS),
)
def test_any_result_is_written_as_fastavro_writes_it(
    floats: list[float], rest: tuple[str, int, dict[str, str]]
) -> None:
    """Whatever surrounds the vector, our bytes and the plain writer's are the same."""
    text, number, labels = rest
    request = a_request(
        chunks=some_chunks(["x"], labels), correlation_id=text or "c", task_total=number, metadata=labels
    )
    result = a_result(request, vector=np.array(floats, np.float32), token_count=number, vector_id=None, model=text)
    value = encoded(result)
    assert value == plain_bytes(plain_fields(value) | {"vector": floats})
    result_read = received(value)
    assert (result_read.model, result_read.token_count, result_read.chunk_metadata) == (text, number, labels)
    assert (result_read.vector is None) == (not floats)


def test_every_bit_of_a_float_survives() -> None:
    """NaN payloads, infinities, the least subnormal and minus zero come back as they were."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x00000001, 0x80000000], np.uint32)
    vector = bits.view(np.float32)
    value = encoded(a_result(vector=vector))
    assert value.endswith(bits.astype("<u4").tobytes() + b"\x00")
    assert same_bits(received(value).vector, vector)


@pytest.mark.parametrize(
    "vector",
    [a_vector(8).astype(">f4"), a_vector(16)[::2], a_vector(8).astype(np.float64), a_vector(8)[::-1]],
    ids=["big endian", "strided", "float64", "reversed"],
)
def test_a_vector_of_any_layout_is_written_right(vector: Any) -> None:
    """Byte order, strides and precision of the array in memory don't reach the wire."""
    value = encoded(a_result(vector=vector))
    assert plain_fields(value)["vector"] == vector.astype(np.float32).tolist()


@pytest.mark.parametrize("vector", [None, np.array([], np.float32)], ids=["none", "empty"])
def test_no_vector_is_an_empty_array(vector: Vector | None) -> None:
    """A result without a vector ends in the one byte of an empty array."""
    value = encoded(a_result(vector=vector, status=Status.ERROR))
    assert value == plain_bytes(plain_fields(value) | {"vector": []})
    assert received(value).vector is None


def test_a_received_vector_is_the_readers_own() -> None:
    """It can be written to, and keeps no record alive."""
    vector = received(encoded(a_result())).vector
    assert (vector.flags.writeable, vector.flags.owndata, vector.flags.aligned) == (True, True, True)


def block(items: Vector, *, sized: bool) -> bytes:
    """One block of an Avro array; with `sized` the count is negative and the size in bytes follows."""
    raw = items.astype("<f4").tobytes()
    return zigzag(-len(items)) + zigzag(len(raw)) + raw if sized else zigzag(len(items)) + raw


@pytest.mark.parametrize("sized", [[True], [False, False], [True, False], [False, True, True]], ids=str)
def test_blocks_of_other_writers_are_read(sized: list[bool]) -> None:
    """Arrays in several blocks, and blocks that say their size, hold the same vector."""
    vector = a_vector(12)
    parts = np.array_split(vector, len(sized))
    head = encoded(a_result(vector=None))[:-1]
    array = b"".join(block(part, sized=each) for part, each in zip(parts, sized, strict=True)) + b"\x00"
    assert same_bits(received(head + array).vector, vector)


@pytest.mark.parametrize(
    "array,code",
    [
        (zigzag(3) + bytes(8), "malformed"),
        (zigzag(2) + bytes(8), "malformed"),
        (zigzag(2) + bytes(8) + b"\x01", "malformed"),
        (zigzag(2) + bytes(8) + b"\x00\x00", "trailing_bytes"),
        (zigzag(2**62) + bytes(8) + b"\x00", "malformed"),
        (zigzag(-(2**62)) + bytes(8) + b"\x00", "malformed"),
        (b"\x00\x00", "trailing_bytes"),
    ],
)
def test_a_damaged_vector_is_undecodable(array: bytes, code: str) -> None:
    """A count that does not fit its bytes, a missing end and trailing bytes are found."""
    head = encoded(a_result(vector=None))[:-1]
    assert received(head + array) == Undecodable(DlqClass.UNDECODABLE, code)


def test_source_versions_compare_as_they_were_appended() -> None:
    """The greater text is the later request of a partition, whatever the number of digits."""
    sources = [a_source(offset, append_ms=ms) for ms in (999, 1_000, 10**12) for offset in (9, 10, 10**18)]
    versions = [source.version for source in sources]
    assert versions == sorted(versions)
    assert len(set(map(len, versions))) == 1


def test_floats_lie_little_endian() -> None:
    """The items are raw IEEE 754 binary32, least byte first, as Avro has them."""
    value = encoded(a_result(vector=np.array([1.5, -2.0], np.float32)))
    assert value.endswith(b"\x04" + struct.pack("<2f", 1.5, -2.0) + b"\x00")
