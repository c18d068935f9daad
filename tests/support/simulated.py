"""A worker process of a random schedule: the real worker, and what ties it to the far ends (`far_ends.py`)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np

from processor.adapters.avro import Codec
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.tiered_cache import TieredCache
from processor.agents import Worker
from processor.domain import EmbeddingFunction, Entry, Usage
from processor.embed import Deployment, Route
from processor.errors import (
    DeliveryFailed,
    InputRejected,
    LeaseLost,
    ProviderError,
    ProviderTransient,
)
from processor.limits import Gate, LimitPolicy
from processor.pipeline import Ports
from processor.ports import Destination, Lease, ProviderAnswer, Run
from processor.watermark import Watermark
from processor.work import Policy
from tests.support.far_ends import CACHE_TTL_S, POISON, TOPIC, Ends, Group, PricedCatalogue, the_vector
from tests.support.steps import VirtualClock, WordCounter


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
            if ends.luck.hazards.crashes and ends.luck.hazardous(0.003):
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
        self._ended = ended
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
            cache_shared=ends.luck.hazards.shared_cache,
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
                budgets=ends.spent,
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
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ended(self, error)

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
        if self._feeding is lease and not self.dead:
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
