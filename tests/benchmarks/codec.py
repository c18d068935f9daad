"""A result's vector at d=1536: our codec beside fastavro's own list of floats, for the whole record.

Ratios of CPU time of one thread, the best of several rounds, after the bytes and the floats were found identical. Each
result belongs to a request of its own, so that nothing is reused between them. Left out: the vector without its record.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from processor.adapters.avro import Codec
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES
from tests.benchmarks.avro import encoder, measure, plain_read, plain_writer, received
from tests.support.builders import a_request, a_result
from tests.support.codec import value_of

DIMENSIONS = 1536

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Microseconds of both ways and `encode_ratio`, `decode_ratio`."""
    codec = Codec()
    results = [a_result(a_request(correlation_id=f"r{i}"), dimensions=DIMENSIONS) for i in range(2)]
    value = value_of("results", results[0])
    plain_write = plain_writer(results[0], value)
    vector = results[0].vector
    assert vector is not None
    assert plain_write() == value[SINGLE_OBJECT_HEADER_BYTES:], "the bytes differ"
    assert plain_read(value)["vector"].tobytes() == vector.tobytes(), "the floats differ"
    say("bytes identical")
    ours_us = measure(encoder(codec, results)), measure(partial(received, codec, value))
    plain_us = measure(plain_write), measure(partial(plain_read, value))
    return {
        "encode_us": ours_us[0],
        "plain_encode_us": plain_us[0],
        "encode_ratio": round(plain_us[0] / ours_us[0], 1),
        "decode_us": ours_us[1],
        "plain_decode_us": plain_us[1],
        "decode_ratio": round(plain_us[1] / ours_us[1], 1),
    }
