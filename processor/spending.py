"""Step 4: whether a payer's budget allows one more request. What is in work here counts before it is charged."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from processor.accounts import Budget, BudgetKey, BudgetState, month_of
from processor.domain import Amounts, ErrorCode, Fault
from processor.ports import Budgets, Clock
from processor.usage import cost_of
from processor.work import Fold, Job

LAG_S = 5.0
"""Longer than a usage event takes to show in its payer's state while the aggregator runs. Events that change none
(copies of charges before) count for so long."""


class Amount(NamedTuple):
    tokens: int
    cost_nanos: int


NOTHING = Amount(0, 0)


class Charge(NamedTuple):
    """What a usage event bills, and until when it counts at most."""

    tokens: int
    cost_nanos: int
    until_s: float


@dataclass(slots=True)
class Untold:
    """The charges of a payer's month that its state has not risen by yet, in their order, and their sum.

    `risen_tokens`: by how much more than those before it has risen since; charges of others among them.
    """

    state_tokens: int
    risen_tokens: int = 0
    tokens: int = 0
    cost_nanos: int = 0
    charges: deque[Charge] = field(default_factory=deque)

    def append(self, charge: Charge) -> None:
        self.charges.append(charge)
        self.tokens += charge.tokens
        self.cost_nanos += charge.cost_nanos

    def told(self, state_tokens: int, now_s: float) -> None:
        """Forget those that are in the state, each of them whole, and those that have waited for it long enough."""
        self.risen_tokens += max(0, state_tokens - self.state_tokens)
        self.state_tokens = state_tokens
        while self.charges:
            first = self.charges[0]
            if first.tokens <= self.risen_tokens:
                self.risen_tokens -= first.tokens
            elif first.until_s > now_s:
                break
            self.charges.popleft()
            self.tokens -= first.tokens
            self.cost_nanos -= first.cost_nanos


class Spending:
    """The texts that were allowed and that no state tells of yet, by who pays for them.

    They are counted by the requests in work, each from its first text that was allowed until its usage event goes out;
    then what that bills counts, until the payer's state has risen by it, `LAG_S` at most. So nothing drifts. A request
    that was allowed once stays so, with its copies, until it is finished.
    """

    def __init__(self, budgets: Budgets, clock: Clock) -> None:
        self._budgets = budgets
        self._clock = clock
        self._allowed: dict[Fold, Job] = {}
        self._jobs: dict[Job, list[Fold]] = {}
        self._requests: Counter[str] = Counter()
        self._sums: dict[BudgetKey, Amount] = {}
        self._untold: dict[BudgetKey, Untold] = {}

    def over(self, job: Job) -> Fault | None:
        """Why no text of the request is paid for; None: they are, or were allowed before."""
        if job.request_id in self._requests:  # a copy of it costs nothing more
            return None
        state = self._budgets.state(job.request.payer_id, job.source.append_ms)
        if state is None or not state.budget.hard:
            return None
        tokens, cost_nanos = self._sums.get(_key(job), NOTHING)
        untold = self._awaited(_key(job), state)
        tokens, cost_nanos = tokens + untold.tokens, cost_nanos + untold.cost_nanos
        max_tokens, max_cost_nanos = state.budget.max_tokens, state.budget.max_cost_nanos
        if (max_tokens is not None and state.billed_tokens + tokens >= max_tokens) or (
            max_cost_nanos is not None and state.billed_cost_nanos + cost_nanos >= max_cost_nanos
        ):
            return exceeded(state)
        return None

    def allow(self, fold: Fold) -> None:
        """The text goes out: its leader's request will, and all that is known to be missing of that counts from now on
        for its payer, if that has a budget to keep."""
        if fold in self._allowed or (leader := fold.leader()) is None:
            return
        job = leader.job
        state = self._budgets.state(job.request.payer_id, job.source.append_ms)
        if state is None or not state.budget.hard:
            return
        for missing in [fold] if job in self._jobs else _missing(job):
            if missing not in self._allowed:
                self._allowed[missing] = job
                if job not in self._jobs:
                    self._jobs[job] = []
                    self._requests[job.request_id] += 1
                self._jobs[job].append(missing)
                self._add(job, missing, 1)

    def charged(self, job: Job, billed: Amounts) -> None:
        """Its usage event goes out now: not later, or the state that tells of it would count beside it."""
        if job not in self._jobs:
            return
        self._settle(job)
        key, state = _key(job), self._budgets.state(job.request.payer_id, job.source.append_ms)
        if state is not None and billed.tokens:
            self._awaited(key, state)
            untold = self._untold.pop(key, None) or Untold(state.billed_tokens)  # the last to pass comes last
            untold.append(Charge(billed.tokens, billed.cost_nanos or 0, self._clock.monotonic() + LAG_S))
            self._untold[key] = untold
        self._drop_passed()

    def finished(self, jobs: Iterable[Job]) -> None:
        """All is acknowledged: their copies are others' from now on."""
        for job in jobs:
            if job in self._jobs:
                self._forget(job)

    def let_go(self) -> None:
        """Forget the requests that were dropped: others do them again."""
        for job in [job for job in self._jobs if not job.live]:
            self._forget(job)

    def _awaited(self, key: BudgetKey, state: BudgetState) -> Amount:
        """What was charged and is not in this state yet."""
        untold = self._untold.get(key)
        if untold is None:
            return NOTHING
        untold.told(state.billed_tokens, self._clock.monotonic())
        if not untold.charges:
            del self._untold[key]
        return Amount(untold.tokens, untold.cost_nanos)

    def _drop_passed(self) -> None:
        """Payers may be any number, and months too: most are never asked for again."""
        now = self._clock.monotonic()
        for key in [*itertools.takewhile(lambda key: self._untold[key].charges[-1].until_s <= now, self._untold)]:
            del self._untold[key]

    def _settle(self, job: Job) -> None:
        """What it was thought to cost counts no more."""
        for fold in self._jobs[job]:
            del self._allowed[fold]
            self._add(job, fold, -1)
        self._jobs[job] = []

    def _forget(self, job: Job) -> None:
        self._settle(job)
        del self._jobs[job]
        self._requests[job.request_id] -= 1
        if not self._requests[job.request_id]:
            del self._requests[job.request_id]

    def _add(self, job: Job, fold: Fold, sign: int) -> None:
        tokens, cost_nanos = self._sums.pop(_key(job), NOTHING)
        tokens += sign * fold.tokens
        cost_nanos += sign * (cost_of(fold.tokens, job) or 0)
        if tokens:
            self._sums[_key(job)] = Amount(tokens, cost_nanos)


def _missing(job: Job) -> list[Fold]:
    """The misses that have been measured, and that the request leads."""
    folds = {work.fold for work in job.works if work.fold is not None and work.fold.tokens}
    return [fold for fold in folds if (leader := fold.leader()) is not None and leader.job is job]


def _key(job: Job) -> BudgetKey:
    return BudgetKey(job.request.payer_id, month_of(job.source.append_ms))


def exceeded(state: BudgetState) -> Fault:
    """Not retryable: a reader who keeps the first outcome of a chunk never sees a later one of the same request."""
    return Fault(
        ErrorCode.BUDGET_EXCEEDED,
        "budget",
        f"budget: the payer's {_limits(state.budget)} of {state.key.month} are spent; have them raised or wait for the "
        "next month, then send it under a new correlation id",
    )


def _limits(budget: Budget) -> str:
    limits = []
    if budget.max_tokens is not None:
        limits.append(f"{budget.max_tokens} tokens")
    if budget.max_cost_nanos is not None:
        limits.append(f"{Decimal(budget.max_cost_nanos).scaleb(-9).normalize():f} dollars")
    return " or ".join(limits)
