"""The audit of totals: what is right is never called wrong, and each kind of difference is found."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import BucketKey, Budget, BudgetKey, BudgetPlan, TaskKey, UsageSums, UsageTotal
from processor.audit import FirstCopies
from processor.cli.audit import AuditReport, LedgerDifference, compare_store, read_books
from processor.domain import Record
from processor.errors import TopicsError
from processor.findings import (
    Breach,
    BudgetDifference,
    BudgetsCheck,
    Difference,
    LedgerCheck,
    Residual,
    TaskDifference,
    TasksCheck,
    TotalsCheck,
)
from processor.invoice import Bills, DayBill
from processor.ports import Destination
from processor.settings import Settings, load
from tests.support.aggregation import (
    DAY_MS,
    HORIZON_MS,
    PARTITIONS,
    TOPICS,
    Bench,
    Event,
    History,
    MemoryLog,
    a_bench,
    append,
)
from tests.support.builders import a_request, a_source
from tests.support.ledgers import EMBEDDING, ONE, THREE, TWO, audited, call, charge, receive

BUDGETS = BudgetPlan(
    named={"p0": Budget(max_tokens=9, max_cost_nanos=None, hard=True)},
    default=Budget(max_tokens=None, max_cost_nanos=100, hard=False),
)
EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from([0, DAY_MS, 20 * DAY_MS, 69 * DAY_MS, 71 * DAY_MS]),
        st.sampled_from([0, DAY_MS, 34 * DAY_MS, 36 * DAY_MS]),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(coming=EVENTS, crash_at=st.none() | st.integers(0, 25), later=EVENTS)
async def test_totals_of_any_history_are_proven_wherever_the_aggregator_stands(
    coming: list[Event], crash_at: int | None, later: list[Event]
) -> None:
    """While nothing has expired each published bucket equals the recomputation, cut at any moment or not; tasks and
    budgets too."""
    with a_bench() as bench:
        bench.budgets = BUDGETS
        history: History = []
        append(bench.log, history, coming)
        await bench.run(crash_at=crash_at)
        books = await audited(bench.log)
        check = books.totals()
        assert (check.differences, check.proven) == ([], check.buckets)
        assert [*books.tasks().differences, *books.budgets().differences] == []
        append(bench.log, history, later)
        await bench.run()
        books = await audited(bench.log)
        check = books.totals()
        assert (check.differences, check.proven, check.equal) == ([], check.buckets, check.buckets)
        assert [*books.tasks().differences, *books.budgets().differences] == []
        assert books.usage.not_folded == 0
        assert books.usage.events == len(history)


@settings(max_examples=40, deadline=None)
@given(coming=EVENTS, kept=st.integers(0, 14))
async def test_no_expired_head_makes_a_difference(coming: list[Event], kept: int) -> None:
    """Whatever retention removes of what it may, nothing that was right is ever called wrong."""
    with a_bench() as bench:
        bench.budgets = BUDGETS
        history: History = []
        append(bench.log, history, coming)
        await bench.run()
        for partition in range(PARTITIONS):
            records = bench.log.after(TOPICS.usage, partition, 0)
            old = [r for r in records if r.source.append_ms < bench.log.now_ms - 2 * HORIZON_MS - 30 * DAY_MS]
            bench.log.expire(TOPICS.usage, partition, len(old[:kept]))
        books = await audited(bench.log)
        check = books.totals()
        assert check.differences == []
        assert check.proven + check.not_provable == check.buckets
        assert [*books.tasks().differences, *books.budgets().differences] == []


# --- totals ------------------------------------------------------------------------------------------------


async def folded_log(bench: Bench) -> MemoryLog:
    """A call and the charges of two requests, folded."""
    log = bench.log
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    charge(log, ONE, ("a", 3))
    charge(log, TWO, ("a", 4))
    await bench.run()
    return log


async def test_a_changed_total_is_a_difference_by_bucket() -> None:
    """The bucket, the sum and both values are named, in every bucket that is not as the log says."""
    with a_bench() as bench:
        log = await folded_log(bench)
        (total, *_) = [each for _, each in await log.contents("totals", UsageTotal) if each.key.dimension == "all"]
        ((partition, (last_offset, sums)),) = total.partitions.items()
        wrong = replace(total, partitions={partition: (last_offset, replace(sums, billed_tokens=8))})
        log.append_bytes(TOPICS.totals, 0, log.codec.encode(Destination("totals", wrong)).value, key=b"forged")
        record = next(
            r for r in log.all_of(TOPICS.totals) if r.key == log.codec.encode(Destination("totals", total)).key
        )
        log.append_bytes(TOPICS.totals, record.source.partition, None, key=record.key)
        check = (await audited(log)).totals()
        assert [tuple(each) for each in check.differences] == [(total.key, partition, "billed_tokens", 8, 7)]
        assert (check.proven, check.buckets) == (check.buckets - 1, check.buckets)


async def test_a_missing_total_is_a_difference() -> None:
    """What the aggregator says it has folded must stand in every bucket."""
    with a_bench() as bench:
        log = await folded_log(bench)
        (key, *_) = {record.key for record in log.all_of(TOPICS.totals)}
        for record in log.all_of(TOPICS.totals):
            if record.key == key:
                log.append_bytes(TOPICS.totals, record.source.partition, None, key=key)
        differences = (await audited(log)).totals().differences
        assert len({each.key for each in differences}) == 1
        assert {each.published for each in differences} == {0}


async def test_a_total_of_no_charge_is_a_difference() -> None:
    """Nothing in the log stands behind it, or it counts beyond the end of the log."""
    with a_bench() as bench:
        log = await folded_log(bench)
        (_, total), *_ = await log.contents("totals", UsageTotal)
        foreign = replace(
            total, key=total.key._replace(payer_id="nobody"), partitions={0: (999, UsageSums(requests=1))}
        )
        log.append(Destination("totals", foreign))
        differences = (await audited(log)).totals().differences
        assert {(each.key.payer_id, each.name) for each in differences} == {
            ("nobody", "last_offset"),
            ("nobody", "requests"),
        }


@pytest.mark.parametrize("bucket", ["foo", "2026-13", "", "0000-00-00"])
async def test_a_total_of_no_day_or_month_is_a_difference(bucket: str) -> None:
    """Whoever wrote it into the topic: the audit tells, and goes on."""
    with a_bench() as bench:
        log = await folded_log(bench)
        (_, total), *_ = await log.contents("totals", UsageTotal)
        log.append(Destination("totals", replace(total, key=total.key._replace(bucket=bucket))))
        assert {each.key.bucket for each in (await audited(log)).totals().differences} == {bucket}


async def test_charges_that_the_aggregator_has_not_folded_are_no_difference() -> None:
    """They are counted as waiting; once it says it has folded them they are."""
    with a_bench() as bench:
        log = await folded_log(bench)
        charge(log, THREE, ("a", 0))
        books = await audited(log)
        assert (books.usage.not_folded, books.totals().differences) == (1, [])
        (record,) = [r for r in log.all_of(TOPICS.usage) if r.source.offset == 2]
        log.commits[TOPICS.usage, record.source.partition] = 3
        books = await audited(log)
        assert books.usage.not_folded == 0
        assert {each.name for each in books.totals().differences} == {"requests", "billed_texts", "billed_characters"}


async def test_a_run_that_was_cut_while_it_was_published_is_no_difference() -> None:
    """Some buckets are ahead of others then, each at its own last offset."""
    for crash_at in range(60):
        with a_bench() as bench:
            for request in (ONE, TWO, THREE):
                charge(bench.log, request, ("a", 3))
            await bench.run(crash_at=crash_at)
            check = (await audited(bench.log)).totals()
            assert (check.differences, check.proven) == ([], check.buckets)


async def test_totals_whose_log_has_expired_are_not_provable_and_more_than_the_log_is_wrong() -> None:
    """A day that the log can't tell may have lost charges; one that it holds whole bounds its total from above."""
    with a_bench() as bench:
        log = bench.log
        log.partitions[TOPICS.usage] = 1
        charge(log, ONE, ("a", 3))
        log.now_ms += 3 * DAY_MS
        charge(log, TWO, ("a", 3))
        log.now_ms += 2 * DAY_MS
        charge(log, THREE, ("a", 3))
        log.now_ms += 2 * HORIZON_MS + 60 * DAY_MS
        four = a_request(correlation_id="four")
        charge(log, four, ("a", 3))
        await bench.run()
        log.expire(TOPICS.usage, 0, 1)
        check = (await audited(log)).totals()
        assert check.differences == []
        assert (check.proven, check.not_provable) == (8, check.buckets - 8)
        (total,) = [
            each
            for record, each in await log.contents("totals", UsageTotal)
            if each.key.dimension == "all" and each.partitions[0][0] == 2 and len(each.key.bucket) == 10
        ]
        last_offset, sums = total.partitions[0]
        forged = replace(total, partitions={0: (last_offset + 1, replace(sums, requests=sums.requests + 1))})
        log.append(Destination("totals", forged))
        assert [each.name for each in (await audited(log)).totals().differences] == ["requests"]


