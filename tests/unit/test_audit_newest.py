"""The audit of what the newest record of a key says: a total's own sums, the progress of tasks, budgets by the log."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from processor import budgets
from processor.accounts import EVERYBODY_ELSE, Budget, BudgetKey, BudgetPlan, TaskKey, TaskProgress, UsageTotal
from processor.adapters.avro import key_of
from processor.adapters.murmur2 import partition_of
from processor.adapters.schemas import current
from processor.audit import period_begins_ms
from processor.cli.audit import AuditReport, audit_lines, print_audit
from processor.domain import Amounts, Part, Record, Request
from processor.ports import Destination
from tests.support.aggregation import DAY_MS, HORIZON_MS, TOPICS, Bench, MemoryLog, a_bench
from tests.support.avro_data import encode, total_fields
from tests.support.builders import a_request, a_usage
from tests.support.ledgers import ONE, TWO, audited, call, charge, receive

KEY = TaskKey("acme", "task")
TEN = Budget(max_tokens=10, max_cost_nanos=None, hard=True)
PLAN = BudgetPlan(named={"globex": TEN}, default=TEN)
YEAR_MS = 365 * DAY_MS


def of_task(correlation_id: str, total: int | None = None, **fields: Any) -> Request:
    return a_request(**{"correlation_id": correlation_id, "task_id": "task", "task_total": total} | fields)


async def folded_log(bench: Bench) -> MemoryLog:
    """Two charges of one task, under budgets, whose calls are in order: done 2, failed 1, total 5; 7 tokens of 10."""
    bench.budgets, log = PLAN, bench.log
    one, two = of_task("one", 5), of_task("two", 3)
    call(log, "a", (one, 3), (two, 4))
    receive(log, "a", 7)
    charge(log, one, ("a", 3))
    charge(log, two, ("a", 4), texts=2, failed_texts=1)
    await bench.run()
    return log


async def report_of(log: MemoryLog) -> AuditReport:
    books = await audited(log)
    return AuditReport(
        usage=books.usage, totals=books.totals(), ledger=books.ledger, budgets=books.budgets(), tasks=books.tasks()
    )


async def told_of_tasks(log: MemoryLog) -> list[tuple[Any, ...]]:
    """(task, field, found, expected) of each difference."""
    return [tuple(each) for each in (await audited(log)).tasks().differences]


async def told_of_budgets(log: MemoryLog) -> list[tuple[Any, ...]]:
    return [tuple(each) for each in (await audited(log)).budgets().differences]


# --- a total's own sums ------------------------------------------------------------------------------------


def append_total(log: MemoryLog, total: UsageTotal, **stated: int) -> None:
    """As it was written, but for some of the sums that it gives as those of all its partitions."""
    fields = total_fields(total)
    fields["totals"] |= stated
    schema, key = current("UsageTotal"), key_of(Destination("totals", total))
    assert key is not None
    partition = partition_of(key, log.partitions[TOPICS.totals])
    log.append_bytes(TOPICS.totals, partition, schema.single_object_header + encode(schema.parsed, fields), key=key)


async def a_total(log: MemoryLog) -> UsageTotal:
    log.compact(TOPICS.totals)
    return next(each for _, each in await log.contents("totals", UsageTotal) if each.key.dimension == "all")


async def test_a_total_that_is_not_the_sum_of_its_partitions_is_a_difference() -> None:
    """Who just upserts the topic reads that sum; the newest record counts, so a right one mends it."""
    with a_bench() as bench:
        log = await folded_log(bench)
        assert (await report_of(log)).clean
        total = await a_total(log)
        append_total(log, total, billed_tokens=8, requests=1)
        report = await report_of(log)
        assert [tuple(each) for each in report.totals.differences] == [
            (total.key, None, "requests", 1, 2),
            (total.key, None, "billed_tokens", 8, 7),
        ]
        assert report.totals.equal == report.totals.proven == report.totals.buckets - 1
        assert not report.clean
        append_total(log, total)
        assert (await report_of(log)).clean


async def test_a_total_of_several_partitions_states_their_sum() -> None:
    """A payer's charges may lie in two; what one of them holds is not the total."""
    with a_bench() as bench:
        log = bench.log
        charge(log, ONE, ("a", 3))
        (record,) = log.all_of(TOPICS.usage)
        usage = a_usage(TWO, billed=Amounts(1, 4, 5, 80), parts=(Part("b", 4),), charged_at_ms=log.now_ms)
        other = log.codec.encode(Destination("usage", usage))
        log.append_bytes(TOPICS.usage, 1 - record.source.partition, other.value, key=other.key)
        await bench.run()
        check = (await audited(log)).totals()
        assert (check.differences, check.proven) == ([], check.buckets)
        total = await a_total(log)
        assert sorted(sums.billed_tokens for _, sums in total.partitions.values()) == [3, 4]
        append_total(log, total, billed_tokens=3)
        differences = (await audited(log)).totals().differences
        assert [tuple(each) for each in differences] == [(total.key, None, "billed_tokens", 3, 7)]


