"""What requests would take and cost, before any of it is paid for: they go through steps 1 to 4 as in `pipeline.py`.

Where a worker would make a call, its texts count as embedded. So the quote of a fresh corpus is its bill.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import TypeVar
from uuid import UUID

import numpy as np

from processor.batching import Batcher
from processor.cache import CacheKeys, look_up
from processor.decode import EMPTY_TEXT, Checker
from processor.domain import (
    CacheLevel,
    DlqClass,
    EmbeddingFunction,
    Entry,
    ErrorCode,
    Fault,
    Item,
    Request,
    Source,
    TokenSource,
    Vector,
    Word,
)
from processor.errors import CacheUnavailable
from processor.identity import request_id
from processor.measuring import measure
from processor.packing import Packer
from processor.ports import Catalogue, Clock, TokenCounter, Undecodable, VectorCache
from processor.results import settle
from processor.usage import charge
from processor.work import Call, Fold, Instant, Job, Outcome, Plan, Policy, Window, Work

W = TypeVar("W", bound=Word)

WAITING_TEXTS = 4_096
"""Texts that wait before a call is made of some: about what a worker's read-ahead holds. It picks what fills a call."""
PATIENCE_S = 1.0
"""Of a pool that is not full. All happens at one moment, so it never ends, but for a text whose deadline is nearer."""

NO_VECTOR: Vector = np.empty(0, np.float32)
PAID = Entry(NO_VECTOR, 0, Item("", 0), "", TokenSource.PROVIDER)
"""Of a text that nobody pays for any more, whoever did."""
PAID_BEFORE = {level: Outcome(level, PAID) for level in CacheLevel}


@dataclass(slots=True)
class Share:
    """What one vector space would take: distinct texts that no cache has, their tokens, calls and price.

    `cost_nanos` is that of the tokens that have a price; the others are `unpriced_tokens`.
    """

    texts: int = 0
    tokens: int = 0
    calls: int = 0
    cost_nanos: int = 0
    unpriced_tokens: int = 0


