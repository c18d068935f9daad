"""The codec at d=1536 beside fastavro's own path through lists of floats, and the codec's part of a worker's record.

CPU time of one thread: medians of interleaved rounds, after the bytes and the floats were found identical. Every record
belongs to a request of its own, so that results don't share what they repeat of it. Left out: Kafka's record batches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from processor.adapters.avro import Codec
from processor.adapters.avro_results import read_vector
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import ReceivedResult, Request, Result
from processor.identity import request_id, vector_id
from processor.ports import Destination
from tests.support.avro_data import result_fields
from tests.support.builders import NOW_MS, SPACE, a_record, a_request, a_result, a_source, a_usage, a_vector

DIMENSIONS = 1536
RECORDS = 500
TEXT = "hello world " * 50
ROUNDS = 15
CALLS = 500

Say = Callable[[str], None]
Work = Callable[[], object]


async def run(say: Say) -> dict[str, Any]:
    """Microseconds, and how many times as long fastavro takes (`*_ratio`)."""
    codec = Codec()
    result = a_result(dimensions=DIMENSIONS)
    value = codec.encode(Destination("results", result)).value
    assert value is not None
    start = len(value) - len(_vector_bytes(result))
    assert plain_write(result_fields(result), result) == value[SINGLE_OBJECT_HEADER_BYTES:], "the bytes differ"
    assert plain_read(value)["vector"].tobytes() == plain_vector(value[start:]).tobytes() == _floats(result)
    vector = read_vector(value, start)
    assert vector.tobytes() == _floats(result), "the floats differ"
    say("bytes and floats identical")

    us = measure(
        {
            "encode": encoder(codec, some_results(DIMENSIONS)),
            "plain_encode": partial(plain_write, result_fields(result), result),
            "decode": partial(read_vector, value, start),
            "plain_decode": partial(plain_vector, value[start:]),
            "record_decode": partial(codec.read_now, ReceivedResult, value),
            "plain_record_decode": partial(plain_read, value),
            **stages(codec),
        }
    )
    return {
        "encode_ratio": round(us["plain_encode"] / us["encode"], 1),
        "decode_ratio": round(us["plain_decode"] / us["decode"], 1),
        "record_decode_ratio": round(us["plain_record_decode"] / us["record_decode"], 1),
        **{f"{name}_us": round(each, 2) for name, each in us.items()},
    }


def stages(codec: Codec) -> dict[str, Work]:
    """What the codec does for a record of one chunk of 600 bytes, at d=8."""
    results = some_results(8)
    records = cycle([a_record(result.request, result.source) for result in results])
    requests = cycle(some_requests())
    chunks = cycle([f"c{number}" for number in range(RECORDS)])
    usages = cycle([Destination("usage", a_usage(result.request, source=result.source)) for result in results])
    space = str(SPACE)
    return {
        "request_decode": lambda: codec.decode_now(next(records)),
        "request_id": lambda: request_id(next(requests)),
        "vector_id": lambda: vector_id("acme", "docs", "doc-1", next(chunks), space),
        "result_encode_d8": encoder(codec, results),
        "usage_encode": lambda: codec.encode(next(usages)),
    }


def some_requests() -> list[Request]:
    """As a worker reads them, made at a rate of ten a millisecond."""
    requests = [
        a_request([TEXT], correlation_id=f"corr-{number}", requested_at_ms=NOW_MS + number // 10)
        for number in range(RECORDS)
    ]
    codec = Codec()
    decoded = [codec.decode_now(a_record(request)) for request in requests]
    return [request for request in decoded if isinstance(request, Request)]


def some_results(dimensions: int) -> list[Result]:
    """Each of a request of its own."""
    vector = a_vector(dimensions)
    return [
        a_result(
            request,
            source=a_source(100_000 + number, append_ms=NOW_MS + number // 50),
            dimensions=dimensions,
            vector=vector,
        )
        for number, request in enumerate(some_requests())
    ]


def encoder(codec: Codec, results: list[Result]) -> Work:
    """Encodes the results in turn: the codec remembers the last one."""
    turn = cycle([Destination("results", result) for result in results])
    return lambda: codec.encode(next(turn))


def plain_write(fields: dict[str, Any], result: Result) -> bytes:
    """The result's record from a list of floats, its other fields at hand."""
    assert result.vector is not None
    out = BytesIO()
    schemaless_writer(out, current("EmbeddingResult").parsed, fields | {"vector": result.vector.tolist()})
    return out.getvalue()


def plain_read(value: bytes) -> dict[str, Any]:
    """All fields of the record, the vector as an array."""
    stream = BytesIO(value)
    stream.seek(SINGLE_OBJECT_HEADER_BYTES)
    fields = schemaless_reader(stream, current("EmbeddingResult").parsed, None)
    assert isinstance(fields, dict)
    return fields | {"vector": np.array(fields["vector"], np.float32)}


_FLOATS = parse_schema({"type": "array", "items": "float"})


def plain_vector(body: bytes) -> Any:
    return np.array(schemaless_reader(BytesIO(body), _FLOATS, None), np.float32)


def _vector_bytes(result: Result) -> bytes:
    out = BytesIO()
    assert result.vector is not None
    schemaless_writer(out, _FLOATS, result.vector.tolist())
    return out.getvalue()


def _floats(result: Result) -> bytes:
    assert result.vector is not None
    return result.vector.tobytes()


def measure(works: dict[str, Work]) -> dict[str, float]:
    """Microseconds of one call of each: medians of rounds that take turns, without the garbage collector."""
    took: dict[str, list[float]] = {name: [] for name in works}
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, work in works.items():
                began = time.thread_time()
                for _ in range(CALLS):
                    work()
                took[name].append((time.thread_time() - began) / CALLS * 1e6)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in took.items()}