# --- tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, difference",
    [
        ({"done": 3}, ("done", 3, 2)),
        ({"done": 1}, ("done", 1, 2)),
        ({"failed": 0}, ("failed", 0, 1)),
        ({"failed": 2}, ("failed", 2, 1)),
        ({"total": None}, ("total", None, 5)),
        ({"total": 3}, ("total", 3, 5)),
        ({"total": 6}, ("total", 6, 5)),
    ],
    ids=str,
)
async def test_wrong_progress_is_a_difference(wrong: dict[str, Any], difference: tuple[Any, ...]) -> None:
    """By task, field and both values: somebody waits for the end of a task, or goes on before it."""
    with a_bench() as bench:
        log = await folded_log(bench)
        check = (await audited(log)).tasks()
        assert (check.tasks, check.proven, check.differences) == (1, 1, [])
        log.append(Destination("progress", replace((await log.progress())[KEY], **wrong)))
        report = await report_of(log)
        assert [tuple(each) for each in report.tasks.differences] == [(KEY, *difference)]
        assert (report.tasks.proven, report.clean) == (0, False)


async def test_progress_that_is_missing_or_of_no_charge_is_a_difference() -> None:
    """Each task of the log is published, unreadable is missing, and none is made up or under another's key."""
    with a_bench() as bench:
        log = await folded_log(bench)
        (record, *_) = log.all_of(TOPICS.progress)
        task = (await log.progress())[KEY]
        nothing = [(KEY, "done", 0, 2), (KEY, "failed", 0, 1), (KEY, "total", None, 5)]
        for value in (None, b"bytes"):
            log.append_bytes(TOPICS.progress, record.source.partition, value, key=record.key)
            assert await told_of_tasks(log) == nothing
        other = log.codec.encode(Destination("progress", replace(task, tenant_id="globex")))
        log.append_bytes(TOPICS.progress, record.source.partition, other.value, key=record.key)
        assert await told_of_tasks(log) == [(KEY, "tenant_id", "globex", "acme")]
        log.append(Destination("progress", task))
        log.append_bytes(TOPICS.progress, 0, b"bytes", key=b"of somebody else")
        assert await told_of_tasks(log) == []
        made_up = TaskProgress(tenant_id="acme", task_id="x", done=1, failed=0, total=None, updated_at_ms=log.now_ms)
        log.append(Destination("progress", made_up))
        assert await told_of_tasks(log) == [(TaskKey("acme", "x"), "done", 1, 0)]


async def test_progress_may_lag_while_charges_wait_but_never_run_ahead() -> None:
    """What is not folded yet is in the log; so nothing may be more than all of that."""
    with a_bench() as bench:
        log = await folded_log(bench)
        charge(log, of_task("three", 9), ("a", 0))
        check = (await audited(log)).tasks()
        assert (check.proven, check.differences) == (0, [])
        task = (await log.progress())[KEY]
        log.append(Destination("progress", replace(task, done=3, total=9)))
        assert await told_of_tasks(log) == []
        log.append(Destination("progress", replace(task, done=4, total=9)))
        assert await told_of_tasks(log) == [(KEY, "done", 4, 3)]


