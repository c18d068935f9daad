"""Microseconds a record by stage of the worker's path, on fakes: one chunk a request, every text in L1, no sink view.

CPU time of one thread over a few thousand requests. Batching fills aiokafka's record batches with
result and usage. Left out: fetching, sockets, acknowledgements, commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from processor.adapters.avro import Codec, partition_of
from processor.adapters.catalogue import load_catalogue
from processor.adapters.clock import SystemClock
from processor.adapters.memory_cache import MemoryCache
from processor.domain import Entry, Item, TokenSource
from processor.embed import Route
from processor.pipeline import Pipeline, Ports
from processor.ports import Run
from processor.settings import load
from processor.work import Policy, Window
from tests.support.builders import a_record, a_request, a_source, a_vector
from tests.support.codec import done
from tests.support.steps import BillingProvider, FakeLease, MemoryOutbox, WordCounter

RECORDS = 4_000
TEXTS = 256
BATCH_BYTES = 16_384

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Each stage in microseconds a record, for small vectors and for d=1536."""
    figures: dict[str, Any] = {}
    for dimensions in (8, 1536):
        say(f"d={dimensions}")
        figures |= await stages(dimensions)
    return figures


async def stages(dimensions: int) -> dict[str, float]:
    """The stages of one vector size."""
    codec, clock, outbox = Codec(), SystemClock(), MemoryOutbox()
    cache = MemoryCache(max_bytes=64 * 1024 * 1024, ttl_s=3600)
    policy = Policy(sink_view=False)
    route = Route(BillingProvider(), outbox, clock, policy, lambda: "attempt-1")
    ports = Ports(
        decoder=codec,
        catalogue=load_catalogue(load(openai_api_key="tests")),
        cache=cache,
        counter=WordCounter(),
        outbox=outbox,
        clock=clock,
    )
    finished: list[object] = []
    pipeline = Pipeline(ports, policy, route, finished.append)
    records = [
        a_record(
            a_request(
                [f"{i % TEXTS} " + "word " * 118], correlation_id=f"r{i}", document_id=f"d{i}", dimensions=dimensions
            ),
            a_source(i),
        )
        for i in range(RECORDS)
    ]
    timer = Timer()
    for record in records:
        done(codec.decode(record))
    decode_us = timer.lap_us()
    lease = FakeLease()
    for record in records:
        await pipeline.admit(record, Run(lease, [record]), lambda _: None, [])
    admit_us = timer.lap_us()

    windows: list[Window] = []
    while (window := pipeline.batcher.take(clock.monotonic(), flush=True)) is not None:
        windows.append(window)
    vector = a_vector(dimensions)
    for window in windows:
        for fold in window.folds:
            entry = Entry(vector, 118, Item("first", 0), "attempt-0", TokenSource.PROVIDER)
            await cache.put_many({fold.key: entry})
    timer.lap_us()
    for window in windows:
        await pipeline.process(window, lambda: None)
    process_us = timer.lap_us()
    assert len(finished) == RECORDS
    assert len(outbox.results) == len(outbox.usage) == RECORDS

    timer.lap_us()
    encoded = [codec.encode(message) for message in outbox.sent]
    encode_us = timer.lap_us()
    builder = _builder()
    for offset, (key, value, headers) in enumerate(encoded):
        partition_of(key or b"", 4)
        if builder.append(offset, None, key, value, list(headers)) is None:
            builder.build()
            builder = _builder()
            builder.append(offset, None, key, value, list(headers))
    produce_us = timer.lap_us()
    return {
        f"decode_us_d{dimensions}": decode_us,
        f"validate_key_queue_us_d{dimensions}": round(admit_us - decode_us, 1),
        f"look_up_settle_us_d{dimensions}": process_us,
        f"encode_result_usage_us_d{dimensions}": encode_us,
        f"batch_result_usage_us_d{dimensions}": produce_us,
        f"sum_us_d{dimensions}": round(admit_us + process_us + encode_us + produce_us, 1),
    }


class Timer:
    """CPU time of this thread between looks, a record."""

    def __init__(self) -> None:
        self._at = time.thread_time()

    def lap_us(self) -> float:
        before, self._at = self._at, time.thread_time()
        lap_us = round((self._at - before) / RECORDS * 1e6, 1)
        self._at = time.thread_time()
        return lap_us


def _builder() -> DefaultRecordBatchBuilder:
    return DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, BATCH_BYTES)
