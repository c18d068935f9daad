"""Budgets: what each payer's month has come to by the totals, and which states are to be published.

Nothing is counted here: a state is worked out anew from the totals, so it is the same after any restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace

from processor.accounts import (
    EVERYBODY_ELSE,
    BucketKey,
    Budget,
    BudgetKey,
    BudgetPlan,
    BudgetState,
    UsageSums,
    UsageTotal,
    budget_key_of,
    month_of,
)
from processor.aggregate import DAY_MS, total_of
from processor.ports import AggregateStore, RecordReader, TopicReader, Undecodable

PERCENTS = (50, 80, 100)

AHEAD_DAYS = 7
"""So long before a month begins its budgets are published, with the usage of those days: some may be quiet."""
NO_SUMS = UsageSums()


def reached_percent(budget: Budget, sums: UsageSums) -> int:
    """The highest of 0, 50, 80 and 100 that the tokens or the cost have reached of their limit."""
    spent = [(sums.billed_tokens, budget.max_tokens), (sums.billed_cost_nanos, budget.max_cost_nanos)]
    reached = [
        percent
        for percent in PERCENTS
        if any(limit is not None and 100 * amount >= percent * limit for amount, limit in spent)
    ]
    return max(reached, default=0)


def state_of(key: BudgetKey, budget: Budget, sums: UsageSums, now_ms: int) -> BudgetState:
    return BudgetState(
        key=key,
        budget=budget,
        billed_tokens=sums.billed_tokens,
        billed_cost_nanos=sums.billed_cost_nanos,
        unpriced_tokens=sums.unpriced_tokens,
        reached_percent=reached_percent(budget, sums),
        updated_at_ms=now_ms,
    )


class BudgetBook:
    """Which states are published, and what must follow now. The topic is its memory: there is no other.

    Months in which no charge can come any more (older than the horizon) have no state.
    """

    def __init__(self, plan: BudgetPlan, store: AggregateStore, *, horizon_ms: int) -> None:
        self._plan = plan
        self._store = store
        self._horizon_ms = horizon_ms
        self._published: dict[BudgetKey, BudgetState] = {}
        self._compared_in: str | None = None

    def begin(self, published: Mapping[BudgetKey, BudgetState]) -> None:
        """Begin with what the topic holds: limits, totals and the month may be others now."""
        self._published = dict(published)
        self._compared_in = None

    def due(self, totals: Iterable[UsageTotal], now_ms: int) -> list[BudgetState | BudgetKey]:
        """What to publish with these totals, which are about to be saved: states that changed, keys of those to take
        back, in this order. The first time, and some days before a new month, every state is compared."""
        sums = {
            BudgetKey(total.key.payer_id, total.key.bucket): total_of(total.partitions)
            for total in totals
            if total.key.dimension == "all" and _is_month(total.key.bucket) and total.key.payer_id != EVERYBODY_ELSE
        }
        oldest = month_of(now_ms - self._horizon_ms)
        keys: Iterable[BudgetKey] = sums
        if self._compared_in != month_of(now_ms + AHEAD_DAYS * DAY_MS):
            sums = self._unspent(now_ms) | self._stored(now_ms) | sums
            keys = sums.keys() | self._published.keys()
        due: list[BudgetState | BudgetKey] = []
        for key in keys:
            budget, known = self._plan.of(key.payer_id), self._published.get(key)
            if budget is not None and key.month >= oldest:
                state = state_of(key, budget, sums.get(key, NO_SUMS), now_ms)
                if known is None or replace(known, updated_at_ms=now_ms) != state:
                    due.append(state)
            elif known is not None:
                due.append(key)
        return sorted(due, key=_turn)

    def rises(self, due: Iterable[BudgetState | BudgetKey]) -> list[tuple[BudgetState, int]]:
        """The states that have reached more than what is published of them, and that."""
        known = self._published
        return [
            (state, before)
            for state in due
            if isinstance(state, BudgetState)
            and state.reached_percent > (before := known[state.key].reached_percent if state.key in known else 0)
        ]

    def published(self, due: Iterable[BudgetState | BudgetKey], now_ms: int) -> None:
        """The broker has acknowledged what was due then."""
        for each in due:
            if isinstance(each, BudgetState):
                self._published[each.key] = each
            else:
                self._published.pop(each, None)
        self._compared_in = month_of(now_ms + AHEAD_DAYS * DAY_MS)

    def _unspent(self, now_ms: int) -> dict[BudgetKey, UsageSums]:
        """Who has a budget, spent from or not, now and soon: workers must know of it before the first charge."""
        payers = [*self._plan.named, *([EVERYBODY_ELSE] if self._plan.default is not None else [])]
        months = {month_of(now_ms + day * DAY_MS) for day in (0, AHEAD_DAYS)}
        return {BudgetKey(payer_id, month): NO_SUMS for payer_id in payers for month in months}

    def _stored(self, now_ms: int) -> dict[BudgetKey, UsageSums]:
        """Of every payer with a budget, in the months in which a charge may still come."""
        if self._plan == BudgetPlan():
            return {}
        ages_ms = (*range(0, self._horizon_ms, DAY_MS), self._horizon_ms)
        buckets = {
            BucketKey(payer_id, month, "all", "")
            for month in {month_of(now_ms - age_ms) for age_ms in ages_ms}
            for payer_id in self._store.payers(month)
            if payer_id != EVERYBODY_ELSE and self._plan.of(payer_id) is not None
        }
        found = self._store.totals(buckets)
        return {BudgetKey(key.payer_id, key.bucket): total_of(partitions) for key, partitions in found.items()}


async def read_budgets(topic: str, reader: TopicReader, decoder: RecordReader) -> dict[BudgetKey, BudgetState]:
    """What the budgets topic (by its full name) holds."""
    states: dict[BudgetKey, BudgetState] = {}
    async with aclosing(reader.read(topic)) as runs:
        async for records in runs:
            for record in records:
                key = budget_key_of(record.key)
                if key is None:
                    continue
                states.pop(key, None)
                if record.value is not None:
                    state = await decoder.read(BudgetState, record.value)
                    if not isinstance(state, Undecodable):
                        states[key] = state
    return states


def _turn(due: BudgetState | BudgetKey) -> int:
    """What everybody else has comes after the states of those who have spent, and goes before them: a process that ends
    in between leaves nobody who has spent to be taken for everybody else."""
    if isinstance(due, BudgetState):
        return 2 if due.key.payer_id == EVERYBODY_ELSE else 1
    return 0 if due.payer_id == EVERYBODY_ELSE else 1


def _is_month(bucket: str) -> bool:
    return len(bucket) == len("2026-11")
