"""Chunks a second of one worker whose texts are all cached, beside a bare aiokafka loop and plain Faust.

Every process reads the same requests of about 600 bytes, one chunk each, from 4 partitions, one process after another
in interleaved rounds; ratios are medians of the rounds' ratios. The worker has all of its path on but the sink view
(one round is with it): validation, L1, results, usage, headers. Also: how long a request waits for its result at half
of that rate, by the broker's clock; memory over a long run; CPU of worker and broker; microseconds by stage.
Left out: L2, real provider calls, several workers. Environment: BENCH_RECORDS, BENCH_ROUNDS, BENCH_LONG (1: always the
long run, 0: never; else only if it takes less than three minutes).
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from processor.adapters.avro import Codec
from processor.domain import ReceivedResult
from tests.benchmarks import stages
from tests.support.brokers import Broker
from tests.support.load import Course, Rate, Say, fill, ready, resident_mb, share, some_requests, surroundings
from tests.support.provider_server import ProviderProcess

PARTITIONS = 4
RECORDS = int(os.environ.get("BENCH_RECORDS", "100000"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
FAUST_RECORDS = RECORDS // 5
LONG_RECORDS = 10 * RECORDS
LONG = os.environ.get("BENCH_LONG", "")
LONG_WITHIN_S = 180.0
FEED_EVERY_S = 0.01
FEED_FOR_S = 10.0
FEED_WARM_UP_S = 2.0
MEMORY_MB = 300
GROWTH = 1.10

BARS = {
    "ratio_aiokafka_d8": (1.4, 1.1),
    "ratio_aiokafka_d1536": (1.0, 0.75),
    "ratio_naive_faust_d1536": (4.0, 3.0),
}
"""Goal and floor."""


async def run(say: Say) -> dict[str, Any]:
    """Records a second, ratios, latency, memory, CPU, stages and `bars` with whether each is met."""
    with surroundings(say) as (broker, provider, folder):
        if not broker.is_apache_kafka:
            say("no Apache Kafka: the figures are of the embedded broker and stand beside no bar")
        figures: dict[str, Any] = {
            "broker": broker.kind,
            "records": RECORDS,
            "faust_records": FAUST_RECORDS,
            "rounds": ROUNDS,
        }
        bench = Bench(broker, provider, folder, say)
        for dimensions in (8, 1536):
            figures |= await bench.rounds(dimensions)
            figures |= await bench.latency(dimensions, figures[f"worker_d{dimensions}_records_per_s"] / 2)
        long_s = LONG_RECORDS / figures["worker_d1536_records_per_s"]
        if LONG == "1" or (LONG != "0" and long_s < LONG_WITHIN_S):
            figures |= await bench.memory(1536)
        else:
            say(f"no long run ({LONG_RECORDS} records, about {long_s:.0f} s): BENCH_LONG=1 has it")
    figures |= await stages.run(say)
    return figures | {"bars": bars(figures)}


class Bench:
    """The measurements, each with topics of its own."""

    def __init__(self, broker: Broker, provider: ProviderProcess, folder: Path, say: Say) -> None:
        self.broker = broker
        self.provider = provider
        self.folder = folder
        self.say = say

    def course(self, dimensions: int, **options: Any) -> Course:
        return Course(self.broker, self.provider, self.folder, dimensions=dimensions, partitions=PARTITIONS, **options)

    async def rounds(self, dimensions: int) -> dict[str, Any]:
        """Rates of worker and baselines, in turn, the order reversed every other round."""
        size = f"d{dimensions}"
        kinds = ["worker", "aiokafka", *(["faust"] if dimensions > 8 else [])]
        rates: dict[str, list[Rate]] = {kind: [] for kind in kinds}
        async with self.course(dimensions) as course:
            started = time.monotonic()
            await course.fill(RECORDS)
            self.say(f"{size}: {RECORDS} requests in {time.monotonic() - started:.1f} s")
            for round_ in range(ROUNDS):
                for kind in kinds if round_ % 2 == 0 else reversed(kinds):
                    rates[kind].append(await (worker_rate(course) if kind == "worker" else baseline_rate(course, kind)))
                line = ", ".join(
                    f"{kind} {rates[kind][-1].records_per_s:.0f}/s ({rates[kind][-1].cpu_us(kind):.0f} us CPU)"
                    for kind in kinds
                )
                self.say(f"{size} round {round_}: {line}")
            with_sink = await worker_rate(course, EMBEDDING_SINK_VIEW="true")
        figures: dict[str, Any] = {f"ratio_aiokafka_{size}": ratio(rates["worker"], rates["aiokafka"])}
        figures[f"cpu_ratio_aiokafka_{size}"] = round(
            statistics.median(
                theirs.cpu_us("aiokafka") / ours.cpu_us("worker")
                for ours, theirs in zip(rates["worker"], rates["aiokafka"], strict=True)
            ),
            2,
        )
        if "faust" in rates:
            figures[f"ratio_naive_faust_{size}"] = ratio(rates["worker"], rates["faust"])
        for kind in kinds:
            figures[f"{kind}_{size}_records_per_s"] = round(
                statistics.median(rate.records_per_s for rate in rates[kind])
            )
            figures[f"{kind}_{size}_cpu_us"] = round(statistics.median(rate.cpu_us(kind) for rate in rates[kind]), 1)
            figures[f"{kind}_{size}_cpu_share"] = shares(rates[kind], kind)
            figures[f"{kind}_{size}_others_cpu_share"] = share(statistics.median(rate.others for rate in rates[kind]))
            if self.broker.pid is not None:
                figures[f"{kind}_{size}_broker_cpu_share"] = shares(rates[kind], "broker")
        return figures | {f"worker_sink_view_{size}_records_per_s": round(with_sink.records_per_s)}

    async def latency(self, dimensions: int, records_per_s: float) -> dict[str, Any]:
        """From the append of a request to that of its result, both by the broker's clock, at a steady rate."""
        size = f"d{dimensions}"
        if not self.broker.is_apache_kafka:
            return {}
        async with self.course(dimensions, results_config={"message.timestamp.type": "LogAppendTime"}) as course:
            values = list(some_requests(int(records_per_s * FEED_FOR_S), dimensions))
            with course.stack() as stack:
                worker = stack.spawn("worker")
                await ready([worker])
                since_ms = await feed(course, values, records_per_s) + FEED_WARM_UP_S * 1000
                deadline = time.monotonic() + 60
                while await course.end(course.results) < len(values):
                    worker.check()
                    assert time.monotonic() < deadline, "not within 60 s: all results of the steady feed"
                    await asyncio.sleep(0.1)
                worker.stop()
            waits = [wait_ms async for at_ms, wait_ms in waits_of(course, len(values)) if at_ms >= since_ms]
        p50, p99 = (round(statistics.quantiles(waits, n=100)[percent - 1]) for percent in (50, 99))
        self.say(f"{size}: at {records_per_s:.0f}/s p50 {p50} ms, p99 {p99} ms, most {max(waits)} ms")
        return {
            f"latency_{size}_at_records_per_s": round(records_per_s),
            f"latency_{size}_p50_ms": p50,
            f"latency_{size}_p99_ms": p99,
        }

    async def memory(self, dimensions: int) -> dict[str, Any]:
        """Resident memory at start, after a tenth and at the end of a long run of requests that are all different."""
        async with self.course(dimensions) as course:
            await course.fill(LONG_RECORDS)
            with course.stack() as stack:
                worker = stack.spawn("worker")
                pid = worker.process.pid
                await ready([worker])
                figures: dict[str, Any] = {"rss_start_mb": round(resident_mb(pid))}
                for name, records in (("rss_steady_mb", LONG_RECORDS // 10), ("rss_after_1m_mb", LONG_RECORDS)):
                    rate = await course.rate(course.results, 0, records, {"worker": pid}, worker.check)
                    figures[name] = round(resident_mb(pid))
                figures["rss_peak_mb"] = round(resident_mb(pid, peak=True))
                worker.stop()
        figures |= {"long_records": LONG_RECORDS, "long_records_per_s": round(rate.records_per_s)}
        self.say(", ".join(f"{name} {value}" for name, value in figures.items()))
        return figures


async def worker_rate(course: Course, **environment: str) -> Rate:
    """Of one worker, started for it and ended after it."""
    with course.stack(**environment) as stack:
        before = await course.end(course.results)
        worker = stack.spawn("worker")
        rate = await course.rate(course.results, before, RECORDS, {"worker": worker.process.pid}, worker.check)
        worker.stop()
        return rate


async def baseline_rate(course: Course, kind: str) -> Rate:
    """Of one process of `tests.support.baselines`, with a topic of its own for the results."""
    results = await course.create(f"{kind}-{uuid.uuid4().hex[:8]}")
    with course.baseline(kind, results) as (pid, check):
        return await course.rate(results, 0, FAUST_RECORDS if kind == "faust" else RECORDS, {kind: pid}, check)


async def feed(course: Course, values: Sequence[bytes], records_per_s: float) -> float:
    """Append the values at a steady rate, in small batches; when it began, UTC milliseconds since 1970."""
    began, began_ms, sent = time.monotonic(), time.time() * 1000, 0
    while sent < len(values):
        due = min(len(values), int((time.monotonic() - began) * records_per_s) + 1)
        if due > sent:
            await fill(course.producer, course.requests, values[sent:due], partitions=PARTITIONS)
            sent = due
        await asyncio.sleep(FEED_EVERY_S)
    took_s = time.monotonic() - began
    assert took_s < FEED_FOR_S * 1.1, f"could not feed {records_per_s:.0f}/s: raise no bar on this run"
    return began_ms


async def waits_of(course: Course, count: int) -> AsyncIterator[tuple[int, int]]:
    """(append time of the request, milliseconds until that of its result) of each result."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=course.broker.bootstrap_servers, group_id=None, auto_offset_reset="earliest"
    )
    codec = Codec()
    await consumer.start()
    try:
        consumer.assign([TopicPartition(course.results, partition) for partition in range(PARTITIONS)])
        left = count
        while left > 0:
            for records in (await consumer.getmany(timeout_ms=10_000)).values():
                left -= len(records)
                for record in records:
                    result = await codec.read(ReceivedResult, record.value)
                    assert isinstance(result, ReceivedResult)
                    yield result.accepted_at_ms, record.timestamp - result.accepted_at_ms
    finally:
        await consumer.stop()


def ratio(ours: Iterable[Rate], theirs: Iterable[Rate]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return round(statistics.median(one.records_per_s / other.records_per_s for one, other in pairs), 2)


def shares(rates: Iterable[Rate], name: str) -> float:
    """Part of this machine's CPU that the process took, the median."""
    return share(statistics.median(rate.cores[name] for rate in rates))


def bars(figures: dict[str, Any]) -> dict[str, Any]:
    """Each bar with what was measured and whether it is met. Memory has one only after a long run."""
    judged: dict[str, Any] = {}
    for name, (goal, floor) in BARS.items():
        value = figures[name]
        met = "goal" if value >= goal else "floor" if value >= floor else "no"
        judged[name] = {"measured": value, "goal": goal, "floor": floor, "met": met}
    if "rss_after_1m_mb" in figures:
        steady, end = figures["rss_steady_mb"], figures["rss_after_1m_mb"]
        flat = end <= steady * GROWTH
        met = "yes" if flat and end <= MEMORY_MB else "no"
        judged["rss_after_1m_mb"] = {"measured": end, "most": MEMORY_MB, "flat": flat, "met": met}
    return judged