class Busy(MemoryLog):
    """A charge comes just before the log of usage is read: how far it went and what is published are known by then."""

    coming: Request | None = None

    async def read(self, topic: str, begin: Mapping[int, int] | None = None) -> AsyncGenerator[Sequence[Record], None]:
        if topic == TOPICS.usage and self.coming is not None:
            charge(self, self.coming, ("a", 3))
            self.coming = None
        async with aclosing(super().read(topic, begin)) as fetched:
            async for records in fetched:
                yield records


async def test_a_charge_that_comes_while_the_audit_reads_is_one_that_waits() -> None:
    """It is in the log and was in nothing that is published when that was read."""
    with a_bench(log := Busy()) as bench:
        await folded_log(bench)
        log.coming = of_task("three")
        books = await audited(log)
        assert (books.usage.not_folded, books.budgets().compared) == (1, False)
        assert [*books.totals().differences, *books.tasks().differences, *books.budgets().differences] == []


async def test_everything_is_folded_where_a_log_ends_with_no_record() -> None:
    """Others write in transactions, whose markers take offsets: nobody ever commits past them."""
    with a_bench() as bench:
        log = await folded_log(bench)
        for partition in range(log.partitions[TOPICS.usage]):
            log.ends[TOPICS.usage, partition] += 1
        log.append(Destination("progress", replace((await log.progress())[KEY], done=1)))
        books = await audited(log)
        assert books.budgets().compared
        assert [tuple(each) for each in books.tasks().differences] == [(KEY, "done", 1, 2)]


async def test_any_record_that_waits_leaves_progress_and_budgets_behind() -> None:
    """While one partition has a backlog, of whatever records, what is folded of the others is not published."""
    with a_bench() as bench:
        log = await folded_log(bench)
        log.append(Destination("progress", replace((await log.progress())[KEY], done=1)))
        assert await told_of_tasks(log) == [(KEY, "done", 1, 2)]
        charge(log, of_task("four"), ("a", 4), token_type="input")
        assert await told_of_tasks(log) == []


async def test_progress_is_of_first_copies_late_ones_too_and_of_embedding_alone() -> None:
    """Wherever the aggregator was killed, with its store or without, and once the topic is compacted."""
    for crash_at in (*range(0, 40, 3), None):
        with a_bench() as bench:
            log = bench.log
            charge(log, of_task("one", 5), ("a", 3))
            charge(log, of_task("one", 5), ("a", 3))
            charge(log, of_task("two"), ("a", 4), charged_at_ms=log.now_ms - HORIZON_MS - 1)
            charge(log, of_task("three", tenant_id="globex"), ("b", 1), failed_texts=1)
            charge(log, of_task("four"), ("a", 4), token_type="input")
            await bench.run(crash_at=crash_at)
            assert await told_of_tasks(log) == []
            bench.lose_store()
            await bench.run()
            log.compact(TOPICS.progress)
            check = (await audited(log)).tasks()
            assert (check.tasks, check.proven, check.differences) == (2, 2, [])
            assert (await log.progress())[KEY].done == 2


async def test_a_task_that_rested_may_have_begun_anew() -> None:
    """The aggregator forgets one after two horizons: less than the log has is right then, more is not."""
    with a_bench() as bench:
        log = await folded_log(bench)
        log.now_ms += 2 * HORIZON_MS + 3 * DAY_MS
        charge(log, of_task("three", 4), ("a", 0))
        with closing(sqlite3.connect(bench.path)) as store:
            store.execute("DELETE FROM tasks")
            store.commit()
        await bench.run()
        task = (await log.progress())[KEY]
        assert (task.done, task.failed, task.total) == (1, 0, 4)
        check = (await audited(log)).tasks()
        assert (check.tasks, check.proven, check.differences) == (1, 0, [])
        log.append(Destination("progress", replace(task, done=4)))
        assert await told_of_tasks(log) == [(KEY, "done", 4, 3)]


