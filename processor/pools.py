"""What waits for calls of one embedding function, and which texts the next call has.

A call obeys every limit at once: inputs, tokens by the provider's own estimator, bytes of the body, tokens that the
rate limits allow. Tenants take turns in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from processor.domain import CacheLevel, EmbeddingFunction, ErrorCode, Fault
from processor.fairness import Text, Turns
from processor.spending import Spending
from processor.work import Fold, Job, Outcome

FULL = 0.98
"""Of one of its limits: such a call is not waited for or searched for any more."""
LOOK_AHEAD = 64
"""Texts looked at, beyond those whose turn it is, to fill the gap at the end of a call."""

PAST_DEADLINE = Fault(
    ErrorCode.DEADLINE_EXCEEDED, "deadline_ms", "deadline_ms: had passed before the text was embedded"
)


# Sizes and limits


class Limits(NamedTuple):
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

    def has_room(self, text: Text, limits: Limits) -> bool:
        return (
            self.quarters + text.quarters <= limits.quarters
            and self.inputs < limits.inputs
            and self.body_bytes + text.body_bytes <= limits.body_bytes
            and self.tokens + text.tokens <= limits.tokens
        )

    def share(self, limits: Limits) -> float:
        """Of the limit that binds."""
        return max(
            self.inputs / limits.inputs,
            self.quarters / limits.quarters,
            self.body_bytes / limits.body_bytes,
            self.tokens / limits.tokens,
        )


# Pools


class Pool:
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

    def due_at(self, patience_s: float, limits: Limits) -> float:
        """When the next call is due: at once when it is full."""
        if is_full(self.load.share(limits), self.load.inputs):
            return float("-inf")
        return min(self.since + patience_s, self.nearest_due - patience_s)

    def expected_tokens(self, limits: Limits) -> int:
        """Of the next call: what waits, or of more than a call takes its share by the usual size."""
        calls = max(1.0, self.load.share(limits)) if self.load.inputs > 1 else 1.0
        return int(self.load.tokens / calls)

    def form(self, limits: Limits, now: float, now_ms: int) -> tuple[list[Fold], list[Fold]]:
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
            if goes_out(text.fold, now_ms, self._spending):
                yield text
            else:
                ended.append(text)

    def _fill(self, begun: list[Text], next_text: Text, limits: Limits, now_ms: int, ended: list[Text]) -> list[Text]:
        """The call begun so, its gap filled with the largest of some others that fit.

        Texts that are large beside the limit may leave a gap all the same. Then only the first text is bound to go,
        and the largest of all the others fill the call, if that makes it fuller; who gives way is in front after it.
        """
        ours = [next_text, *(self._front.popleft() for _ in range(min(LOOK_AHEAD, len(self._front))))]
        borrowed: list[Text] = []
        for text in self._turns.borrow(LOOK_AHEAD + 1 - len(ours)):
            (borrowed if goes_out(text.fold, now_ms, self._spending) else ended).append(text)
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


def is_full(share: float, inputs: int) -> bool:
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


def _largest_first(begun: Sequence[Text], others: Sequence[Text], limits: Limits) -> list[Text]:
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


def goes_out(fold: Fold, now_ms: int, spending: Spending | None) -> bool:
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