# --- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "appended_ms, charges",
    [
        ([0, 2 * HORIZON_MS], [True, False]),
        ([0, 2 * HORIZON_MS + 1], [True, True]),
        ([0, 2 * HORIZON_MS, 4 * HORIZON_MS], [True, False, False]),
        ([9, 0, 2 * HORIZON_MS + 9], [True, False, False]),
    ],
)
def test_a_copy_is_told_by_the_one_before_it(appended_ms: list[int], charges: list[bool]) -> None:
    """At most two horizons earlier, whatever stands between the first one and it, and whatever clocks do."""
    first = FirstCopies(HORIZON_MS)
    assert [first.take(0, "key", ms) for ms in appended_ms] == charges
    assert first.take(1, "key", 0), "each partition of usage has copies of its own"


async def a_report(**found: Any) -> AuditReport:
    books = await audited(MemoryLog())
    parts: dict[str, Any] = {"usage": books.usage, "totals": books.totals(), "ledger": books.ledger}
    return AuditReport(**parts | found)


async def test_a_report_is_clean_until_something_is_unexplained() -> None:
    """Differences of totals, budgets, tasks and ledgers, breaches, and an invoice outside of its interval spoil it."""
    assert (await a_report()).clean
    assert (await a_report(ledger_differences=[], store_note="not compared", undecodable=[a_source()])).clean
    key = BucketKey("acme", "2026-09", "all", "")
    (outside,) = list(Bills(None, known_from_ms=0).check({"2026-09-21": DayBill(1)}))[:1]
    unbalanced, breached = LedgerCheck(), LedgerCheck()
    unbalanced.billed.add(3, None)
    breached.breaches[Breach.PARTS_DIFFER].add(0, None)
    for found in (
        {"totals": TotalsCheck(differences=[Difference(key, 0, "requests", 1, 2)])},
        {"budgets": BudgetsCheck(differences=[BudgetDifference(BudgetKey("acme", "2026-09"), "billed_tokens", 1, 2)])},
        {"tasks": TasksCheck(differences=[TaskDifference(TaskKey("acme", "task"), "done", 1, 2)])},
        {"ledger_differences": [LedgerDifference("attempts", 1, 2)]},
        {"ledger": unbalanced},
        {"ledger": breached},
        {"invoice": [outside]},
    ):
        report = await a_report(**found)
        assert not report.clean, found
        assert report.fields()["clean"] is False


