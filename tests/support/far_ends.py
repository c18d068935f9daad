"""The far ends of a worker, in memory and as bad as they may be: topics, group coordinator, shared cache, provider.

What happens is up to the dice of a schedule (`schedules.py`); what a worker process holds of ours is real.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from processor.accounts import BucketKey, UsageTotal
from processor.adapters.avro import Codec
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.tiered_cache import TieredCache
from processor.agents import Worker
from processor.domain import (
    CacheLevel,
    EmbeddingFunction,
    Entry,
    ModelSpec,
    Price,
    ReceivedResult,
    Record,
    Request,
    Result,
    Source,
    Usage,
)
from processor.embed import Deployment, Route
from processor.errors import (
    CacheUnavailable,
    CallTooLarge,
    DeliveryFailed,
    InputRejected,
    LeaseLost,
    ProviderError,
    ProviderThrottled,
    ProviderTransient,
)
from processor.limits import Gate, LimitPolicy
from processor.pipeline import Ports
from processor.ports import Destination, Found, Lease, ProviderAnswer, Run, Undecodable
from processor.watermark import Watermark
from processor.work import Policy
from tests.support.aggregation import MemoryLog
from tests.support.builders import NOW_MS, a_record
from tests.support.steps import MODEL, TinyCatalogue, VirtualClock, WordCounter, vector_of

TOPIC = "embedding-requests"
PARTITIONS = 2
POISON = "poison"
CACHE_TTL_S = 86_400.0
PRICES = (Price(1_234_567, 0, "old"), Price(2_500_000, NOW_MS + 500, "new"))
"""The price changes while the schedule runs."""

the_vector = lru_cache(maxsize=1024)(vector_of)


class PricedCatalogue(TinyCatalogue):
    def find(self, name: str) -> ModelSpec | None:
        return replace(MODEL, prices=PRICES) if name == MODEL.name else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazards:
    """What may go wrong. Crashes, redelivery, a provider that fails, bills for nothing or loses its answer: always."""

    zombies: bool = True
    cache_loss: bool = True
    deadlines: bool = True
    months: bool = True
    tenants_roam: bool = True
    """Texts of one tenant come through every partition, so that two workers can embed one key at once."""


class Luck:
    """The dice of a schedule, and what they have done. Once it is `over` nothing more goes wrong."""

    def __init__(self, seed: int, hazards: Hazards, clock: VirtualClock) -> None:
        self.dice = random.Random(seed)
        self.hazards = hazards
        self.clock = clock
        self.over = False
        self.happened: Counter[str] = Counter()

    async def pause(self, *, long: bool = False) -> None:
        """A moment: none, a few turns of the loop, or time."""
        chance = self.dice.random()
        if chance < 0.3 or (long and chance < 0.6):
            await self.clock.sleep(self.dice.choice([0.001, 0.03, 0.2]) * (5 if long else 1))
        elif chance < 0.7:
            for _ in range(self.dice.randint(1, 4)):
                await asyncio.sleep(0)

    def pieces(self, messages: Sequence[Destination]) -> Iterator[Sequence[Destination]]:
        start = 0
        while start < len(messages):
            size = self.dice.choice([1, 2, 100])
            yield messages[start : start + size]
            start += size

    def hazardous(self, chance: float) -> bool:
        return not self.over and self.dice.random() < chance

    def loses_cache(self, chance: float) -> bool:
        return self.hazards.cache_loss and self.hazardous(chance)

    def fate(self, texts: int) -> ProviderError | str:
        """What becomes of a call of so many texts."""
        chance = self.dice.random()
        if self.over or chance < 0.7:
            return "well"
        fates: list[ProviderError | str] = [
            *("invalid", "garbled", "unreached"),
            ProviderTransient("unavailable", http_status=500),
            ProviderThrottled("throttled", http_status=429, retry_after_s=1.0),
            ProviderTransient("no_answer"),
        ]
        if texts > 1:
            fates.append(CallTooLarge("too_large", http_status=413))
        fate = self.dice.choice(fates)
        self.happened[fate if isinstance(fate, str) else fate.code] += 1
        return fate


class Emission:
    """What a worker does with a usage event that it is about to send, and what totals are made of: the design's way."""

    def sends(self, worker: str, usage: Usage) -> bool:
        """Whether the worker sends it."""
        return True

    def acknowledged(self, usage: Usage) -> None:
        """The broker has it."""

    def key_of(self, usage: Usage) -> str:
        """What a consumer knows its copies by."""
        return usage.request_id

    def totals(self, published: Mapping[BucketKey, UsageTotal]) -> dict[BucketKey, UsageTotal]:
        """Given those of the aggregator."""
        return dict(published)