@pytest.mark.parametrize("payers", [("p0", "p6"), ("p6", "p0")], ids=str)
async def test_a_task_rests_whichever_partition_its_charges_lie_in(payers: tuple[str, str]) -> None:
    """The partitions are read one after the other, not in the order of time."""
    with a_bench() as bench:
        log = bench.log
        for payer_id in payers:
            charge(log, of_task(payer_id, agent_id="bot", agent_owner_id=payer_id), ("a", 0))
            log.now_ms += 2 * HORIZON_MS + 3 * DAY_MS
        assert len({record.source.partition for record in log.all_of(TOPICS.usage)}) == 2
        await bench.run()
        check = (await audited(log)).tasks()
        assert (check.tasks, check.proven, check.differences) == (1, 0, [])


async def test_what_has_expired_may_be_in_the_progress_and_what_is_left_must() -> None:
    """A log that has lost its head bounds the young tasks from below, and can't tell the copies of the old ones."""
    with a_bench() as bench:
        log = bench.log
        log.partitions[TOPICS.usage] = 1
        charge(log, of_task("old"), ("a", 1))
        log.now_ms += YEAR_MS
        charge(log, of_task("one"), ("a", 1))
        log.now_ms += 2 * HORIZON_MS + 60 * DAY_MS
        for name in ("two", "three"):
            charge(log, of_task(name, task_id="young"), ("a", 1))
        await bench.run()
        log.expire(TOPICS.usage, 0, 1)
        progress = await log.progress()
        old, young = progress[KEY], progress[TaskKey("acme", "young")]
        assert (old.done, young.done) == (2, 2)
        check = (await audited(log)).tasks()
        assert (check.tasks, check.proven, check.differences) == (2, 0, [])
        log.append(Destination("progress", replace(old, done=0)))
        log.append(Destination("progress", replace(young, done=1)))
        assert await told_of_tasks(log) == [(TaskKey("acme", "young"), "done", 1, 2)]


# --- budgets, by the log -----------------------------------------------------------------------------------


