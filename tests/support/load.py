"""Load for benchmarks of whole processes: topics full of ready requests, workers, baselines, rates, CPU and memory.

A rate is read from the end offsets of a topic, between a look that finds a twentieth of the records and the one that
finds all: starting, joining and warming up are left out.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from processor.adapters import topics
from processor.adapters.avro import encode_request
from processor.domain import Chunk, Request
from tests.support.brokers import Broker, Servers, create_topic, ends_of
from tests.support.provider_server import ProviderProcess
from tests.support.stack import ROOT, Child, Stack, until

TEXTS = 2_048
WORDS_A_TEXT = 105
FILL_BATCH_BYTES = 500_000
LOOK_EVERY_S = 0.02
LEAST_PER_S = 1_000
"""A rate below this is given up on, after two minutes of patience."""

KEPT_BYTES = {"retention.bytes": "67108864", "segment.bytes": "33554432"}
"""Of a partition of results, so that a benchmark does not fill the disk; nobody reads what is deleted."""

VOCABULARY = (
    "stream chunk window call text vector cache topic offset tenant provider token limit batch usage ledger receipt "
    "partition consumer producer latency throughput deadline budget retrieval document collection embedding dimension "
    "a an the of to in and is that for on with as by at from or be are this it which each other between before after"
)

RELAXED = {"EMBEDDING_PRODUCER_IDEMPOTENT": "false", "EMBEDDING_REQUIRE_LOG_APPEND_TIME": "false"}


def some_requests(count: int, dimensions: int) -> Iterator[bytes]:
    """Values of requests of one chunk, about 600 bytes each: one tenant, a document each, the same texts over and over.

    They are more than a window holds, so that equal texts seldom meet in one.
    """
    phrase = "the stream of chunks is cut into windows and every window into few and full calls"
    words = phrase.split(" ")
    texts = [f"{i}: " + " ".join(words[(i + j) % len(words)] for j in range(WORDS_A_TEXT)) for i in range(TEXTS)]
    for i in range(count):
        yield encode_request(
            Request(
                tenant_id="bench",
                correlation_id=f"r{i}",
                action="generate",
                collection="bench",
                document_id=f"d{i}",
                dimensions=dimensions,
                chunks=[Chunk("c0", texts[i % TEXTS])],
            )
        )


def some_texts(count: int, *, seed: int = 0) -> list[str]:
    """None like another, of 450 to 750 bytes, 600 in the mean."""
    dice, vocabulary = random.Random(seed), VOCABULARY.split()
    texts = []
    for i in range(count):
        words = " ".join(dice.choices(vocabulary, k=200))
        texts.append(f"{seed}-{i}: {words}"[: dice.randint(450, 750)])
    return texts


def ingestion(texts: Sequence[str], dimensions: int, *, tenant: str = "bench") -> Iterator[Request]:
    """Requests as an ingestion service sends them: a document each, of 50 to 200 chunks."""
    dice, taken = random.Random(1), 0
    while taken < len(texts):
        part = texts[taken : taken + dice.randint(50, 200)]
        yield Request(
            tenant_id=tenant,
            correlation_id=f"{tenant}-{taken}",
            action="generate",
            collection="bench",
            document_id=f"d{taken}",
            dimensions=dimensions,
            chunks=[Chunk(f"c{i}", text) for i, text in enumerate(part)],
        )
        taken += len(part)


async def fill(producer: AIOKafkaProducer, topic: str, values: Iterable[bytes], *, partitions: int) -> None:
    """Append the values to the partitions in turn, in batches of our own; returns once all are acknowledged."""
    builders = [producer.create_batch() for _ in range(partitions)]
    deliveries = []
    for i, value in enumerate(values):
        partition = i % partitions
        if builders[partition].append(key=None, value=value, timestamp=None) is None:
            builders[partition].close()
            deliveries.append(await producer.send_batch(builders[partition], topic, partition=partition))
            builders[partition] = producer.create_batch()
            builders[partition].append(key=None, value=value, timestamp=None)
    for partition, builder in enumerate(builders):
        if builder.record_count():
            builder.close()
            deliveries.append(await producer.send_batch(builder, topic, partition=partition))
    await asyncio.gather(*deliveries)


@dataclass(frozen=True, slots=True)
class Rate:
    """`cores` is how much of a core each watched process took meanwhile, by name; `idle` is what nobody took."""

    records_per_s: float
    cores: Mapping[str, float]

    def cpu_us(self, name: str) -> float:
        """CPU time of that process, microseconds a record."""
        return self.cores[name] / self.records_per_s * 1e6

    @property
    def others(self) -> float:
        """Cores that processes took which are not watched: with many of them the rate is not to be trusted."""
        return max(0.0, (os.cpu_count() or 1) - sum(self.cores.values()))


Say = Callable[[str], None]


@contextmanager
def surroundings(say: Say, *options: str) -> Iterator[tuple[Broker, ProviderProcess, Path]]:
    """What a benchmark needs about its workers: the best broker there is, a provider, a folder.

    `options` are the provider's; without any it answers at once.
    """
    with (
        closing(Servers()) as servers,
        tempfile.TemporaryDirectory() as folder,
        ProviderProcess(*options) as provider,
    ):
        broker = servers.broker()
        for line in servers.report:
            say(line)
        yield broker, provider, Path(folder)


class Course:
    """The topics of one measurement, and workers that read them; every worker group begins at the start.

    `results_config` overrides settings of the topic of results.
    """

    def __init__(
        self,
        broker: Broker,
        provider: ProviderProcess,
        folder: Path,
        *,
        dimensions: int,
        partitions: int,
        results_config: Mapping[str, str] = KEPT_BYTES,
    ) -> None:
        self.broker = broker
        self.folder = folder
        self.dimensions = dimensions
        self.partitions = partitions
        self._results_config = results_config
        self._prefix = f"bench-{dimensions}-{uuid.uuid4().hex[:8]}"
        self._environment = {
            "EMBEDDING_PROVIDER": "openai",
            "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
            "EMBEDDING_OPENAI_API_KEY": "tests",
            "EMBEDDING_LOG_LEVEL": "WARNING",
            "EMBEDDING_SINK_VIEW": "false",
            **({} if broker.is_apache_kafka else RELAXED),
        }
        self.settings = self.stack().settings()
        self.requests = self.settings.topic(topics.topics()["requests"].name)
        self.results = self.settings.topic(topics.topics()["results"].name)

    async def __aenter__(self) -> Self:
        await self.create("results", dict(topics.topics()["results"].config) | dict(self._results_config))
        await topics.create(self.settings, partitions=self.partitions, replication=1)
        servers = self.broker.bootstrap_servers
        self._watcher = AIOKafkaConsumer(bootstrap_servers=servers, group_id=None)
        self.producer = AIOKafkaProducer(bootstrap_servers=servers, max_batch_size=FILL_BATCH_BYTES)
        await self._watcher.start()
        await self.producer.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.producer.stop()
        await self._watcher.stop()

    async def create(self, name: str, configs: Mapping[str, str] = KEPT_BYTES) -> str:
        """Make a topic beside (or before) those of the project; its full name."""
        described = topics.topics().get(name)
        full = self.settings.topic(described.name if described else name)
        await create_topic(self.broker.bootstrap_servers, full, partitions=self.partitions, configs=configs)
        return full

    def stack(self, **environment: str) -> Stack:
        """For workers of a group of their own."""
        group = {"EMBEDDING_GROUP_ID": f"{self._prefix}-{uuid.uuid4().hex[:8]}"}
        servers = self.broker.bootstrap_servers
        return Stack(self.folder, self._prefix, servers, **(self._environment | group | environment))

    async def fill(self, count: int) -> None:
        """Put so many requests into the topic, none like another."""
        await fill(self.producer, self.requests, some_requests(count, self.dimensions), partitions=self.partitions)

    async def append(self, requests: Iterable[Request]) -> None:
        """Put these requests into the topic, over all partitions."""
        await fill(self.producer, self.requests, map(encode_request, requests), partitions=self.partitions)

    @contextmanager
    def baseline(
        self, kind: str, results: str, *options: str, requests: str = ""
    ) -> Iterator[tuple[int, Callable[[], None]]]:
        """A process of `tests.support.baselines` that reads the requests: its pid, and what raises once it is gone.

        `requests` names another topic than this course's own.
        """
        arguments = ["--bootstrap-servers", self.broker.bootstrap_servers, "--requests", requests or self.requests]
        arguments += ["--results", results, "--group", results, "--dimensions", str(self.dimensions), *options]
        if not self.broker.is_apache_kafka:
            arguments.append("--no-idempotent")
        log = self.folder / f"{kind}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.baselines", kind, *arguments], cwd=ROOT, stdout=out, stderr=out
            )

        def check() -> None:
            if process.poll() is not None:
                raise AssertionError(f"{kind} ended with {process.returncode}:\n{log.read_text()[-2000:]}")

        try:
            yield process.pid, check
        finally:
            process.kill()
            process.wait()

    async def end(self, topic: str) -> int:
        """Offsets given out so far, all partitions together."""
        return sum((await ends_of(self._watcher, topic, self.partitions)).values())

    async def rate(
        self, topic: str, before: int, records: int, pids: Mapping[str, int], check: Callable[[], None]
    ) -> Rate:
        """How fast `records` come into the topic beyond offset `before`; `check` raises when they won't come.

        The broker's process is watched too if it is ours.
        """
        if self.broker.pid is not None:
            pids = {**pids, "broker": self.broker.pid}
        within_s = 120 + records / LEAST_PER_S
        deadline = time.monotonic() + within_s
        first: tuple[float, int, dict[str, float]] | None = None
        while True:
            done, now = await self.end(topic) - before, time.monotonic()
            if first is None and done >= records / 20:
                first = now, done, _cpu(pids)
            if done >= records:
                assert first is not None
                assert first[1] < records / 2, "too few records to measure: raise BENCH_RECORDS"
                seconds, spent = now - first[0], _cpu(pids)
                cores = {name: (spent[name] - first[2][name]) / seconds for name in spent}
                return Rate((done - first[1]) / seconds, cores)
            check()
            assert now < deadline, f"not within {within_s:.0f} s: {records} results; there are {done}"
            await asyncio.sleep(LOOK_EVERY_S)


async def ready(workers: Iterable[Child]) -> None:
    """Until each of them has joined its group."""
    for worker in workers:
        await until(worker.ready, within_s=60, what=f"{worker.name} is ready", every_s=LOOK_EVERY_S)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu(pids: Mapping[str, int]) -> dict[str, float]:
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    idle_s = (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    return {name: cpu_s(pid) for name, pid in pids.items()} | {"idle": idle_s}


def resident_mb(pid: int, *, peak: bool = False) -> float:
    """Resident memory of a process now, or the most that it ever was."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {name} of process {pid}")


def share(cores: float) -> float:
    """Part of this machine."""
    return round(cores / (os.cpu_count() or 1), 2)
