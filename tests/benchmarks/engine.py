"""Chunks a second of one worker whose texts are all cached, beside a bare aiokafka loop and plain Faust.

Every process reads the same requests of about 600 bytes, one chunk each, from 4 partitions, and is measured by the end
offsets of its results from the first look that finds any to the one that finds all: starting is left out, and so is
what was read ahead before the first result. Ratios are medians over interleaved rounds. Left out: L2, several workers,
latency at half load, the long run.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from processor.adapters import topics
from processor.adapters.avro import encode_request
from processor.domain import Chunk, Request
from processor.settings import Settings
from tests.support.brokers import Broker, Servers, create_topic
from tests.support.provider_server import ProviderProcess
from tests.support.stack import ROOT, Stack, until

PARTITIONS = 4
TEXTS = 256
RECORDS = int(os.environ.get("BENCH_RECORDS", "10000"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
WITHIN_S = 120.0
RELAXED = {"EMBEDDING_PRODUCER_IDEMPOTENT": "false", "EMBEDDING_REQUIRE_LOG_APPEND_TIME": "false"}

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Records a second, ratios, memory; BENCH_RECORDS and BENCH_ROUNDS are read from the environment."""
    servers = Servers()
    try:
        broker = servers.broker()
        for line in servers.report:
            say(line)
        if not broker.is_apache_kafka:
            say("no Apache Kafka: the figures are of the embedded broker and stand beside no bar")
        with (
            tempfile.TemporaryDirectory() as folder,
            ProviderProcess("--base-ms", "0", "--per-text-ms", "0") as provider,
        ):
            figures: dict[str, Any] = {"broker": broker.kind, "records": RECORDS, "rounds": ROUNDS}
            for dimensions in (8, 1536):
                bench = Bench(broker, provider, Path(folder), dimensions, say)
                figures |= await bench.measure()
            return figures
    finally:
        servers.close()


