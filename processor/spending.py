"""Step 4: whether a payer's budget allows one more text. What this worker has in work counts, before it is charged."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from processor.accounts import Budget, BudgetKey, BudgetState, month_of
from processor.domain import ErrorCode, Fault
from processor.ports import Budgets
from processor.usage import cost_of
from processor.work import Fold, Job, Work


class Spending:
    """The texts that were allowed and have no usage event yet, by who pays for them.

    They are counted by the requests in work, each from its first text that was allowed until it is finished: nothing is
    carried on, so nothing drifts. A text that was allowed once stays so. Without `budgets` all are.
    """

    def __init__(self, budgets: Budgets | None) -> None:
        self._budgets = budgets
        self._allowed: dict[Fold, Job] = {}
        self._jobs: dict[Job, list[Fold]] = {}
        self._sums: dict[BudgetKey, tuple[int, int]] = {}

    def over(self, work: Work) -> Fault | None:
        """Why the work's text is not paid for; None: it is, or it was allowed before."""
        if self._budgets is None or work.fold in self._allowed:
            return None
        job = work.job
        state = self._budgets.state(job.request.payer_id, job.source.append_ms)
        if state is None or not state.budget.hard:
            return None
        tokens, cost_nanos = self._sums.get(_key(job), (0, 0))
        max_tokens, max_cost_nanos = state.budget.max_tokens, state.budget.max_cost_nanos
        if (max_tokens is not None and state.billed_tokens + tokens >= max_tokens) or (
            max_cost_nanos is not None and state.billed_cost_nanos + cost_nanos >= max_cost_nanos
        ):
            return exceeded(state)
        return None

    def allow(self, fold: Fold) -> None:
        """The text goes out: from now on it counts for its leader's payer, if that has a budget to keep."""
        if self._budgets is None or fold in self._allowed or (leader := fold.leader()) is None:
            return
        job = leader.job
        state = self._budgets.state(job.request.payer_id, job.source.append_ms)
        if state is not None and state.budget.hard:
            self._allowed[fold] = job
            self._jobs.setdefault(job, []).append(fold)
            self._add(job, fold, 1)

    def finished(self, jobs: Iterable[Job]) -> None:
        """Their usage events are out, or others do them again."""
        for job in jobs:
            for fold in self._jobs.pop(job, ()):
                del self._allowed[fold]
                self._add(job, fold, -1)

    def let_go(self) -> None:
        """Forget the requests that were dropped."""
        self.finished([job for job in self._jobs if not job.live])

    def _add(self, job: Job, fold: Fold, sign: int) -> None:
        key = _key(job)
        tokens, cost_nanos = self._sums.pop(key, (0, 0))
        tokens += sign * fold.tokens
        cost_nanos += sign * (cost_of(fold.tokens, job) or 0)
        if tokens:
            self._sums[key] = (tokens, cost_nanos)


def _key(job: Job) -> BudgetKey:
    return BudgetKey(job.request.payer_id, month_of(job.source.append_ms))


def exceeded(state: BudgetState) -> Fault:
    """Not retryable: the same request again has its charge already, which is of nothing."""
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