class RequestLog:
    """The request topic."""

    def __init__(self) -> None:
        self.partitions: list[list[tuple[Record, Request]]] = [[] for _ in range(PARTITIONS)]

    def append(self, request: Request, partition: int, append_ms: int) -> None:
        sent = self.partitions[partition]
        sent.append((a_record(request, Source(TOPIC, partition, len(sent), append_ms)), request))

    def after(self, partition: int, offset: int) -> list[Record]:
        return [record for record, _ in self.partitions[partition][offset:]]


class OutputLog(MemoryLog):
    """Every other topic; knows which outcomes of a source record it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Record] = []
        self.outcomes: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        self.charged: set[tuple[int, int]] = set()

    def take(self, message: Destination, now_ms: int) -> None:
        self.now_ms = now_ms
        what = message.message
        if message.name == "results" and isinstance(what, Result):
            self.outcomes[what.source[1:3]].add(what.chunk_index)
            key, value, _ = self.codec.encode(message)
            self.results.append(Record(Source("embedding-results", 0, len(self.results), now_ms), key, value))
        elif not isinstance(what, Result):
            if isinstance(what, Usage):
                self.charged.add(what.source[1:3])
            self.append(message)

    async def received(self) -> list[tuple[Record, ReceivedResult]]:
        found = []
        for record in self.results:
            result = await self.codec.read(ReceivedResult, record.value)
            assert not isinstance(result, Undecodable)
            found.append((record, result))
        return found


class Group:
    """The coordinator: who owns which partition, by generation, and what is committed."""

    def __init__(self, requests: RequestLog, output: OutputLog) -> None:
        self._requests, self._output = requests, output
        self.committed = [0] * PARTITIONS
        self.generations = [0] * PARTITIONS
        self.committed_early: list[tuple[int, int]] = []
        """Partitions and offsets that broke law 2."""

    @property
    def all_committed(self) -> bool:
        return self.committed == [len(sent) for sent in self._requests.partitions]

    def commit(self, partition: int, next_offset: int) -> None:
        """Law 2: behind a committed offset every outcome and the charge stand in the log."""
        for offset in range(self.committed[partition], next_offset):
            _, request = self._requests.partitions[partition][offset]
            place, first = (partition, offset), request.first_chunk_index
            missing = set(range(first, first + len(request.chunks))) - self._output.outcomes[place]
            if place not in self._output.charged or (missing and -1 not in self._output.outcomes[place]):
                self.committed_early.append(place)
        self.committed[partition] = max(next_offset, self.committed[partition])


class SharedCache:
    """Redis: the first entry stands until it expires, and it may be slow, lose a write, forget, or be away."""

    def __init__(self, luck: Luck) -> None:
        self._luck = luck
        self.entries: dict[bytes, tuple[Entry, float]] = {}

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        return None

    async def get_many(self, keys: Sequence[bytes], dimensions: int, *_: object) -> Mapping[bytes, Found]:
        await self._luck.pause()
        if self._luck.loses_cache(0.03):
            raise CacheUnavailable("away")
        now = self._luck.clock.monotonic()
        return {
            key: Found(kept[0], CacheLevel.L2)
            for key in keys
            if (kept := self.entries.get(key)) is not None and kept[1] > now
        }

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        await self._luck.pause()
        now = self._luck.clock.monotonic()
        for key, entry in entries.items():
            if self._luck.loses_cache(0.03):
                raise CacheUnavailable("away")
            kept = self.entries.get(key)
            if kept is None or kept[1] <= now:
                self.entries[key] = (entry, now + CACHE_TTL_S)
        await self._luck.pause()


class Account:
    """The provider's side: what it answers, and what it bills, which nobody but the checker may know."""

    def __init__(self, luck: Luck) -> None:
        self._luck = luck
        self.bills: list[dict[str, Any]] = []
        self.drifts = luck.dice.random() < 0.3

    def bill(self, attempt_id: str, texts: Sequence[str]) -> int:
        tokens = sum(len(text.split()) for text in texts)
        if self.drifts:
            tokens += self._luck.dice.randrange(4)
        self.bills.append({"attempt_id": attempt_id, "tokens": tokens, "billed": True})
        return tokens


