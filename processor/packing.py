"""Step 4: measure the misses, and make few, full, fair calls of them, each when it can start and not before.

A pool per embedding function holds what waits; inside it tenants take turns, in tokens. A call obeys every limit at
once: inputs, tokens by the provider's own estimator, bytes of the body, tokens that the rate limits allow.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from processor.decode import too_long
from processor.domain import CacheLevel, CallEstimator, EmbeddingFunction, ErrorCode, Fault, Truncate
from processor.fairness import Text, Turns
from processor.ports import Clock, TokenCounter
from processor.spending import Spending
from processor.work import Call, Fold, Job, Outcome, Policy

SLICE_CHARACTERS, TURN_S = 4_096, 0.002
"""Texts are counted a slice at a time: 0.1 ms of byte pairs, 1.2 ms of word pieces. Everybody else gets a turn once
that has taken so long, no sooner: on a busy loop several calls begin in a few turns."""
HURRY_S = 60.0
"""A text without a deadline gives way to nearly due ones of its tenant for so long."""
FULL = 0.98
"""Of one of its limits: such a call is not waited for or searched for any more."""
LOOK_AHEAD = 64
"""Texts looked at, beyond those whose turn it is, to fill the gap at the end of a call."""
ENOUGH = 64
"""Good calls that a cap takes to grow, at most: of its three steps back to a limit that stays, one fails."""
ROUNDING_S = 1e-6
"""A sleep until `due_at` may end a rounding error before it."""

PAST_DEADLINE = Fault(
    ErrorCode.DEADLINE_EXCEEDED, "deadline_ms", "deadline_ms: had passed before the text was embedded"
)


# Measuring


async def measure(folds: Sequence[Fold], counter: TokenCounter, clock: Clock) -> None:
    """Fill in what each fold sends and how large it is, or the fault of a text that is too long.

    Counting is CPU-bound: everybody else gets a turn every `TURN_S`.
    """
    start, since = 0, clock.monotonic()
    while start < len(folds):
        function, end, characters = folds[start].function, start, 0
        texts: list[str] = []
        while end < len(folds) and folds[end].function is function and characters < SLICE_CHARACTERS:
            texts.append(function.prefix + folds[end].text)
            characters += len(texts[-1])
            end += 1
        _measure(folds[start:end], texts, function, counter)
        start = end
        if clock.monotonic() - since >= TURN_S:
            await clock.sleep(0)
            since = clock.monotonic()


def _measure(folds: Sequence[Fold], texts: Sequence[str], function: EmbeddingFunction, counter: TokenCounter) -> None:
    model = function.model
    counts, source = counter.count(texts, model)
    for fold, text, tokens in zip(folds, texts, counts, strict=True):
        fold.fault = too_long(tokens, function)
        if fold.fault is None and tokens > model.max_input_tokens:
            text, whole = _cut(fold.text, function, counter), tokens
            tokens = counter.count([text], model).counts[0]
            fold.cut_tokens = whole - tokens
        fold.sent = text
        fold.tokens = tokens
        fold.token_source = source
        fold.sent_bytes = len(text) if text.isascii() else len(text.encode())
        fold.estimated = -(-fold.sent_bytes // 4) if model.call_estimator is CallEstimator.BYTES_4 else tokens


def _cut(text: str, function: EmbeddingFunction, counter: TokenCounter) -> str:
    """The text with its prefix, cut to the model's limit; the prefix stays whichever end is cut off."""
    model, prefix = function.model, function.prefix
    limit = model.max_input_tokens
    if function.truncate is Truncate.END or not prefix:
        return counter.truncate(prefix + text, model, limit, keep_end=function.truncate is Truncate.START)
    room = limit - counter.count([prefix], model).counts[0]
    while True:
        cut = prefix + counter.truncate(text, model, max(0, room), keep_end=True)
        # Where prefix and text meet, tokens may fall apart into more of them.
        if room <= 0 or counter.count([cut], model).counts[0] <= limit:
            return cut
        room -= 1


# Sizes and limits


class _Limits(NamedTuple):
    """What one call may hold."""

    inputs: float
    quarters: float
    body_bytes: float
    tokens: float


