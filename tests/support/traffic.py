"""Traffic for fault tests: requests that are hard to account for, and what the broker shows of the progress."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from processor.adapters.avro import encode_request
from processor.adapters.kafka import connection
from processor.adapters.murmur2 import partition_of
from processor.adapters.topics import topics
from processor.domain import Chunk, Record, Request
from processor.identity import encode_text
from processor.settings import Settings
from tests.support.audit import Books
from tests.support.brokers import ends_of


def hard_requests(count: int, *, chunks: int, seed: int = 1) -> list[Request]:
    """Two tenants under equal correlation ids, a shared agent owner, one constant correlation id, equal texts.

    A third of the texts is shared within a tenant and a tenth between the tenants; a tenth of the requests refuses
    the cache; one in fifty is sent twice.
    """
    dice = random.Random(seed)
    requests: list[Request] = []
    for i in range(count):
        tenant = ("acme", "globex")[i % 2]
        correlation = "constant" if dice.random() < 0.05 else f"corr-{i // 2}"
        texts = []
        for j in range(chunks):
            kind = dice.random()
            if kind < 0.33:
                texts.append(f"{tenant} keeps saying sentence number {dice.randrange(60)}")
            elif kind < 0.43:
                texts.append(f"everybody says sentence number {dice.randrange(20)}")
            else:
                texts.append(f"{tenant} {correlation} request {i} chunk {j} " + "word " * dice.randrange(1, 30))
        request = Request(
            tenant_id=tenant,
            correlation_id=correlation,
            action=dice.choice(["generate", "batch_process", "embedding.generate"]),
            collection="docs",
            document_id=f"doc-{i}",
            agent_owner_id="initech" if dice.random() < 0.2 else None,
            use_cache=dice.random() >= 0.1,
            source_service="tests",
            metadata={"n": str(i)},
            chunks=[Chunk(f"k{j}", text, {"j": str(j)}) for j, text in enumerate(texts)],
        )
        requests.append(request)
        if dice.random() < 0.02:
            requests.append(request)
    return requests


def small_requests(count: int, *, texts: int = 256, dimensions: int = 8) -> Iterable[Request]:
    """One chunk each, a document each, of few texts: a worker that has seen them all finds them in its cache."""
    for i in range(count):
        yield Request(
            tenant_id="acme",
            correlation_id=f"corr-{i}",
            action="generate",
            collection="docs",
            document_id=f"doc-{i}",
            dimensions=dimensions,
            source_service="tests",
            chunks=[Chunk("k0", f"sentence number {i % texts}")],
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """What was committed, and how long the results were right after it was read."""

    committed: Mapping[int, int]
    results_end: Mapping[int, int]


class Traffic:
    """Sends requests to a topic of the settings and watches group and results."""

    def __init__(self, settings: Settings, *, partitions: int, group: str) -> None:
        self.settings = settings
        self.partitions = partitions
        self.group = group
        self.sent = 0
        self.samples: list[Sample] = []
        self._requests = settings.topic(topics()["requests"].name)
        self._results = settings.topic(topics()["results"].name)

    async def __aenter__(self) -> Self:
        options = connection(self.settings)
        self._producer = AIOKafkaProducer(**options, acks="all")
        self._watcher = AIOKafkaConsumer(**options, group_id=None)
        self._admin = AIOKafkaAdminClient(**options)
        await self._producer.start()
        await self._watcher.start()
        await self._admin.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._producer.stop()
        await self._watcher.stop()
        await self._admin.close()

    async def send(self, requests: Sequence[Request]) -> None:
        for request in requests:
            key = encode_text(request.tenant_id) + encode_text(request.document_id)
            partition = partition_of(key, self.partitions)
            await self._producer.send(self._requests, encode_request(request), key=key, partition=partition)
        await self._producer.flush()
        self.sent += len(requests)

    async def flow(self, requests: Iterable[Request], *, per_s: float, burst: int = 500) -> None:
        """Send bursts of requests at this rate, spread over the partitions, in batches of our own filling."""
        clock, pending = asyncio.get_running_loop(), iter(requests)
        begun_at, sent = clock.time(), 0
        while records := [encode_request(request) for request in islice(pending, burst)]:
            deliveries = []
            for partition in range(self.partitions):
                batch = self._producer.create_batch()
                for record in records[partition :: self.partitions]:
                    while batch.append(key=None, value=record, timestamp=None) is None:
                        deliveries.append(await self._producer.send_batch(batch, self._requests, partition=partition))
                        batch = self._producer.create_batch()
                if batch.record_count():
                    deliveries.append(await self._producer.send_batch(batch, self._requests, partition=partition))
            await asyncio.gather(*deliveries)
            sent += len(records)
            self.sent += len(records)
            await asyncio.sleep(begun_at + sent / per_s - clock.time())

    async def results(self) -> int:
        """How many result records there are."""
        return sum((await self._ends(self._results)).values())

    async def committed(self) -> dict[int, int]:
        places = [TopicPartition(self._requests, partition) for partition in range(self.partitions)]
        found = await self._admin.list_consumer_group_offsets(self.group, partitions=places)
        return {place.partition: known.offset for place, known in found.items() if known.offset >= 0}

    async def sample(self) -> None:
        """Committed offsets first, then the results that must stand behind them."""
        committed = await self.committed()
        self.samples.append(Sample(committed, await self._ends(self._results)))

    async def all_committed(self) -> bool:
        return sum((await self.committed()).values()) >= self.sent

    async def _ends(self, topic: str) -> dict[int, int]:
        return await ends_of(self._watcher, topic, self.partitions)


def check_samples(samples: Sequence[Sample], books: Books) -> None:
    """Law 2: behind every committed offset, each chunk's outcome was in the results when it was committed."""
    first_copies: dict[str, dict[int, tuple[int, int]]] = {}
    for record, result in books.results:
        outcomes = first_copies.setdefault(result.source_version, {})
        place = (record.source.partition, record.source.offset)
        outcomes[result.chunk_index] = min(place, outcomes.get(result.chunk_index, place))
    by_partition: defaultdict[int, list[tuple[Record, Request]]] = defaultdict(list)
    for record, request in books.requests:
        by_partition[record.source.partition].append((record, request))
    for partition, requests in by_partition.items():
        pending = deque(sorted(requests, key=lambda pair: pair[0].source.offset))
        length: dict[int, int] = {}
        """How long each partition of the results must be for what was looked at so far."""
        for sample in sorted(samples, key=lambda sample: sample.committed.get(partition, 0)):
            while pending and pending[0][0].source.offset < sample.committed.get(partition, 0):
                record, request = pending.popleft()
                outcomes = first_copies.get(record.source.version, {})
                assert outcomes.keys() >= set(range(len(request.chunks))), f"committed past unfinished {record!r}"
                for results_partition, offset in outcomes.values():
                    length[results_partition] = max(length.get(results_partition, 0), offset + 1)
            for results_partition, at_least in length.items():
                assert sample.results_end[results_partition] >= at_least, f"committed too far in {partition}: {sample}"