@dataclass(frozen=True, slots=True)
class Ends:
    """Everything that the processes of a schedule share."""

    luck: Luck
    requests: RequestLog
    output: OutputLog
    group: Group
    cache: SharedCache
    account: Account
    emission: Emission


class GroupLease:
    """Owning a partition for one generation; a zombie does not know that it is over."""

    def __init__(self, group: Group, clock: VirtualClock, partition: int) -> None:
        self._group, self._clock = group, clock
        self.topic, self.partition = TOPIC, partition
        self.generation = group.generations[partition]
        self.position = group.committed[partition]
        self.watermark = Watermark(self.position)
        self.revoked = False
        self.late_until = 0.0

    def held(self) -> bool:
        return not self.revoked and self._clock.monotonic() >= self.late_until

    def finish(self, offset: int) -> None:
        if not self.revoked:
            self.watermark.finish(offset)

    def commit(self) -> None:
        """As the engine does now and then; the broker refuses it from a generation that is over."""
        if self.current and not self.revoked:
            self._group.commit(self.partition, self.watermark.first_unfinished)

    @property
    def current(self) -> bool:
        """Whether the coordinator thinks so too."""
        return self.generation == self._group.generations[self.partition]


class Provider:
    """One worker's connection to the account."""

    name = "fake"

    def __init__(self, process: Process) -> None:
        self._process = process

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        ends = self._process.ends
        await ends.luck.pause(long=True)
        if any(POISON in text for text in texts):
            raise InputRejected("refused", http_status=400)
        fate = ends.luck.fate(len(texts))
        if isinstance(fate, ProviderError) and fate.http_status is not None:
            raise fate
        billed: int | None = None
        if fate != "unreached":
            billed = ends.account.bill(attempt_id, texts)
            await ends.luck.pause(long=True)
        if isinstance(fate, ProviderError):
            raise fate
        if fate == "unreached":
            raise ProviderTransient("no_connection")
        vectors = [the_vector(text, function.dimensions) for text in texts]
        if fate in ("invalid", "garbled"):
            vectors = vectors[:-1] if len(vectors) > 1 else [np.full(function.dimensions, np.nan, np.float32)]
            return ProviderAnswer(vectors, range(len(vectors)), "tiny", None if fate == "garbled" else billed)
        order = list(range(len(texts)))
        ends.luck.dice.shuffle(order)
        self._process.unstored += 1
        return ProviderAnswer([vectors[i] for i in order], order, "tiny", billed)

    async def list_models(self) -> Sequence[str]:
        return ["tiny"]

    async def close(self) -> None:
        pass


class WorkerCache(TieredCache):
    """A worker's view of the cache; says when what was paid for has got there."""

    def __init__(self, process: Process) -> None:
        ends = process.ends
        clock = ends.luck.clock
        size = ends.luck.dice.choice([0, 2_000, 1_000_000])
        super().__init__(
            MemoryCache(max_bytes=size, ttl_s=CACHE_TTL_S, monotonic=clock.monotonic),
            ends.cache,
            monotonic=clock.monotonic,
        )
        self._process = process

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        await super().put_many(entries)
        if entries:
            self._process.unstored -= 1


