"""Task progress and budget states once more, plainly from the charges, and what is published of them beside that.

Nothing here is what the aggregator makes these records with.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from processor.accounts import EVERYBODY_ELSE, Budget, BudgetKey, BudgetState, TaskKey, TaskProgress
from processor.domain import Usage
from processor.findings import BudgetDifference, TaskDifference, TasksCheck

DAY_S, DAY_MS = 86_400, 86_400_000
AMOUNTS = ("billed_tokens", "billed_cost_nanos", "unpriced_tokens")


@dataclass(slots=True)
class _Task:
    """What charges have brought a task; when the first and the last of them was appended."""

    first_ms: int = 0
    last_ms: int = 0
    done: int = 0
    failed: int = 0
    total: int | None = None


class Tasks:
    """Take every charge, late ones too, then check the published progress. About 1 kB a task."""

    def __init__(self, published: Mapping[TaskKey, TaskProgress]) -> None:
        self._published = published
        self._tasks: dict[tuple[str, str], _Task] = {}

    def take(self, usage: Usage, append_ms: int) -> None:
        request = usage.request
        if request.task_id is None:
            return
        key = (request.tenant_id, request.task_id)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = _Task(append_ms, append_ms)
        task.first_ms = min(task.first_ms, append_ms)
        task.last_ms = max(task.last_ms, append_ms)
        task.done += usage.texts - usage.failed_texts
        task.failed += usage.failed_texts
        if request.task_total is not None and (task.total is None or request.task_total > task.total):
            task.total = request.task_total

    def check(self, *, whole: bool, folded: bool, told_after_ms: int, apart_ms: int) -> TasksCheck:
        """`whole`: no charge has expired, so nothing may be more than it; `folded`: none waits, so nothing may be less.

        Less is right too of a task that rested, which the aggregator may have begun anew after `apart_ms`, and of one
        with charges appended up to `told_after_ms`, which may be copies.
        """
        check = TasksCheck()
        for key in sorted(self._published.keys() | self._tasks.keys()):
            check.tasks += 1
            theirs, ours = self._published.get(TaskKey(*key)), self._tasks.get(key, _Task())
            no_less = folded and ours.first_ms > told_after_ms and ours.last_ms - ours.first_ms <= apart_ms
            found: list[tuple[str, int | str | None, int | str | None]] = []
            if theirs is not None:
                found += _misnamed(key, TaskKey(theirs.tenant_id, theirs.task_id))
            for name, published, expected in (
                ("done", theirs.done if theirs else 0, ours.done),
                ("failed", theirs.failed if theirs else 0, ours.failed),
                ("total", theirs.total if theirs else None, ours.total),
            ):
                less = expected is not None and (published is None or published < expected)
                if published != expected and (no_less if less else whole):
                    found.append((name, published, expected))
            check.differences += (TaskDifference(TaskKey(*key), *each) for each in found)
            check.proven += not found and no_less and whole
        return check


class Spent:
    """Take every charge that totals count, then check the published states against what their months come to."""

    def __init__(self, published: Mapping[BudgetKey, BudgetState]) -> None:
        self._published = published
        self._spent: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def take(self, usage: Usage) -> None:
        if self._published:
            billed, spent = usage.billed, self._spent[usage.payer_id, month(usage.charged_at_ms // DAY_MS)]
            spent[0] += billed.tokens
            if billed.cost_nanos is None:
                spent[2] += billed.tokens
            else:
                spent[1] += billed.cost_nanos

    def by(self, key: BudgetKey) -> list[int]:
        """AMOUNTS of a payer's month. Nobody spends for everybody else, not even a payer whose name is empty too."""
        return [0, 0, 0] if key.payer_id == EVERYBODY_ELSE else self._spent.get(key, [0, 0, 0])

    def states(self) -> Iterator[tuple[BudgetKey, BudgetState]]:
        """Each that is published."""
        yield from sorted(self._published.items())

    def missing(self, since_month: str) -> Iterator[tuple[BudgetKey, BudgetState]]:
        """What workers read for who has spent in a month and has no state: that of everybody else, if there is one.

        Before `since_month` the states of a month may have been taken back one by one.
        """
        for key in sorted(BudgetKey(*key) for key in self._spent.keys() - self._published.keys()):
            default = self._published.get(BudgetKey(EVERYBODY_ELSE, key.month))
            if default is not None and key.month >= since_month:
                yield key, replace(default, key=key)


def differences(key: BudgetKey, state: BudgetState, right: list[int]) -> Iterator[BudgetDifference]:
    """Of a state, whose AMOUNTS should be these."""
    yield from (BudgetDifference(key, *each) for each in _misnamed(key, state.key))
    for name, expected in zip(AMOUNTS, right, strict=True):
        if getattr(state, name) != expected:
            yield BudgetDifference(key, name, getattr(state, name), expected)
    percent = crossed(state.budget, tokens=right[0], cost_nanos=right[1])
    if state.reached_percent != percent:
        yield BudgetDifference(key, "reached_percent", state.reached_percent, percent)


def crossed(budget: Budget, *, tokens: int, cost_nanos: int) -> int:
    """Of 100, 80 and 50 percent the first that either limit has reached; 0: none."""
    for percent in (100, 80, 50):
        if budget.max_tokens is not None and tokens * 100 >= budget.max_tokens * percent:
            return percent
        if budget.max_cost_nanos is not None and cost_nanos * 100 >= budget.max_cost_nanos * percent:
            return percent
    return 0


@lru_cache(maxsize=512)
def month(day: int) -> str:
    """The UTC month of a day since 1970."""
    return time.strftime("%Y-%m", time.gmtime(day * DAY_S))


def _misnamed(key: tuple[str, str], named: TaskKey | BudgetKey) -> Iterator[tuple[str, str, str]]:
    """Names in a record that are not those of its key."""
    for name, theirs, ours in zip(named._fields, named, key, strict=True):
        if theirs != ours:
            yield name, theirs, ours