@dataclass(slots=True)
class _Load:
    """The sizes of some texts together."""

    inputs: int = 0
    quarters: int = 0
    body_bytes: int = 0
    tokens: int = 0

    def add(self, text: Text) -> None:
        self.inputs += 1
        self.quarters += text.quarters
        self.body_bytes += text.body_bytes
        self.tokens += text.tokens

    def less(self, other: _Load) -> None:
        self.inputs -= other.inputs
        self.quarters -= other.quarters
        self.body_bytes -= other.body_bytes
        self.tokens -= other.tokens

    def has_room(self, text: Text, limits: _Limits) -> bool:
        return (
            self.quarters + text.quarters <= limits.quarters
            and self.inputs < limits.inputs
            and self.body_bytes + text.body_bytes <= limits.body_bytes
            and self.tokens + text.tokens <= limits.tokens
        )

    def share(self, limits: _Limits) -> float:
        """Of the limit that binds."""
        return max(
            self.inputs / limits.inputs,
            self.quarters / limits.quarters,
            self.body_bytes / limits.body_bytes,
            self.tokens / limits.tokens,
        )


# Pools


class _Pool:
    """What waits for calls of one embedding function: first those whose turn has come already, then by turns.

    `since` is when it began to fill for its next call, `nearest_due` a bound on the deadlines of what waits.
    """

    def __init__(
        self, function: EmbeddingFunction, weights: Mapping[str, int], spending: Spending | None, now: float
    ) -> None:
        self.function = function
        self.load = _Load()
        self.since = now
        self.nearest_due = float("inf")
        self._spending = spending
        self._turns = Turns(weights)
        self._front: deque[Text] = deque()

    def add(self, text: Text) -> None:
        self.load.add(text)
        self.nearest_due = min(self.nearest_due, text.due)
        self._turns.push(text)

    def due_at(self, patience_s: float, limits: _Limits) -> float:
        """When the next call is due: at once when it is full."""
        if _is_full(self.load.share(limits), self.load.inputs):
            return float("-inf")
        return min(self.since + patience_s, self.nearest_due - patience_s)

    def expected_tokens(self, limits: _Limits) -> int:
        """Of the next call: what waits, or of more than a call takes its share by the usual size."""
        calls = max(1.0, self.load.share(limits)) if self.load.inputs > 1 else 1.0
        return int(self.load.tokens / calls)

    def form(self, limits: _Limits, now: float, now_ms: int) -> tuple[list[Fold], list[Fold]]:
        """The folds of the next call in the order of their arrival, and those that ended instead."""
        ended: list[Text] = []
        chosen: list[Text] = []
        load = _Load()
        for text in self._in_turn(now_ms, ended):
            if chosen and not load.has_room(text, limits):
                if load.share(limits) < 1.0:
                    chosen = self._fill(chosen, text, limits, now_ms, ended)
                else:
                    self._front.appendleft(text)
                break
            chosen.append(text)
            load.add(text)
        self.load.less(_load(chosen))
        self.load.less(_load(ended))
        self.since = now
        self.nearest_due = min(self._turns.nearest_due(), min((text.due for text in self._front), default=float("inf")))
        chosen.sort(key=_arrival)
        return [text.fold for text in chosen], [text.fold for text in ended]

    def let_go(self) -> list[Fold]:
        """Drop the folds that nobody wants any more."""
        dropped = self._turns.drop(_is_unwanted) + [text for text in self._front if _is_unwanted(text)]
        if dropped:
            self._front = deque(text for text in self._front if not _is_unwanted(text))
            self.load.less(_load(dropped))
        return [text.fold for text in dropped]

    def _in_turn(self, now_ms: int, ended: list[Text]) -> Iterator[Text]:
        """Texts in fair order, each taken out; those that end instead are set aside."""
        while (text := self._front.popleft() if self._front else self._turns.pop()) is not None:
            if _goes_out(text.fold, now_ms, self._spending):
                yield text
            else:
                ended.append(text)

    def _fill(self, begun: list[Text], next_text: Text, limits: _Limits, now_ms: int, ended: list[Text]) -> list[Text]:
        """The call begun so, its gap filled with the largest of some others that fit.

        Texts that are large beside the limit may leave a gap all the same. Then only the first text is bound to go,
        and the largest of all the others fill the call, if that makes it fuller; who gives way is in front after it.
        """
        ours = [next_text, *(self._front.popleft() for _ in range(min(LOOK_AHEAD, len(self._front))))]
        borrowed: list[Text] = []
        for text in self._turns.borrow(LOOK_AHEAD + 1 - len(ours)):
            (borrowed if _goes_out(text.fold, now_ms, self._spending) else ended).append(text)
        others = ours + borrowed
        call = _largest_first(begun, others, limits)
        if _load(call).share(limits) < FULL:
            other = _largest_first(begun[:1], begun[1:] + others, limits)
            call = max(call, other, key=lambda texts: _load(texts).share(limits))
        taken = {text.number for text in call}
        self._turns.settle(
            charged=[text for text in borrowed if text.number in taken],
            returned=[text for text in borrowed if text.number not in taken],
        )
        self._front.extendleft(text for text in reversed(begun + ours) if text.number not in taken)
        return call