class Bench:
    """The rounds of one vector size, over one topic of requests."""

    def __init__(self, broker: Broker, provider: ProviderProcess, folder: Path, dimensions: int, say: Say) -> None:
        self.broker = broker
        self.folder = folder
        self.dimensions = dimensions
        self.say = say
        self.environment = {
            "EMBEDDING_PROVIDER": "openai",
            "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
            "EMBEDDING_OPENAI_API_KEY": "tests",
            "EMBEDDING_LOG_LEVEL": "WARNING",
            **({} if broker.is_apache_kafka else RELAXED),
        }
        self.prefix = f"engine-{dimensions}-{uuid.uuid4().hex[:8]}"
        self.rss_mb: list[tuple[float, float]] = []

    async def measure(self) -> dict[str, Any]:
        size = f"d{self.dimensions}"
        with self._stack("setup") as stack:
            settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        for kind in ("aiokafka", "faust"):
            await create_topic(self.broker.bootstrap_servers, self._own_results(kind), partitions=PARTITIONS)
        await self._fill(settings)
        kinds = ["worker", "aiokafka", *(["faust"] if self.dimensions > 8 else [])]
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for round_ in range(ROUNDS):
            for kind in kinds:
                rates[kind].append(await self._rate(kind, round_, settings))
            self.say(f"{size} round {round_}: " + ", ".join(f"{kind} {rates[kind][-1]:.0f}/s" for kind in kinds))
        with_sink = await self._rate("worker", ROUNDS, settings, EMBEDDING_SINK_VIEW="true")
        figures: dict[str, Any] = {
            f"ratio_aiokafka_{size}": _ratio(rates["worker"], rates["aiokafka"]),
            **{f"{kind}_{size}_records_per_s": round(statistics.median(rates[kind])) for kind in kinds},
            f"worker_sink_view_{size}_records_per_s": round(with_sink),
            f"rss_start_mb_{size}": round(statistics.median(start for start, _ in self.rss_mb)),
            f"rss_end_mb_{size}": round(statistics.median(end for _, end in self.rss_mb)),
        }
        if "faust" in rates:
            figures[f"ratio_naive_faust_{size}"] = _ratio(rates["worker"], rates["faust"])
        return figures

    def _stack(self, name: str, **more: str) -> Stack:
        environment = {"EMBEDDING_GROUP_ID": f"{self.prefix}-{name}", "EMBEDDING_SINK_VIEW": "false"}
        servers = self.broker.bootstrap_servers
        return Stack(self.folder, self.prefix, servers, **(self.environment | environment | more))

    def _own_results(self, kind: str) -> str:
        return f"{self.prefix}.{kind}-results"

    async def _fill(self, settings: Settings) -> None:
        """One tenant, a document each, the same texts over and over."""
        phrase = "the stream of chunks is cut into windows and every window into few and full calls"
        words = phrase.split(" ")
        texts = [f"{i}: " + " ".join(words[(i + j) % len(words)] for j in range(90)) for i in range(TEXTS)]
        producer = AIOKafkaProducer(bootstrap_servers=self.broker.bootstrap_servers, linger_ms=20)
        await producer.start()
        try:
            for i in range(RECORDS):
                request = Request(
                    tenant_id="bench",
                    correlation_id=f"r{i}",
                    action="generate",
                    collection="bench",
                    document_id=f"d{i}",
                    dimensions=self.dimensions,
                    chunks=[Chunk("c0", texts[i % TEXTS])],
                )
                topic = settings.topic(topics.topics()["requests"].name)
                await producer.send(topic, encode_request(request), partition=i % PARTITIONS)
            await producer.flush()
        finally:
            await producer.stop()

    async def _rate(self, kind: str, round_: int, settings: Settings, **more: str) -> float:
        """Records a second of one process, started for it and ended after it."""
        watcher = AIOKafkaConsumer(bootstrap_servers=self.broker.bootstrap_servers, group_id=None)
        await watcher.start()
        try:
            if kind != "worker":
                return await self._rate_of_baseline(kind, round_, settings, watcher)
            with self._stack(f"{round_}", **more) as stack:
                results = settings.topic(topics.topics()["results"].name)
                before = await _end(watcher, results)
                worker = stack.spawn("worker")
                await until(worker.ready, within_s=60, what="the worker is ready", every_s=0.02)
                start_mb = _resident_mb(worker.process.pid)
                rate = await _slope(watcher, results, before, worker.check)
                self.rss_mb.append((start_mb, _resident_mb(worker.process.pid)))
                worker.stop()
                return rate
        finally:
            await watcher.stop()

    async def _rate_of_baseline(self, kind: str, round_: int, settings: Settings, watcher: AIOKafkaConsumer) -> float:
        results = self._own_results(kind)
        before = await _end(watcher, results)
        options = {
            "bootstrap-servers": self.broker.bootstrap_servers,
            "requests": settings.topic(topics.topics()["requests"].name),
            "results": results,
            "group": f"{self.prefix}-{kind}-{round_}",
            "dimensions": str(self.dimensions),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        if not self.broker.is_apache_kafka:
            arguments.append("--no-idempotent")
        log = self.folder / f"{kind}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(  # noqa: ASYNC220  (nothing else runs here meanwhile)
                [sys.executable, "-m", "tests.support.baselines", kind, *arguments], cwd=ROOT, stdout=out, stderr=out
            )

        def check() -> None:
            if process.poll() is not None:
                raise AssertionError(f"{kind} ended with {process.returncode}:\n{log.read_text()[-2000:]}")

        try:
            return await _slope(watcher, results, before, check)
        finally:
            process.kill()
            process.wait()


async def _slope(watcher: AIOKafkaConsumer, topic: str, before: int, check: Callable[[], None]) -> float:
    """Results a second, from the first look that finds any to the one that finds all."""
    deadline = time.monotonic() + WITHIN_S
    first: tuple[float, int] | None = None
    while True:
        done, now = await _end(watcher, topic) - before, time.monotonic()
        if first is None and done > 0:
            first = (now, done)
        if done >= RECORDS:
            assert first is not None
            assert first[1] < RECORDS, "too few records to measure: raise BENCH_RECORDS"
            return (done - first[1]) / (now - first[0])
        check()
        assert now < deadline, f"not within {WITHIN_S:.0f} s: {RECORDS} results; there are {done}"
        await asyncio.sleep(0.03)


async def _end(watcher: AIOKafkaConsumer, topic: str) -> int:
    ends = await watcher.end_offsets([TopicPartition(topic, partition) for partition in range(PARTITIONS)])
    return sum(ends.values())


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(ours, theirs, strict=True)), 2)


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")
