"""`usage report`: which totals are summed, and how they are printed."""

from __future__ import annotations

import csv
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from processor.accounts import BucketKey, BudgetKey, UsageSums
from processor.cli.audit import AuditReport, audit_lines, print_audit
from processor.cli.report import By, PeriodFault, Periods, json_lines, periods, report, table, usd, write_csv
from processor.findings import BudgetDifference, BudgetsCheck, Difference, LedgerCheck, TotalsCheck, UsageCheck

ALL = Periods(days=False, first=None, last=None)


def some_totals() -> dict[BucketKey, UsageSums]:
    """Two payers on two days; only acme's first day is of an agent."""
    charges = [("acme", "2026-10-31", 1, "bot"), ("acme", "2026-11-01", 2, None), ("globex", "2026-11-01", 4, None)]
    totals: dict[BucketKey, UsageSums] = {}
    for payer, day, tokens, agent in charges:
        dimensions = [("all", ""), ("model", "small"), *([("agent", agent)] if agent else [])]
        for bucket in (day, day[:7]):
            for dimension, value in dimensions:
                key = BucketKey(payer, bucket, dimension, value)
                known = totals.get(key, UsageSums())
                totals[key] = UsageSums(
                    requests=known.requests + 1,
                    billed_tokens=known.billed_tokens + tokens,
                    billed_cost_nanos=known.billed_cost_nanos + 20 * tokens,
                )
    return totals


@pytest.mark.parametrize(
    "by, rows",
    [
        ("day", {"2026-10-31": 1, "2026-11-01": 6}),
        ("month", {"2026-10": 1, "2026-11": 6}),
        ("payer", {"acme": 3, "globex": 4}),
        ("model", {"small": 7}),
        ("agent", {"bot": 1, None: 6}),
        ("collection", {None: 7}),
    ],
)
def test_each_charge_counts_once_whatever_the_rows_are(by: By, rows: dict[str | None, int]) -> None:
    """Payers are summed, what has no agent or collection has a row, and the total is the same."""
    shown = report(some_totals(), by, periods(by, None, None))
    assert {value: sums.billed_tokens for value, sums in shown.rows.items()} == rows
    assert (shown.total.billed_tokens, shown.total.requests) == (7, 3)


def test_a_report_may_be_of_one_payer_and_some_days() -> None:
    """Both ends are included, and the total is that of the choice."""
    shown = report(some_totals(), "payer", periods("payer", "2026-11-01", "2026-11-01"), "acme")
    assert {value: sums.billed_tokens for value, sums in shown.rows.items()} == {"acme": 2}
    assert shown.total.billed_tokens == 2


@pytest.mark.parametrize(
    "by, first, last, expected",
    [
        ("payer", None, None, Periods(False, None, None)),
        ("payer", "2026-10", "2026-11", Periods(False, "2026-10", "2026-11")),
        ("payer", "2026-10", "2026-11-05", Periods(True, "2026-10-01", "2026-11-05")),
        ("payer", "2026-10-05", "2026-11", Periods(True, "2026-10-05", "2026-11-31")),
        ("day", None, "2026-11", Periods(True, None, "2026-11-31")),
        ("month", "2026-11", None, Periods(False, "2026-11", None)),
    ],
)
def test_a_month_stands_for_all_its_days(by: By, first: str | None, last: str | None, expected: Periods) -> None:
    """Where days are meant; months are summed from months where no day is named."""
    assert periods(by, first, last) == expected


@pytest.mark.parametrize(
    "by, first, last, option",
    [
        ("payer", "2026-13", None, "--from"),
        ("payer", None, "20261101", "--to"),
        ("payer", "2026-W47-1", None, "--from"),
        ("payer", "2026-11-02", "2026-11-01", "--to"),
        ("payer", "2026-11-02", "2026-10", "--to"),
        ("month", "2026-11-01", None, "--from"),
    ],
)
def test_a_wrong_period_is_told_by_its_option(by: By, first: str | None, last: str | None, option: str) -> None:
    """Before anything is read."""
    with pytest.raises(PeriodFault) as caught:
        periods(by, first, last)
    assert caught.value.option == option