async def test_the_aggregators_ledger_is_compared_where_it_can_be() -> None:
    """Where its store is here, stands where the audit read to, and the logs are whole; else it says why not."""
    with a_bench() as bench:
        log, settings = bench.log, load(_env_file=None, aggregator_store=bench.path)
        nowhere = load(_env_file=None, aggregator_store=bench.path.with_name("nowhere"))

        async def compare(settings: Settings = settings) -> tuple[Sequence[LedgerDifference] | None, str]:
            books, _, ends = await read_books(
                log, log.codec, TOPICS, horizon_ms=HORIZON_MS, now_ms=log.now_ms, token_types=EMBEDDING
            )
            return compare_store(settings, None, books, ends, log.now_ms)

        await folded_log(bench)
        assert await compare() == ([], "")
        assert (await compare(nowhere))[0] is None
        with closing(sqlite3.connect(bench.path)) as store:
            store.execute("UPDATE ledger SET waste_tokens = 2")
            store.commit()
        assert await compare() == ([LedgerDifference("waste_tokens", 2, 0)], "")
        charge(log, THREE, ("a", 0))
        differences, note = await compare()
        assert (differences, "stands 1 records from" in note) == (None, True)
        await bench.run()
        log.expire(TOPICS.calls, 0, 1)
        log.expire(TOPICS.calls, 1, 1)
        differences, note = await compare()
        assert (differences, "lost records" in note) == (None, True)
        with closing(sqlite3.connect(bench.path)) as store:
            store.execute("PRAGMA user_version = 1")
        differences, note = await compare()
        assert (differences, "schema version 1" in note) == (None, True)


class Expiring(MemoryLog):
    """Loses the first calls while the usage is read, the first time or always."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    async def read(self, topic: str, begin: Mapping[int, int] | None = None) -> AsyncGenerator[Sequence[Record], None]:
        async for records in super().read(topic, begin):
            yield records
        if topic == TOPICS.usage and self.times:
            self.times -= 1
            for partition in range(PARTITIONS):
                self.expire(TOPICS.calls, partition, self.begins[TOPICS.calls, partition] + 1)


async def test_what_expires_while_it_is_read_makes_no_difference() -> None:
    """An audit may read for an hour: the intent of a charge was there when it began."""
    log = Expiring(times=1)
    for attempt_id, request in (("a", ONE), ("b", TWO), ("c", THREE)):
        call(log, attempt_id, (request, 3))
        receive(log, attempt_id, 3)
        charge(log, request, (attempt_id, 3))
    books = await audited(log)
    assert not any(line.attempts for line in books.ledger.breaches.values())
    log.times = 1_000
    with pytest.raises(TopicsError, match="retention"):
        await audited(log)


# --- the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heading, words", [("Residuals", Residual), ("Breaches", Breach)])
def test_each_class_is_explained(heading: str, words: type[StrEnum]) -> None:
    """docs/audit.md has the words of the code, in its order, and no others."""
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text(encoding="utf-8")
    rows = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == [str(word) for word in words]
