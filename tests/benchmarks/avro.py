"""Microseconds a record in the codec, and how much faster vectors go than through a list of floats.

CPU time of one thread, the best of several rounds. Left out: Kafka's record batches, and text beyond 500 bytes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
from fastavro import schemaless_reader, schemaless_writer

from processor.adapters.avro import Codec
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import ReceivedResult, Result, Usage
from processor.ports import Destination
from tests.support.builders import a_record, a_request, a_result, a_source, a_usage
from tests.support.codec import done, value_of

DIMENSIONS = (8, 384, 1536, 3072)
CHUNKS = 64
ROUNDS = 15
CALLS = 500

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Figures in microseconds; `speedup_*` are ratios to fastavro's own reading and writing of the same record."""
    codec = Codec()
    record, usage = a_record(a_request(["hello world " * 40])), a_usage()
    usage_value = value_of("usage", usage)
    figures: dict[str, Any] = {
        "decode_request_us": measure(lambda: done(codec.decode(record))),
        "encode_usage_us": measure(lambda: codec.encode(Destination("usage", usage))),
        "decode_usage_us": measure(lambda: done(codec.read(Usage, usage_value))),
        f"encode_result_of_{CHUNKS}_us": measure(encoder(codec, results_of_one_request())),
    }
    for dimensions in DIMENSIONS:
        say(f"d={dimensions}")
        results = [a_result(dimensions=dimensions, source=a_source(offset)) for offset in range(2)]
        value = value_of("results", results[0])
        encode_us = measure(encoder(codec, results))
        decode_us = measure(partial(received, codec, value))
        figures |= {
            f"encode_result_d{dimensions}_us": encode_us,
            f"decode_result_d{dimensions}_us": decode_us,
            f"speedup_encode_d{dimensions}": round(measure(plain_writer(results[0], value)) / encode_us, 1),
            f"speedup_decode_d{dimensions}": round(measure(partial(plain_read, value)) / decode_us, 1),
        }
    return figures


def results_of_one_request() -> list[Result]:
    request, source = a_request(["x"] * CHUNKS), a_source()
    return [replace(a_result(request, index), source=source) for index in range(CHUNKS)]


def encoder(codec: Codec, results: list[Result]) -> Callable[[], object]:
    """Encodes the results in turn: the codec remembers the last one."""
    turn = cycle([Destination("results", result) for result in results])
    return lambda: codec.encode(next(turn))


def received(codec: Codec, value: bytes) -> object:
    return done(codec.read(ReceivedResult, value))


def plain_writer(result: Result, value: bytes) -> Callable[[], object]:
    """The same record written from a list of floats, its other fields at hand."""
    schema, fields, vector = current("EmbeddingResult").parsed, plain_read(value), result.vector
    assert vector is not None

    def write() -> bytes:
        out = BytesIO()
        schemaless_writer(out, schema, fields | {"vector": vector.tolist()})
        return out.getvalue()

    return write


def plain_read(value: bytes) -> dict[str, Any]:
    stream = BytesIO(value)
    stream.seek(SINGLE_OBJECT_HEADER_BYTES)
    fields = schemaless_reader(stream, current("EmbeddingResult").parsed, None)
    assert isinstance(fields, dict)
    return fields | {"vector": np.array(fields["vector"], np.float32)}


def measure(work: Callable[[], object]) -> float:
    """Microseconds of one call: the least of several rounds, without the garbage collector."""
    gc.disable()
    try:
        return round(min(one_round(work) for _ in range(ROUNDS)) / CALLS * 1e6, 2)
    finally:
        gc.enable()


def one_round(work: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        work()
    return time.thread_time() - start
