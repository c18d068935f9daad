"""Microseconds a record by stage of the worker's path, on fakes: one chunk a request, every text in L1, no sink view.

CPU time of one thread, garbage collection included and tuned as the worker's: the median of several rounds of runs, no
request like another.
The bar is on the sum of all stages but the record batches, which are filled with results and usage as they come.
Left out: fetching, sockets, waiting, commits.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from processor.adapters.avro import Codec
from processor.adapters.catalogue import load_catalogue
from processor.adapters.clock import SystemClock
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.murmur2 import partitions_of
from processor.app import GC_FIRST_THRESHOLD
from processor.domain import Entry, Item, Record, TokenSource
from processor.embed import Deployment, Route
from processor.limits import Gate, LimitPolicy
from processor.pipeline import Pipeline, Ports
from processor.ports import Run
from processor.settings import load
from processor.work import Parcel, Policy, Window
from tests.support.builders import a_source, a_vector
from tests.support.load import TEXTS, some_requests
from tests.support.steps import BillingProvider, FakeLease, MemoryOutbox, WordCounter

PARTITIONS = 4
RUN_RECORDS = 500
RUNS = 8
ROUNDS = 5
BATCH_BYTES = 128 * 1024
BARS = {8: 12.0, 1536: 15.0}
"""Most microseconds by vector size."""

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Each stage, and `sum_us_d<n>` beside its bar `sum_us_d<n>_bar`, in microseconds a record."""
    figures: dict[str, Any] = {}
    for dimensions, bar_us in BARS.items():
        bench = StageBench(dimensions)
        await bench.round()  # fills L1, and what remembers
        thresholds = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_FIRST_THRESHOLD, *thresholds[1:])
        rounds = [await bench.round() for _ in range(ROUNDS)]
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        stages = {name: round(statistics.median(each[name] for each in rounds), 1) for name in rounds[0]}
        sum_us = round(sum(us for name, us in stages.items() if name != "batches_us"), 1)
        figures |= {f"{name}_d{dimensions}": us for name, us in stages.items()}
        figures |= {f"sum_us_d{dimensions}": sum_us, f"sum_us_d{dimensions}_bar": bar_us}
        say(f"stages d={dimensions}: {sum_us} us a record, batches {stages['batches_us']} us")
    return figures


class StageBench:
    """A pipeline on fakes with the real codec and L1, and the requests that it is fed."""

    def __init__(self, dimensions: int) -> None:
        self.codec, self.clock, self.outbox = Codec(), SystemClock(), MemoryOutbox()
        self.cache = MemoryCache(max_bytes=64 * 1024 * 1024, ttl_s=3600)
        self.vector = a_vector(dimensions)
        policy = Policy(sink_view=False)
        gate = Gate(self.clock, LimitPolicy(max_concurrent_calls=4))
        deployment = Deployment("fake", BillingProvider(), gate)
        route = Route([deployment], self.outbox, self.clock, policy, lambda: "attempt-1")
        ports = Ports(
            decoder=self.codec,
            catalogue=load_catalogue(load(openai_api_key="tests")),
            cache=self.cache,
            counter=WordCounter(),
            outbox=self.outbox,
            clock=self.clock,
        )
        self.finished = 0
        self.keys: list[bytes] = []
        self.pipeline = Pipeline(ports, policy, route, self._count)
        self.values = enumerate(some_requests(max(TEXTS, RUN_RECORDS * RUNS) * (ROUNDS + 1), dimensions))

    async def _remember(self) -> None:
        """What is not in L1 yet is put there now; it takes the way of a miss, once."""
        self.windows: list[Window] = []
        while (window := self.pipeline.batcher.take(self.clock.monotonic(), flush=True)) is not None:
            self.windows.append(window)
            entry = Entry(self.vector, 118, Item("first", 0), "attempt-0", TokenSource.PROVIDER)
            await self.cache.put_many({fold.key: entry for fold in window.folds})
            self.keys += [fold.key for fold in window.folds]

    def _count(self, tickets: Sequence[object]) -> None:
        self.finished += len(tickets)

    async def round(self) -> dict[str, float]:
        """Microseconds a record by stage over some runs of records."""
        spent: dict[str, float] = {}
        for _ in range(RUNS):
            records = [Record(a_source(i), None, value) for i, value in islice(self.values, RUN_RECORDS)]
            for name, seconds in (await self._run(records)).items():
                spent[name] = spent.get(name, 0.0) + seconds
        return {name: seconds / (RUN_RECORDS * RUNS) * 1e6 for name, seconds in spent.items()}

    async def _run(self, records: list[Record]) -> dict[str, float]:
        """Seconds by stage of one run. What can't be cut in two is measured whole, and its part alone is taken off."""
        pipeline, codec, outbox = self.pipeline, self.codec, self.outbox
        looks = [time.thread_time()]

        def lap_s() -> float:
            looks.append(time.thread_time())
            return looks[-1] - looks[-2]

        for record in records:
            codec.decode_now(record)
        decode_s = lap_s()
        for cache_key in self.keys[: len(records)]:
            self.cache.peek(cache_key, len(self.vector))
        look_up_s = lap_s()
        run, known = Run(FakeLease(), records), list[Parcel]()
        for record in records:
            decoded = pipeline.decode(record, run)
            assert decoded is not None
            pipeline.admit(record, decoded, run.lease, known)
        admit_s = lap_s()

        await self._remember()
        outbox.sent.clear()
        self.finished = 0
        lap_s()
        await pipeline.deliver(known)
        deliver_s = lap_s()
        for window in self.windows:
            await pipeline.look_up(window, _released)
        assert self.finished == len(records), "some records did not come through"
        results, usage = ([each for each in outbox.sent if each.name == name] for name in ("results", "usage"))
        assert len(results) == len(usage) == len(records)
        lap_s()
        encoded = [codec.encode(message) for message in results]
        result_s = lap_s()
        encoded += [codec.encode(message) for message in usage]
        usage_s = lap_s()
        builder = _builder()
        partitions_of([key or b"" for key, _, _ in encoded], PARTITIONS)
        for offset, (key, value, headers) in enumerate(encoded):
            if builder.append(offset, None, key, value, list(headers)) is None:
                builder.build()
                builder = _builder()
                builder.append(offset, None, key, value, list(headers))
        builder.build()
        return {
            "decode_us": decode_s,
            "check_key_group_us": admit_s - decode_s - look_up_s,
            "look_up_us": look_up_s,
            "write_acknowledge_us": deliver_s,
            "encode_result_us": result_s,
            "encode_usage_us": usage_s,
            "batches_us": lap_s(),
        }


def _released() -> None:
    """Nobody waits for the slot."""


def _builder() -> DefaultRecordBatchBuilder:
    return DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, BATCH_BYTES)
