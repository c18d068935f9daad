"""The far ends of a worker, in memory and as bad as they may be: topics, group coordinator, shared cache, provider.

What happens is up to the dice of a schedule (`schedules.py`); what a worker process holds of ours is real.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from processor.accounts import BucketKey, Budget, BudgetKey, BudgetState, UsageTotal
from processor.domain import (
    CacheLevel,
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
from processor.errors import (
    CacheUnavailable,
    CallTooLarge,
    ProviderError,
    ProviderThrottled,
    ProviderTransient,
)
from processor.ports import Destination, Found, Undecodable
from tests.support.aggregation import MemoryLog
from tests.support.builders import NOW_MS, a_record
from tests.support.steps import MODEL, TinyCatalogue, VirtualClock, vector_of

TOPIC = "embedding-requests"
PARTITIONS = 2
POISON = "poison"
CACHE_TTL_S = 86_400.0
BUDGETED = "initech"
"""Who has a budget."""
LEFT_TOKENS = 12
"""Of its month: few enough that texts in work can use them up."""
PRICES = (Price(1_234_567, 0, "old"), Price(2_500_000, NOW_MS + 500, "new"))
"""The price changes while the schedule runs."""

the_vector = lru_cache(maxsize=1024)(vector_of)


class PricedCatalogue(TinyCatalogue):
    def find(self, name: str) -> ModelSpec | None:
        return replace(MODEL, prices=PRICES) if name == MODEL.name else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazards:
    """What may go wrong. A provider that fails, bills for nothing or loses its answer: always."""

    crashes: bool = True
    """And so redelivery: of the leases that are lost, and of what a broker does not acknowledge."""
    zombies: bool = True
    cache_loss: bool = True
    deadlines: bool = True
    budgets: bool = True
    months: bool = True
    tenants_roam: bool = True
    """Texts of one tenant come through every partition, so that two workers can embed one key at once."""
    shared_cache: bool = False
    """Texts of one tenant are answered with another's vectors."""


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
        return usage.idempotency_key

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


class Spent:
    """The budgets as the workers know them: what is left to a payer, who may have spent it all."""

    def __init__(self, luck: Luck) -> None:
        self._luck = luck
        self.all_spent = False

    def state(self, payer_id: str, charged_at_ms: int) -> BudgetState | None:
        if payer_id != BUDGETED or not self._luck.hazards.budgets:
            return None
        spent = self.all_spent
        return BudgetState(
            key=BudgetKey(payer_id, "2026-09"),
            budget=Budget(max_tokens=LEFT_TOKENS, max_cost_nanos=None, hard=True),
            billed_tokens=LEFT_TOKENS if spent else 0,
            billed_cost_nanos=0,
            unpriced_tokens=0,
            reached_percent=100 if spent else 0,
            updated_at_ms=charged_at_ms,
        )


@dataclass(frozen=True, slots=True)
class Ends:
    """Everything that the processes of a schedule share."""

    luck: Luck
    requests: RequestLog
    output: OutputLog
    group: Group
    cache: SharedCache
    account: Account
    spent: Spent
    emission: Emission