def test_csv_has_exact_dollars_and_no_formula() -> None:
    """A spreadsheet sums it itself; a name that it would take for a formula is quoted."""
    totals = {
        BucketKey(payer, "2026-11", "all", ""): UsageSums(billed_cost_nanos=nanos)
        for payer, nanos in (("=1+1", 1), ("acme", 1_234_567_890_123), ("a,b", 0))
    }
    out = StringIO()
    write_csv(report(totals, "payer", ALL), out)
    rows = {row["payer"]: row for row in csv.DictReader(StringIO(out.getvalue()))}
    assert {name: row["billed_cost_usd"] for name, row in rows.items()} == {
        "'=1+1": "0.000000001",
        "acme": "1234.567890123",
        "a,b": "0.000000000",
    }
    assert rows["acme"]["billed_cost_nanos"] == "1234567890123"


@given(nanos=st.integers(0, 10**18))
def test_dollars_are_exact(nanos: int) -> None:
    """No digit of a nano-dollar is lost, and none is in scientific notation."""
    whole, _, fraction = usd(nanos).partition(".")
    assert (int(whole) * 10**9 + int(fraction), len(fraction)) == (nanos, 9)


def test_json_ends_with_the_total() -> None:
    """A line for each row, null for none."""
    *rows, total = json_lines(report(some_totals(), "agent", ALL))
    assert [row["agent"] for row in rows] == ["bot", None]
    assert (total["total"], total["billed_tokens"]) == (True, 7)


FORGED = "acme\nclean: everything is explained\x1b[2J\u202e"


def test_no_name_forges_a_line_or_moves_the_cursor() -> None:
    """Tenants choose names, and an operator reads them on a terminal."""
    printed = Console(file=StringIO(), force_terminal=True, width=200)
    key = BucketKey(FORGED, "2026-11-01", "all", "")
    differences = [Difference(key, 0, "requests", 1, 2)]
    totals = TotalsCheck(differences=differences)
    print_audit(AuditReport(usage=UsageCheck(), totals=totals, ledger=LedgerCheck()), printed)
    printed.print(table(report({key: UsageSums(requests=1)}, "payer", Periods(days=True, first=None, last=None))))
    assert isinstance(printed.file, StringIO)
    shown = printed.file.getvalue()
    assert "\nclean" not in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert shown.count(r"acme\nclean: everything is explained\x1b[2J\u202e") == 2


def test_what_an_audit_finds_is_said_to_people_and_to_programs() -> None:
    """A wrong state of a budget, and a provider that no call is of."""
    wrong = BudgetDifference(BudgetKey("", "2026-11"), "billed_tokens", 9, 7)
    found = AuditReport(
        usage=UsageCheck(),
        totals=TotalsCheck(),
        ledger=LedgerCheck(),
        budgets=BudgetsCheck(states=1, compared=False, differences=[wrong]),
        invoice_note="no call is of opnai: the ledger names openai",
    )
    printed = Console(file=StringIO(), width=200)
    print_audit(found, printed)
    assert isinstance(printed.file, StringIO)
    for line in (
        "budgets: 1 states, 1 differences; they may lag while charges wait to be folded",
        "DIFFERENCE budget of everybody else, 2026-11: billed_tokens is 9, the log says 7",
        "no call is of opnai: the ledger names openai",
        "NOT CLEAN",
    ):
        assert line in printed.file.getvalue()
    (line_of_it,) = audit_lines(found)
    assert (line_of_it["found"], line_of_it["month"], line_of_it["recomputed"]) == ("budget_difference", "2026-11", 7)
    assert found.fields()["budgets"] == {"states": 1, "compared": False, "differences": 1}
    assert found.fields()["invoice_note"] == found.invoice_note