def _is_full(share: float, inputs: int) -> bool:
    """Of so many inputs that fill that share of a limit: nearly all of it, or one more of their size would not fit."""
    return share >= FULL or share + share / inputs > 1.0


def _arrival(text: Text) -> tuple[float, int]:
    return (text.fold.waiting_since, text.number)


def _load(texts: Collection[Text]) -> _Load:
    return _Load(
        len(texts),
        sum([text.quarters for text in texts]),
        sum([text.body_bytes for text in texts]),
        sum([text.tokens for text in texts]),
    )


def _largest_first(begun: Sequence[Text], others: Sequence[Text], limits: _Limits) -> list[Text]:
    """The call begun so, with the largest of the others that fit."""
    call, load = list(begun), _load(begun)

    def size(text: Text) -> float:
        return max(text.quarters / limits.quarters, text.body_bytes / limits.body_bytes, text.tokens / limits.tokens)

    for text in sorted(others, key=size, reverse=True):
        if load.has_room(text, limits):
            call.append(text)
            load.add(text)
    return call


def _is_unwanted(text: Text) -> bool:
    return not text.fold.wanted


def _goes_out(fold: Fold, now_ms: int, spending: Spending | None) -> bool:
    """Whether anybody still wants it, once works past their request's deadline or their payer's budget have ended.

    That is decided before the first call of a request; from then on all that may be paid for is delivered, late or not.
    """
    wanted = False
    for work in fold.works:
        if work.outcome is None and work.ticket.live:
            fault = _over(work.job, now_ms, spending)
            if fault is not None:
                work.outcome = Outcome(CacheLevel.MISS, fault=fault)
            else:
                wanted = True
    if wanted and spending is not None:
        spending.allow(fold)
    return wanted


def _over(job: Job, now_ms: int, spending: Spending | None) -> Fault | None:
    deadline_ms = job.request.deadline_ms
    if job.begun or job.refused is not None:
        return job.refused
    if deadline_ms is not None and deadline_ms < now_ms:
        job.refused = PAST_DEADLINE
    elif spending is not None:
        job.refused = spending.over(job)
    return job.refused


# Packer


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
        self._pools: dict[str, _Pool] = {}  # the one served least recently first
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
                _goes_out(fold, now_ms, self._spending)
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
        if not _is_full(share, len(call.folds)):
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

    def _pool(self, function: EmbeddingFunction, now: float) -> _Pool:
        pool = self._pools.get(function.name)
        if pool is None:
            pool = self._pools[function.name] = _Pool(function, self._weights, self._spending, now)
        return pool

    def _text(self, fold: Fold, due: float = float("-inf")) -> Text:
        body_bytes = len(json.dumps(fold.sent)) + 2
        return Text(due, next(self._numbers), fold, fold.tokens, _quarters(fold), body_bytes, fold.tenant_id)

    def _due_pool(self, now: float, patience_s: float, max_tokens: int | None) -> _Pool | None:
        for pool in self._pools.values():
            if pool.due_at(patience_s, self._limits(pool.function, max_tokens)) <= now + ROUNDING_S:
                return pool
        return None

    def _limits(self, function: EmbeddingFunction, max_tokens: int | None) -> _Limits:
        model = function.model
        inputs: float = model.max_inputs_per_call
        quarters: float = 4 * model.max_tokens_per_call
        cap = self._caps.get(model.name)
        if cap is not None:
            inputs, quarters = min(inputs, cap.inputs), min(quarters, cap.quarters)
        tokens = float("inf") if max_tokens is None else max(1, max_tokens)
        return _Limits(inputs, quarters, model.max_bytes_per_call, tokens)


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
