"""The audit of what is published beside totals: budget states and quarantined charges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from processor.accounts import EVERYBODY_ELSE, BucketKey, Budget, BudgetPlan
from processor.audit import Audit
from processor.findings import Breach
from processor.ports import Destination
from tests.support.aggregation import DAY_MS, HORIZON_MS, TOPICS, Bench, MemoryLog, a_bench
from tests.support.builders import a_request
from tests.support.ledgers import ONE, TWO, audited, charge

TEN = Budget(max_tokens=10, max_cost_nanos=None, hard=True)
PLAN = BudgetPlan(named={"acme": TEN, "globex": TEN}, default=TEN)


async def told_of_budgets(log: MemoryLog) -> list[tuple[str, str, int | str, int | str]]:
    found = (await audited(log)).budgets().differences
    return [(each.key.payer_id, each.name, each.published, each.recomputed) for each in found]


async def test_states_of_budgets_are_what_the_totals_come_to() -> None:
    """Spent from or not, of a payer by name or of everybody else, wherever the aggregator was killed."""
    for crash_at in (*range(0, 40, 3), None):
        with a_bench() as bench:
            bench.budgets, log = PLAN, bench.log
            charge(log, ONE, ("a", 3))
            charge(log, TWO, ("a", 4))
            await bench.run(crash_at=crash_at)
            assert await told_of_budgets(log) == []
            await bench.run()
            check = (await audited(log)).budgets()
            assert (check.compared, check.states, check.differences) == (True, 3, [])


@pytest.mark.parametrize(
    "payer_id, wrong, told",
    [
        ("acme", {"billed_tokens": 8}, ("billed_tokens", 8, 7)),
        ("acme", {"billed_tokens": 6}, ("billed_tokens", 6, 7)),
        ("acme", {"billed_cost_nanos": 0}, ("billed_cost_nanos", 0, 140)),
        ("acme", {"reached_percent": 100}, ("reached_percent", 100, 50)),
        ("globex", {"unpriced_tokens": 1}, ("unpriced_tokens", 1, 0)),
        (EVERYBODY_ELSE, {"billed_tokens": 1}, ("billed_tokens", 1, 0)),
    ],
    ids=str,
)
async def test_a_wrong_state_of_a_budget_is_a_difference(
    payer_id: str, wrong: dict[str, Any], told: tuple[str, int, int]
) -> None:
    """By payer, amount and both values: it refuses texts, or lets them through."""
    with a_bench() as bench:
        bench.budgets, log = PLAN, bench.log
        charge(log, ONE, ("a", 7))
        await bench.run()
        state = next(state for key, state in (await log.budgets()).items() if key.payer_id == payer_id)
        log.append(Destination("budgets", replace(state, **wrong)))
        assert await told_of_budgets(log) == [(payer_id, *told)]


async def test_nobody_spends_for_everybody_else() -> None:
    """Not even a payer that somebody made up, whose name is empty too."""
    with a_bench() as bench:
        bench.budgets, log = PLAN, bench.log
        charge(log, a_request(tenant_id=EVERYBODY_ELSE), ("a", 7))
        await bench.run()
        assert (await log.totals())[BucketKey(EVERYBODY_ELSE, "2026-09", "all", "")].billed_tokens == 7
        assert await told_of_budgets(log) == []


async def test_amounts_are_not_compared_while_charges_wait() -> None:
    """The state may be older than the totals, or newer; what its limits have reached is its own."""
    with a_bench() as bench:
        bench.budgets, log = PLAN, bench.log
        charge(log, ONE, ("a", 7))
        await bench.run()
        (state,) = [each for each in (await log.budgets()).values() if each.billed_tokens]
        charge(log, TWO, ("a", 4))
        log.append(Destination("budgets", replace(state, billed_tokens=9, reached_percent=80)))
        check = (await audited(log)).budgets()
        assert (check.compared, check.differences) == (False, [])
        log.append(Destination("budgets", replace(state, billed_tokens=9, reached_percent=50)))
        assert await told_of_budgets(log) == [("acme", "reached_percent", 50, 80)]


async def late_and_folded(bench: Bench) -> MemoryLog:
    charge(bench.log, ONE, ("a", 3), charged_at_ms=bench.log.now_ms - HORIZON_MS - 1)
    await bench.run()
    return bench.log


def missing(books: Audit) -> int:
    return books.ledger.breaches[Breach.LATE_MISSING].tokens


async def test_a_late_charge_that_nobody_quarantined_is_a_breach() -> None:
    """Nobody would ever settle it; one that still waits to be folded is none, nor one that expired there."""
    with a_bench() as bench:
        log = await late_and_folded(bench)
        assert missing(await audited(log)) == 0
        (record,) = log.all_of(TOPICS.late)
        log.remake(TOPICS.late)
        assert missing(await audited(log)) == 3
        log.commits.clear()
        assert missing(await audited(log)) == 0
    with a_bench() as bench:
        log = await late_and_folded(bench)
        (record,) = log.all_of(TOPICS.late)
        log.expire(TOPICS.late, record.source.partition, 1)
        assert missing(await audited(log)) == 0


async def test_a_late_copy_whose_charge_has_expired_is_not_missed() -> None:
    """The log no longer tells that it is one."""
    with a_bench() as bench:
        log = bench.log
        charge(log, ONE, ("a", 3))
        charged_at_ms = log.now_ms
        log.now_ms += HORIZON_MS + DAY_MS
        charge(log, ONE, ("a", 3), charged_at_ms=charged_at_ms)
        log.now_ms += 2 * HORIZON_MS
        await bench.run()
        (record, _) = log.all_of(TOPICS.usage)
        log.expire(TOPICS.usage, record.source.partition, 1)
        books = await audited(log)
        assert (books.usage.late.attempts, missing(books)) == (1, 0)
