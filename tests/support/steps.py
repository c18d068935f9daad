"""The steps on fakes: a virtual clock, an outbox in memory, a provider that bills. No network, no sleeps."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from processor.adapters.avro import Codec
from processor.agents import Worker
from processor.domain import (
    CacheLevel,
    CallKind,
    DeadLetter,
    DocumentManifest,
    EmbeddingFunction,
    Entry,
    ModelSpec,
    Price,
    ProviderCall,
    Record,
    Request,
    Result,
    TokenSource,
    Tombstone,
    Usage,
)
from processor.embed import Deployment, Route
from processor.errors import LeaseLost
from processor.limits import Gate, LimitPolicy
from processor.pipeline import Ports
from processor.ports import (
    NO_FORMER,
    Budgets,
    Destination,
    Found,
    Lease,
    ProviderAnswer,
    Run,
    TokenCounter,
    TokenCounts,
)
from processor.work import Policy
from tests.support.builders import NOW_MS, a_record, a_source

MODEL = ModelSpec(
    name="tiny",
    weights="tiny",
    dimensions=(4,),
    shortenable=True,
    max_input_tokens=10,
    max_inputs_per_call=8,
    max_tokens_per_call=40,
    tokenizer="words",
    answers_as=frozenset({"tiny"}),
    prices=(Price(1_000_000, 0, "tests-1"),),
)


class VirtualClock:
    """Time that moves only when a test lets it, or when everybody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._waiters: list[tuple[float, int, asyncio.Future[None]]] = []
        self._ids = itertools.count()

    def now_ms(self) -> int:
        return NOW_MS + int(self.now_s * 1000)

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waiter = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (self.now_s + seconds, next(self._ids), waiter))
        await waiter

    def wake_next(self) -> bool:
        """Move to the next sleeper's time; False when nobody sleeps."""
        while self._waiters:
            at, _, waiter = heapq.heappop(self._waiters)
            if not waiter.done():
                self.now_s = max(self.now_s, at)
                waiter.set_result(None)
                return True
        return False


class FakeLease:
    """A lease whose loss is up to the test."""

    def __init__(self, topic: str = "embedding-requests", partition: int = 0, generation: int = 1) -> None:
        self.topic, self.partition, self.generation = topic, partition, generation
        self.revoked = False
        self.late = False
        self.finished: list[int] = []

    def held(self) -> bool:
        return not (self.revoked or self.late)

    def finish(self, offset: int) -> None:
        if not self.revoked:
            self.finished.append(offset)


class MemoryOutbox:
    """Keeps what was sent, in order; `on_send` may raise or wait to stand for a broker in trouble."""

    def __init__(self) -> None:
        self.sent: list[Destination] = []
        self.sending = 0
        self.on_send: Callable[[Sequence[Destination]], Awaitable[None]] | None = None
        self.posts_acknowledged: asyncio.Event | None = None

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        if not messages:
            return
        if self.on_send is not None:
            self.sending += 1
            try:
                await self.on_send(messages)
            finally:
                self.sending -= 1
        if not all(lease.held() for lease in leases):
            raise LeaseLost("a lease is gone")
        self.sent += messages

    async def post(self, message: Destination) -> Awaitable[None]:
        self.sent.append(message)
        return asyncio.ensure_future(self._acknowledged())

    async def _acknowledged(self) -> None:
        if self.posts_acknowledged is not None:
            await self.posts_acknowledged.wait()

    def of(self, name: str) -> list[Any]:
        return [message.message for message in self.sent if message.name == name]

    @property
    def results(self) -> list[Result]:
        return self.of("results")

    @property
    def usage(self) -> list[Usage]:
        return self.of("usage")

    @property
    def calls(self) -> list[ProviderCall]:
        return self.of("calls")

    @property
    def letters(self) -> list[DeadLetter]:
        return self.of("dlq")

    @property
    def manifests(self) -> list[DocumentManifest]:
        return self.of("documents")

    @property
    def sink(self) -> list[Result | Tombstone]:
        return self.of("sink")

    def names(self) -> list[str]:
        return [message.name for message in self.sent]


