"""Step 4, second half: few, full, fair calls of the misses, each when it can start and not before.

A pool per embedding function holds what waits. A model's calls are held to a cap once one was too large, which grows
again as calls succeed; a call that is to be tried again goes out before any other.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from processor.domain import CallEstimator, EmbeddingFunction
from processor.fairness import Text
from processor.pools import Limits, Pool, goes_out, is_full
from processor.spending import Spending
from processor.work import Call, Fold, Policy

HURRY_S = 60.0
"""A text without a deadline gives way to nearly due ones of its tenant for so long."""
ENOUGH = 64
"""Good calls that a cap takes to grow, at most: of its three steps back to a limit that stays, one fails."""
ROUNDING_S = 1e-6
"""A sleep until `due_at` may end a rounding error before it."""


@dataclass(slots=True)
class _Cap:
    """What a model's calls are held to since one was too large.

    `good` calls of about that size have succeeded since it last changed; it grows at `enough`, which doubles up to
    `ENOUGH` each time that it has `grown` too large, so that a limit that stays is seldom tried.
    """

    inputs: float
    quarters: float
    good: int = 0
    enough: int = 1
    grown: bool = False


class Packer:
    """What waits for a provider call, by embedding function, and the calls that wait to be tried again."""

    def __init__(self, policy: Policy, spending: Spending | None = None) -> None:
        self._weights = policy.tenant_weights
        self._spending = spending
        self._pools: dict[str, Pool] = {}  # the one served least recently first
        self._retries: list[tuple[float, int, Call]] = []
        self._caps: dict[str, _Cap] = {}
        self._largest: dict[str, tuple[int, int]] = {}  # texts and tokens of calls that succeeded, by model
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Texts that wait for a call."""
        again = sum(len(call.folds) + len(call.rest) + len(call.spared) for _, _, call in self._retries)
        return again + sum(pool.load.inputs for pool in self._pools.values())

    def add(self, folds: Iterable[Fold], now: float, now_ms: int) -> None:
        """Queue measured folds, each behind those of its tenant that are due before it."""
        for fold in folds:
            self._pool(fold.function, now).add(self._text(fold, _due(fold, now, now_ms)))

    def next_tokens(self, now: float, patience_s: float, max_tokens: int | None) -> int | None:
        """Local tokens of the call that `take` would give, None when it would give none.

        Of a pool that holds more than one call this is what a call of its usual texts has.
        """
        if self._retries and self._retries[0][0] <= now + ROUNDING_S:
            return self._retries[0][2].tokens
        pool = self._due_pool(now, patience_s, max_tokens)
        return None if pool is None else pool.expected_tokens(self._limits(pool.function, max_tokens))

    def take(
        self, now: float, now_ms: int, patience_s: float, max_tokens: int | None
    ) -> tuple[Call | None, list[Fold]]:
        """The next call, and folds that ended instead: past every deadline or budget, or wanted by nobody any more.

        No call but ended folds: ask again. A call to be tried again comes first, whole, whatever `max_tokens` is.
        """
        ended: list[Fold] = []
        while self._retries and self._retries[0][0] <= now + ROUNDING_S:
            call = heapq.heappop(self._retries)[2]
            for fold in [*call.folds, *call.rest]:
                goes_out(fold, now_ms, self._spending)
            ended += self._prune(call)
            if call.folds:
                return call, ended
        pool = self._due_pool(now, patience_s, max_tokens)
        if pool is None:
            return None, ended
        folds, also_ended = pool.form(self._limits(pool.function, max_tokens), now, now_ms)
        del self._pools[pool.function.name]
        if pool.load.inputs:
            self._pools[pool.function.name] = pool
        for fold in folds:
            fold.in_call = True
            fold.begin()
        return (Call(pool.function, folds) if folds else None), ended + also_ended

    def due_at(self, now: float, patience_s: float) -> float | None:
        """When on the monotonic clock the next call is due, `now` if one is; None when nothing waits."""
        times = [self._retries[0][0]] if self._retries else []
        times += [pool.due_at(patience_s, self._limits(pool.function, None)) for pool in self._pools.values()]
        return max(now, min(times)) if times else None

    def retry(self, call: Call) -> None:
        """Try the call again, whole, from its `not_before` on."""
        heapq.heappush(self._retries, (call.not_before, next(self._numbers), call))

    def too_large(self, call: Call) -> None:
        """Hold the model's calls to half of this one, and put its texts back. A call of one text can't be smaller."""
        assert len(call.folds) > 1
        inputs, quarters = len(call.folds), sum(map(_quarters, call.folds))
        cap = self._caps.setdefault(call.function.model.name, _Cap(float("inf"), float("inf")))
        if cap.grown and inputs <= cap.inputs and quarters <= cap.quarters:
            cap.enough, cap.grown = min(2 * cap.enough, ENOUGH), False
        cap.inputs, cap.quarters, cap.good = min(cap.inputs, inputs // 2), min(cap.quarters, max(1, quarters / 2)), 0
        self._put_back(call.folds)

    def has_fitted(self, call: Call) -> bool:
        """Whether calls of as many texts and tokens have succeeded: that it got no answer may be chance."""
        inputs, tokens = self._largest.get(call.function.model.name, (0, 0))
        return len(call.folds) <= inputs and call.tokens <= tokens

    def fitted(self, call: Call) -> None:
        """The call succeeded: a cap that it nearly filled may grow by a quarter, until the model's own limits do."""
        model = call.function.model
        inputs, tokens = self._largest.get(model.name, (0, 0))
        self._largest[model.name] = max(inputs, len(call.folds)), max(tokens, call.tokens)
        cap = self._caps.get(model.name)
        if cap is None:
            return
        share = max(len(call.folds) / cap.inputs, sum(map(_quarters, call.folds)) / cap.quarters)
        if not is_full(share, len(call.folds)):
            return
        cap.good += 1
        if cap.good >= cap.enough:
            cap.inputs, cap.quarters, cap.good = max(cap.inputs + 1, cap.inputs * 1.25), cap.quarters * 1.25, 0
            cap.grown = True
        if cap.inputs >= model.max_inputs_per_call and cap.quarters >= 4 * model.max_tokens_per_call:
            del self._caps[model.name]

    def give_back(self, folds: Sequence[Fold], now: float) -> None:
        """Put back folds that a search found innocent: they go into the next call, at once."""
        self._put_back(folds, now)

    def let_go(self) -> list[Fold]:
        """Drop the folds that nobody wants any more, and return them."""
        dropped: list[Fold] = []
        for _, _, call in self._retries:
            dropped += self._prune(call)
        self._retries = [waiting for waiting in self._retries if waiting[2].folds]
        heapq.heapify(self._retries)
        for name, pool in list(self._pools.items()):
            dropped += pool.let_go()
            if not pool.load.inputs:
                del self._pools[name]
        return dropped

    def _prune(self, call: Call) -> list[Fold]:
        """Take the folds that nobody wants out of a waiting call. A search goes on in its rest, or ends."""
        dropped = [fold for fold in [*call.folds, *call.rest, *call.spared] if not fold.wanted]
        if dropped:
            call.folds, call.rest, call.spared = (
                [fold for fold in folds if fold.wanted] for folds in (call.folds, call.rest, call.spared)
            )
            if not call.folds:
                call.folds, call.rest = call.rest, []
            if not call.folds:
                self._put_back(call.spared)
        return dropped

    def _put_back(self, folds: Sequence[Fold], now: float = float("-inf")) -> None:
        """In front of their tenant's others and due at once, but in their tenant's turn: they can be very many."""
        for fold in folds:
            fold.in_call = False
            self._pool(fold.function, now).add(self._text(fold))

    def _pool(self, function: EmbeddingFunction, now: float) -> Pool:
        pool = self._pools.get(function.name)
        if pool is None:
            pool = self._pools[function.name] = Pool(function, self._weights, self._spending, now)
        return pool

    def _text(self, fold: Fold, due: float = float("-inf")) -> Text:
        body_bytes = len(json.dumps(fold.sent)) + 2
        return Text(due, next(self._numbers), fold, fold.tokens, _quarters(fold), body_bytes, fold.tenant_id)

    def _due_pool(self, now: float, patience_s: float, max_tokens: int | None) -> Pool | None:
        for pool in self._pools.values():
            if pool.due_at(patience_s, self._limits(pool.function, max_tokens)) <= now + ROUNDING_S:
                return pool
        return None

    def _limits(self, function: EmbeddingFunction, max_tokens: int | None) -> Limits:
        model = function.model
        inputs: float = model.max_inputs_per_call
        quarters: float = 4 * model.max_tokens_per_call
        cap = self._caps.get(model.name)
        if cap is not None:
            inputs, quarters = min(inputs, cap.inputs), min(quarters, cap.quarters)
        tokens = float("inf") if max_tokens is None else max(1, max_tokens)
        return Limits(inputs, quarters, model.max_bytes_per_call, tokens)


def _quarters(fold: Fold) -> int:
    in_bytes = fold.function.model.call_estimator is CallEstimator.BYTES_4
    return fold.sent_bytes if in_bytes else 4 * fold.estimated


def _due(fold: Fold, now: float, now_ms: int) -> float:
    """The first deadline of its works on the monotonic clock, or so long after it came that nothing starves."""
    due = fold.waiting_since + HURRY_S
    for work in fold.works:
        deadline_ms = work.job.request.deadline_ms
        if deadline_ms is not None:
            due = min(due, now + (deadline_ms - now_ms) / 1000)
    return due