@dataclass(slots=True)
class Quote:
    """Every text is one of: to be embedded (`spaces`), `repeated`, `cached`, or `failed` by code.

    `requests` are those that ask for vectors, each counted once; `copies` are records that hold one of them again,
    `others` those that embed nothing. `refused` (requests by code), `unreadable` (records by class) have no texts here.
    `cache_unavailable`: why the cache was not asked any more.
    """

    requests: int = 0
    copies: int = 0
    others: int = 0
    refused: dict[ErrorCode, int] = field(default_factory=dict)
    unreadable: dict[DlqClass, int] = field(default_factory=dict)
    texts: int = 0
    characters: int = 0
    repeated_texts: int = 0
    cached_texts: int = 0
    truncated_texts: int = 0
    failed_texts: dict[ErrorCode, int] = field(default_factory=dict)
    spaces: dict[str, Share] = field(default_factory=dict)
    token_source: TokenSource = TokenSource.TOKENIZER
    cache_unavailable: str | None = None

    @property
    def total(self) -> Share:
        shares = self.spaces.values()
        return Share(
            sum(share.texts for share in shares),
            sum(share.tokens for share in shares),
            sum(share.calls for share in shares),
            sum(share.cost_nanos for share in shares),
            sum(share.unpriced_tokens for share in shares),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What bounds the calls of all workers of a lane together. `call_s`: assumed time of one call; None: unknown."""

    requests_per_minute: float | None
    tokens_per_minute: float | None
    concurrent_calls: int
    call_s: float | None

    def minutes(self, work: Share) -> tuple[float, str] | None:
        """The least time and what it is bound by; None when nothing is known."""
        bounds: list[tuple[float, str]] = []
        if self.requests_per_minute is not None:
            bounds.append((work.calls / self.requests_per_minute, "requests per minute"))
        if self.tokens_per_minute is not None:
            bounds.append((work.tokens / self.tokens_per_minute, "tokens per minute"))
        if self.call_s is not None:
            bounds.append((ceil(work.calls / self.concurrent_calls) * self.call_s / 60, "calls at a time"))
        return max(bounds, default=None)


class _Owned:
    """The lease of records that nobody takes away, and whose offsets nobody commits."""

    topic, partition, generation, revoked = "", 0, 0, False

    def held(self) -> bool:
        return True

    def finish(self, offset: int) -> None:
        """Nothing is committed."""


class Quoter:
    """Takes records as a worker would, in the order of the log, and adds up in `quote` what they come to.

    It remembers a key of each distinct text and the id of each request, and holds the texts that wait for a call.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        catalogue: Catalogue,
        cache: VectorCache | None,
        counter: TokenCounter,
        clock: Clock,
        max_call_tokens: int | None,
    ) -> None:
        self.quote = Quote()
        self._checker = Checker(policy, catalogue)
        self._keys = CacheKeys.of(policy)
        self._cache = cache
        self._counter = counter
        self._clock = clock
        self._now = Instant(clock.now_ms(), 0.0)
        self._max_call_tokens = max_call_tokens
        self._batcher = Batcher(policy)
        self._packer = Packer(policy)
        self._lease = _Owned()
        self._seen: set[bytes] = set()
        self._known: dict[bytes, Outcome] = {}

    async def take(self, source: Source, decoded: Request | Undecodable, size_bytes: int) -> None:
        """Steps 1 and 2 for a record; then 3 and 4 for windows and calls that are full."""
        if isinstance(decoded, Undecodable):
            _add(self.quote.unreadable, decoded.reason)
            return
        identity = request_id(decoded)
        if (name := UUID(identity).bytes) in self._seen:
            self.quote.copies += 1
            return
        self._seen.add(name)
        plan = self._checker.check(decoded, size_bytes)
        if isinstance(plan, Fault):
            _add(self.quote.refused, plan.code)
        elif plan.operation is None or plan.function is None:
            self.quote.others += 1
        else:
            self._group(Job(self._lease, source, size_bytes, 0.0, request=decoded, request_id=identity), plan)
            await self._advance()

    async def finish(self) -> Quote:
        """No more comes: what waits is embedded."""
        await self._advance(last=True)
        return self.quote

    def _group(self, job: Job, plan: Plan) -> None:
        function, request = plan.function, job.request
        assert function is not None
        job.plan, job.price = plan, function.model.price_at(job.source.append_ms)
        first = request.first_chunk_index
        job.works = [
            Work(job, chunk_id=chunk.chunk_id, chunk=chunk, item=Item(job.request_id, first + position))
            for position, chunk in enumerate(request.chunks)
        ]
        job.unsent = len(job.works)
        self.quote.requests += 1
        done: list[Work] = []
        for work in job.works:
            self._place(work, function, done)
        self._finish(done)

    def _place(self, work: Work, function: EmbeddingFunction, done: list[Work]) -> None:
        """A text that came before is there already; else the work goes into the fold of its cache key."""
        request, text = work.job.request, work.chunk.text
        if not text or text.isspace():
            work.outcome = Outcome(fault=EMPTY_TEXT)
            done.append(work)
            return
        own = None if request.use_cache else work.item
        key = self._keys.present(request.tenant_id, function, text, own)
        work.outcome = self._known.get(key)
        if work.outcome is None:
            self._batcher.add(work, key, function, self._now.monotonic_s)
        else:
            done.append(work)

    async def _advance(self, *, last: bool = False) -> None:
        """Look full windows up, and make full calls of the misses; at last, of all of them."""
        while (window := self._batcher.take(-inf, flush=last)) is not None:
            await self._look_up(window)
            self._call()
        if last:
            self._call(last=True)

    async def _look_up(self, window: Window) -> None:
        misses = window.folds
        if self._cache is not None:
            try:
                misses = await look_up(window.folds, self._cache, self._keys)
            except CacheUnavailable as error:
                self.quote.cache_unavailable, self._cache = str(error), None
        for fold in window.folds:
            if fold.entry is not None:
                fold.entry = PAID
        await measure(misses, self._counter, self._clock)
        self._packer.add([fold for fold in misses if fold.fault is None], self._now.monotonic_s, self._now.ms)
        self._settle(fold for fold in window.folds if fold.entry is not None or fold.fault is not None)

    def _call(self, *, last: bool = False) -> None:
        """Calls as a worker under backlog makes them."""
        packer, now, most = self._packer, self._now, self._max_call_tokens
        patience_s, kept = (0.0, 0) if last else (PATIENCE_S, WAITING_TEXTS)
        while len(packer) > kept and packer.next_tokens(now.monotonic_s, patience_s, most) is not None:
            call, ended = packer.take(now.monotonic_s, now.ms, patience_s, most)
            self._settle(ended)
            if call is not None:
                self._embed(call)

    def _embed(self, call: Call) -> None:
        """Its texts are embedded: the leader of each is billed its tokens."""
        share = self.quote.spaces.setdefault(call.function.space_name, Share())
        share.calls += 1
        for fold in call.folds:
            leader = fold.leader()
            assert leader is not None
            if fold.token_source is not TokenSource.TOKENIZER:
                self.quote.token_source = fold.token_source
            fold.entry = Entry(NO_VECTOR, fold.tokens, leader.item, "", fold.token_source, fold.cut_tokens)
        self._settle(call.folds)

    def _settle(self, folds: Iterable[Fold]) -> None:
        done: list[Work] = []
        for fold in folds:
            self._batcher.settled(fold)
            settle(fold)
            done += fold.works
            if fold.entry is not None:
                miss = fold.level is CacheLevel.MISS
                self._known[fold.key] = PAID_BEFORE[CacheLevel.COALESCED if miss else fold.level]
        self._finish(done)

    def _finish(self, works: Sequence[Work]) -> None:
        """Count outcomes; a request's charge follows its last one (U4)."""
        for work in works:
            outcome, quote = work.outcome, self.quote
            assert outcome is not None
            quote.texts += 1
            quote.characters += len(work.chunk.text)
            if outcome.fault is not None:
                _add(quote.failed_texts, outcome.fault.code)
            elif not outcome.billed:
                cached = outcome.level is not CacheLevel.COALESCED
                quote.cached_texts += cached
                quote.repeated_texts += not cached
            elif outcome.entry is not None:
                quote.truncated_texts += outcome.entry.cut_tokens > 0
            work.job.unsent -= 1
            if work.job.unsent == 0:
                self._charge(work.job)

    def _charge(self, job: Job) -> None:
        usage = charge(job, "", self._now)
        job.close()
        billed = usage.billed
        if not billed.texts:
            return
        share = self.quote.spaces.setdefault(usage.vector_space, Share())
        share.texts += billed.texts
        share.tokens += billed.tokens
        if billed.cost_nanos is None:
            share.unpriced_tokens += billed.tokens
        else:
            share.cost_nanos += billed.cost_nanos


def _add(counts: dict[W, int], word: W) -> None:
    counts[word] = counts.get(word, 0) + 1