class MemoryCache:
    """First entry stands; every hit is `l2`, as if the process had just started."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        return None

    async def get_many(
        self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
    ) -> Mapping[bytes, Found]:
        for key, old in former.items():
            if old in self.entries:
                self.entries.setdefault(key, self.entries[old])
        return {
            key: Found(entry, CacheLevel.L2)
            for key in keys
            if (entry := self.entries.get(key)) is not None and entry.vector.shape == (dimensions,)
        }

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None:
        for key, entry in entries.items():
            self.entries.setdefault(key, entry)


class WordCounter:
    """One token a word: exact for the tiny model."""

    def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
        return TokenCounts([len(text.split()) for text in texts], TokenSource.TOKENIZER)

    def truncate(self, text: str, model: ModelSpec, limit: int, *, keep_end: bool) -> str:
        words = text.split()
        return " ".join(words[-limit:] if keep_end and limit else words[:limit])


class TinyCatalogue:
    default_model = "tiny"

    def find(self, name: str) -> ModelSpec | None:
        return {"tiny": MODEL, "elsewhere": MODEL.__class__(name="elsewhere", weights="e", dimensions=(4,))}.get(name)

    def served(self, name: str) -> bool:
        return name == "tiny"

    def default_dimensions(self, model: ModelSpec) -> int:
        return model.dimensions[0]


def vector_of(text: str, dimensions: int = 4) -> np.ndarray[Any, np.dtype[np.float32]]:
    seed = int.from_bytes(text.encode()[:8].ljust(8, b"x"), "big") ^ len(text)
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)


class BillingProvider:
    """Embeds and bills a token a word; `script` holds what the next calls do instead (an exception or a function).

    `spoil` changes every answer that the script leaves alone.
    """

    name = "fake"

    def __init__(self) -> None:
        self.bills: dict[str, int] = {}
        self.asked: list[list[str]] = []
        self.script: list[Exception | Callable[[ProviderAnswer], ProviderAnswer]] = []
        self.refuses: Callable[[Sequence[str]], Exception | None] = lambda texts: None
        self.spoil: Callable[[ProviderAnswer], ProviderAnswer] | None = None
        self.gate: asyncio.Event | None = None

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        self.asked.append(list(texts))
        if self.gate is not None:
            await self.gate.wait()
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if (refusal := self.refuses(texts)) is not None:
            raise refusal
        billed = sum(len(text.split()) for text in texts)
        self.bills[attempt_id] = billed
        vectors = [vector_of(text, function.dimensions) for text in texts]
        answer = ProviderAnswer(vectors, range(len(texts)), "tiny", billed)
        change = step or self.spoil
        return change(answer) if change is not None else answer

    async def list_models(self) -> Sequence[str]:
        return ["tiny"]

    async def close(self) -> None:
        pass


class Bench:
    """A worker on fakes: publish requests, run until idle, look at what was sent."""

    def __init__(
        self,
        *,
        cache: MemoryCache | None = None,
        outbox: MemoryOutbox | None = None,
        spare: BillingProvider | None = None,
        max_concurrent_calls: int = 16,
        budgets: Budgets | None = None,
        counter: TokenCounter | None = None,
        **policy: Any,
    ) -> None:
        self.clock = VirtualClock()
        self.outbox = outbox or MemoryOutbox()
        self.cache = cache or MemoryCache()
        self.provider = BillingProvider()
        self.codec = Codec()
        self.lease = FakeLease()
        self.failures: list[BaseException] = []
        self._offsets: dict[FakeLease, itertools.count[int]] = defaultdict(itertools.count)
        defaults: dict[str, Any] = {"reply_partitions": {"embedding-replies": 4}, "retry_initial_s": 1.0}
        self.policy = Policy(**(defaults | policy))
        ids = itertools.count(1)
        limits = LimitPolicy(
            max_concurrent_calls=max_concurrent_calls,
            retry_initial_s=self.policy.retry_initial_s,
            retry_max_s=self.policy.retry_max_s,
        )

        def jitter(_low: float, high: float) -> float:
            return high

        self.gate = Gate(self.clock, limits, jitter=jitter)
        spares = [] if spare is None else [Deployment("spare", spare, Gate(self.clock, limits, jitter=jitter))]
        self.route = Route(
            [Deployment(self.provider.name, self.provider, self.gate), *spares],
            self.outbox,
            self.clock,
            self.policy,
            lambda: f"{self.worker_name}-{next(ids)}",
            jitter=jitter,
        )
        self.worker_name = "attempt"
        self.worker = Worker(
            Ports(
                decoder=self.codec,
                catalogue=TinyCatalogue(),
                cache=self.cache,
                counter=counter or WordCounter(),
                outbox=self.outbox,
                clock=self.clock,
                budgets=budgets,
            ),
            self.policy,
            self.route,
            read_ahead_bytes=1_000_000,
            fail=self.failures.append,
        )

    async def __aenter__(self) -> Bench:
        self.worker.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.worker.stop()
        assert not self.failures, self.failures

    def records(self, *requests: Request | bytes | None, lease: FakeLease | None = None) -> list[Record]:
        lease = lease or self.lease
        return [
            a_record(request, a_source(next(self._offsets[lease]), topic=lease.topic, partition=lease.partition))
            for request in requests
        ]

    async def publish(self, *requests: Request | bytes | None, lease: FakeLease | None = None, behind: int = 0) -> None:
        await self.worker.on_run(Run(lease or self.lease, self.records(*requests, lease=lease), behind=behind))

    async def settle(self) -> None:
        """Let every task run until all of them wait, without moving time."""
        for _ in range(200):
            await asyncio.sleep(0)

    async def step(self) -> None:
        """Let every task run until all wait, move time to the next sleeper, let them run again."""
        await self.settle()
        self.clock.wake_next()
        await self.settle()

    async def run_until_idle(self, limit_s: float = 3600.0) -> None:
        """Let tasks run and time pass until nobody has anything to do."""
        end = self.clock.now_s + limit_s
        await self.settle()
        while self.worker._tickets and self.clock.now_s < end:
            if not self.clock.wake_next():
                return
            await self.settle()

    async def handle(self, *requests: Request | bytes | None) -> MemoryOutbox:
        await self.publish(*requests)
        await self.run_until_idle()
        return self.outbox

    def attributed(self) -> Counter[str]:
        """Billed tokens by attempt over first copies of the usage events."""
        seen: set[str] = set()
        total: Counter[str] = Counter()
        for usage in self.outbox.usage:
            if usage.idempotency_key not in seen:
                seen.add(usage.idempotency_key)
                for part in usage.parts:
                    total[part.attempt_id] += part.tokens
        return total

    def intents(self) -> list[ProviderCall]:
        return [call for call in self.outbox.calls if call.kind is CallKind.INTENT]