class ProcessOutbox:
    """Hands messages to the log in order, in pieces, after a while; a crash cuts it anywhere."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._in_order = asyncio.Lock()
        self.sending = 0

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        if not messages:
            return
        process, ends = self._process, self._process.ends
        emitted = [message for message in messages if self._goes_out(message)]
        self.sending += 1
        try:
            async with self._in_order:
                await ends.luck.pause()
                for some in ends.luck.pieces(emitted):
                    if not all(lease.held() for lease in leases):
                        raise LeaseLost("a lease is gone")
                    self._hand_over(some)
                    await ends.luck.pause()
            if ends.luck.hazardous(0.003):
                raise DeliveryFailed("not acknowledged in time")
            if not process.dead:
                for message in emitted:
                    if isinstance(message.message, Usage):
                        ends.emission.acknowledged(message.message)
        finally:
            self.sending -= 1

    async def post(self, message: Destination) -> Awaitable[None]:
        return self._process.spawn(self.send([message]))

    def _goes_out(self, message: Destination) -> bool:
        usage = message.message
        return not isinstance(usage, Usage) or self._process.ends.emission.sends(self._process.name, usage)

    def _hand_over(self, messages: Sequence[Destination]) -> None:
        ends = self._process.ends
        if not self._process.dead:
            for message in messages:
                ends.output.take(message, ends.luck.clock.now_ms())


class Process:
    """One worker process: the real worker on these far ends, and the loop that feeds it."""

    def __init__(
        self, ends: Ends, name: str, incarnation: int, ended: Callable[[Process, BaseException], None]
    ) -> None:
        self.ends = ends
        self.name = name
        self.dead = False
        self.unstored = 0
        """Good answers that are not in the cache yet."""
        self.leases: dict[int, GroupLease] = {}
        self.more = asyncio.Event()
        """There may be more to read."""
        self._attempts = (f"{name}.{incarnation}-{n}" for n in itertools.count())
        self._tasks: set[asyncio.Task[None]] = set()
        self._feeding: GroupLease | None = None
        dice, clock = ends.luck.dice, ends.luck.clock
        policy = Policy(
            worker_id=name,
            retry_initial_s=1.0,
            retry_max_s=4.0,
            poison_attempts=50,  # else bad luck alone convicts a text
            window_max_texts=dice.choice([1, 3, 512]),
            window_max_wait_s=dice.choice([0.0, 0.05]),
        )
        limits = LimitPolicy(max_concurrent_calls=dice.choice([1, 16]), retry_initial_s=1.0, retry_max_s=4.0)
        provider = Provider(self)
        outbox = ProcessOutbox(self)
        route = Route(
            [Deployment(provider.name, provider, Gate(clock, limits, jitter=dice.uniform))],
            outbox,
            clock,
            policy,
            lambda: next(self._attempts),
            jitter=dice.uniform,
        )
        self.worker = Worker(
            Ports(
                decoder=Codec(),
                catalogue=PricedCatalogue(),
                cache=WorkerCache(self),
                counter=WordCounter(),
                outbox=outbox,
                clock=clock,
            ),
            policy,
            route,
            read_ahead_bytes=dice.choice([10_000, 1_000_000]),
            fail=lambda error: ended(self, error),
        )
        self.worker.start()
        self._feeder = self.spawn(self._feed())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _feed(self) -> None:
        """Fetch runs of its partitions, as long as there is one that it owns, or thinks so."""
        dice, log = self.ends.luck.dice, self.ends.requests
        while True:
            self.more.clear()
            waiting = {lease: log.after(lease.partition, lease.position) for lease in self.leases.values()}
            waiting = {lease: records for lease, records in waiting.items() if records}
            if not waiting:
                await self.more.wait()
                continue
            lease = self._feeding = dice.choice(list(waiting))
            run = waiting[lease][: dice.randint(1, 4)]
            lease.position += len(run)
            lease.watermark.hand_out(record.source.offset for record in run)
            await self.worker.on_run(Run(lease, run, behind=len(waiting[lease]) - len(run)))
            self._feeding = None
            await asyncio.sleep(0)

    async def let_go(self, partition: int, budget_s: float) -> None:
        """The partition is revoked and this process is told."""
        lease = self.leases.pop(partition)
        await self.worker.on_revoke([lease], budget_s)
        lease.commit()
        lease.revoked = True
        if self._feeding is lease:
            self._feeding = None
            self._feeder.cancel()
            self._feeder = self.spawn(self._feed())

    async def crash(self) -> None:
        """SIGKILL: what was not handed over never is."""
        self.dead = True
        for lease in self.leases.values():
            lease.revoked = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await self.worker.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