async def test_a_fault_of_what_makes_the_states_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit has a recomputation of its own: here the aggregator has forgotten the last step."""
    monkeypatch.setattr(budgets, "PERCENTS", (50, 80))
    with a_bench() as bench:
        bench.budgets, log = PLAN, bench.log
        charge(log, ONE, ("a", 10))
        await bench.run()
        assert await told_of_budgets(log) == [(BudgetKey("acme", "2026-09"), "reached_percent", 80, 100)]


@pytest.mark.parametrize(
    "spent, percent",
    [(0, 0), (499, 0), (500, 50), (799, 50), (800, 80), (999, 80), (1_000, 100), (5_000, 100)],
)
async def test_a_limit_of_either_kind_is_crossed_where_the_aggregator_says(spent: int, percent: int) -> None:
    """To the token and to the nano-dollar, whichever is first; and a step beside it is found."""
    for tokens, nanos in ((1_000, None), (10**9, 20_000)):
        with a_bench() as bench:
            budget = Budget(max_tokens=tokens, max_cost_nanos=nanos, hard=True)
            bench.budgets, log = BudgetPlan(named={"acme": budget}), bench.log
            charge(log, ONE, ("a", spent))
            await bench.run()
            state = (await log.budgets())[BudgetKey("acme", "2026-09")]
            assert (state.reached_percent, await told_of_budgets(log)) == (percent, [])
            wrong = 50 if percent != 50 else 80
            log.append(Destination("budgets", replace(state, reached_percent=wrong)))
            assert await told_of_budgets(log) == [(state.key, "reached_percent", wrong, percent)]


async def test_the_log_says_what_is_spent_even_where_totals_are_as_wrong_as_the_state() -> None:
    """One wrong number in both would agree."""
    with a_bench() as bench:
        log = await folded_log(bench)
        with closing(sqlite3.connect(bench.path)) as store:
            store.execute("UPDATE totals SET billed_tokens = billed_tokens + 1")
            store.commit()
        charge(log, of_task("three"), ("a", 0))
        await bench.run()
        report = await report_of(log)
        key = BudgetKey("acme", "2026-09")
        assert [tuple(each) for each in report.budgets.differences] == [
            (key, "billed_tokens", 8, 7),
            (key, "reached_percent", 80, 50),
        ]


async def test_a_state_under_the_key_of_another_is_a_difference() -> None:
    """Workers go by the key, other readers by what the record says."""
    with a_bench() as bench:
        log = await folded_log(bench)
        key = BudgetKey("acme", "2026-09")
        state = (await log.budgets())[key]
        record = next(r for r in log.all_of(TOPICS.budgets) if r.key == key_of(Destination("budgets", state)))
        other = log.codec.encode(Destination("budgets", replace(state, key=BudgetKey("globex", "2026-10"))))
        log.append_bytes(TOPICS.budgets, record.source.partition, other.value, key=record.key)
        assert await told_of_budgets(log) == [(key, "payer_id", "globex", "acme"), (key, "month", "2026-10", "2026-09")]


async def test_who_has_spent_and_has_no_state_is_missed_where_everybody_has_a_budget() -> None:
    """Workers would take such a payer for one that has spent nothing; without a default budget it just has none."""
    with a_bench() as bench:
        log = await folded_log(bench)
        key = BudgetKey("acme", "2026-09")
        log.append(Destination("budgets", key))
        assert await told_of_budgets(log) == [
            (key, "billed_tokens", 0, 7),
            (key, "billed_cost_nanos", 0, 140),
            (key, "reached_percent", 0, 50),
        ]
        charge(log, of_task("three"), ("a", 0))
        assert await told_of_budgets(log) == [], "it may come with what waits to be folded"
        log.now_ms += YEAR_MS
        log.commits[TOPICS.usage, 0] = log.commits[TOPICS.usage, 1] = 99
        assert await told_of_budgets(log) == [], "months that are over are taken back"
        log.now_ms -= YEAR_MS
        assert await told_of_budgets(log) != []
        log.append(Destination("budgets", BudgetKey(EVERYBODY_ELSE, "2026-09")))
        assert await told_of_budgets(log) == []


@pytest.mark.parametrize("plans", [(BudgetPlan(), PLAN), (PLAN, BudgetPlan())], ids=["added", "taken out"])
async def test_a_default_budget_comes_after_the_states_of_who_has_spent_and_goes_before_them(
    plans: tuple[BudgetPlan, BudgetPlan],
) -> None:
    """Wherever the aggregator is killed meanwhile, nobody who has spent is taken for one who has not."""
    for crash_at in range(12):
        with a_bench() as bench:
            log = bench.log
            for payer_id in ("p0", "p1", "p2"):
                charge(log, of_task(payer_id, tenant_id=payer_id), ("a", 3))
            bench.budgets, after = plans
            await bench.run()
            bench.budgets = after
            await bench.run(crash_at=crash_at)
            assert await told_of_budgets(log) == []


async def test_a_month_that_ends_while_the_audit_reads_may_be_taken_back() -> None:
    """The aggregator is hours ahead of an audit that has begun anew; of a month with days to go nothing is missing."""
    with a_bench() as bench:
        log = await folded_log(bench)
        key = BudgetKey("acme", "2026-09")
        log.append(Destination("budgets", key))
        over_ms = period_begins_ms("2026-10") + HORIZON_MS
        for hours, found in ((0, False), (1, False), (24, False), (25, True)):
            books = await audited(log, now_ms=over_ms - hours * 3_600_000)
            assert any(each.key == key for each in books.budgets().differences) == found


async def test_a_month_that_the_log_has_lost_some_of_is_held_against_the_totals() -> None:
    """What they count beyond the log may be right; with charges that wait nobody can tell."""
    with a_bench() as bench:
        bench.budgets, log = PLAN, bench.log
        log.partitions[TOPICS.usage] = 1
        charge(log, ONE, ("a", 3))
        charge(log, TWO, ("a", 4))
        await bench.run()
        log.expire(TOPICS.usage, 0, 1)
        assert await told_of_budgets(log) == []
        key = BudgetKey("acme", "2026-09")
        state = replace((await log.budgets())[key], billed_tokens=9, reached_percent=80)
        log.append(Destination("budgets", state))
        assert await told_of_budgets(log) == [(key, "billed_tokens", 9, 7), (key, "reached_percent", 80, 50)]
        charge(log, of_task("three"), ("a", 0))
        assert await told_of_budgets(log) == []


async def test_a_state_never_runs_ahead_of_the_log() -> None:
    """While charges wait it may lag by all of them, and is more than all of them for no reason."""
    with a_bench() as bench:
        log = await folded_log(bench)
        key = BudgetKey("acme", "2026-09")
        state = (await log.budgets())[key]
        charge(log, of_task("three"), ("a", 1))
        for tokens, found in ((7, []), (8, []), (9, [(key, "billed_tokens", 9, 8), (key, "reached_percent", 50, 80)])):
            percent = 50 if tokens != 8 else 80
            log.append(Destination("budgets", replace(state, billed_tokens=tokens, reached_percent=percent)))
            assert await told_of_budgets(log) == found


@pytest.mark.parametrize(
    "plan",
    [
        BudgetPlan(),
        BudgetPlan(default=TEN),
        BudgetPlan(named={"acme": Budget(max_tokens=None, max_cost_nanos=200, hard=False)}),
    ],
    ids=["taken out", "default", "other limits"],
)
async def test_another_file_of_budgets_and_a_month_that_passed_make_no_difference(plan: BudgetPlan) -> None:
    """Before it is read, once it is, and in the months after, until the old states are taken back."""
    with a_bench() as bench:
        log = await folded_log(bench)
        bench.budgets = plan
        for days in (0, 1, 28, 30, 60):
            log.now_ms += days * DAY_MS
            assert await told_of_budgets(log) == []
            await bench.run()
            assert await told_of_budgets(log) == []
            charge(log, of_task(f"after {days}"), ("a", 1))
            assert await told_of_budgets(log) == []
            await bench.run()
            log.compact(TOPICS.budgets)
            assert await told_of_budgets(log) == []


# --- said ----------------------------------------------------------------------------------------------------


async def test_each_difference_is_said_to_people_and_to_programs() -> None:
    """Key, field, what is published and what should be."""
    with a_bench() as bench:
        log = await folded_log(bench)
        append_total(log, await a_total(log), saved_texts=1_000)
        log.append(Destination("progress", replace((await log.progress())[KEY], total=None)))
        report = await report_of(log)
    printed = Console(file=StringIO(), width=200)
    print_audit(report, printed)
    assert isinstance(printed.file, StringIO)
    shown = printed.file.getvalue()
    for line in (
        "/all: saved_texts is 1,000, its partitions come to 0",
        "tasks: 1 tasks, 0 proven, 1 differences",
        "DIFFERENCE task task of acme: total is not named, the log says 5",
        "NOT CLEAN",
    ):
        assert line in shown
    total, task = audit_lines(report)
    assert (total["found"], total["partition"], total["name"], total["published"]) == (
        "difference",
        None,
        "saved_texts",
        1_000,
    )
    assert task == {
        "found": "task_difference",
        "tenant_id": "acme",
        "task_id": "task",
        "name": "total",
        "published": None,
        "recomputed": 5,
    }
    assert report.fields()["tasks"] == {"tasks": 1, "proven": 0, "differences": 1}
