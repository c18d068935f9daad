"""An invoice as an interval, and the files it comes in."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.cli.invoice_file import InvoiceFault, read_invoice
from processor.invoice import Bills, DayBill
from tests.support.aggregation import DAY_MS

NOON = 20_000 * DAY_MS + DAY_MS // 2
"""Of 2024-10-04."""
DAY, NEXT_DAY = "2024-10-04", "2024-10-05"
PRICE = 20_000_000_000


def some_bills(provider: str | None = None, *, known_from_ms: int = 0) -> Bills:
    """A receipt of 100 tokens, and a call of up to 30 that nobody confirmed, both at noon."""
    bills = Bills(provider, known_from_ms=known_from_ms)
    bills.take("openai", NOON, NOON + 500, 100, 100, PRICE)
    bills.take("openai", NOON, NOON + 60_000, 10, 30, PRICE)
    return bills


@pytest.mark.parametrize("tokens, inside", [(109, False), (110, True), (130, True), (131, False)])
def test_an_invoice_lies_between_receipts_and_what_nobody_confirmed(tokens: int, inside: bool) -> None:
    """What is certain must be in it, and it holds no more than what may be."""
    lines = list(some_bills().check({DAY: DayBill(tokens)}))
    assert [(line.day, line.tokens_inside, line.inside) for line in lines] == [
        (DAY, inside, inside),
        ("total", inside, inside),
    ]


@pytest.mark.parametrize(
    "amount, inside",
    [("0.0022", True), ("0.0026", True), ("0.00", True), ("0.00214", False), ("0.0021", False), ("0.00266", False)],
)
def test_an_amount_stands_for_what_is_rounded_to_it(amount: str, inside: bool) -> None:
    """Half a unit of its last digit is granted both ways; tokens that it does not name are not held against it."""
    (line, total) = some_bills().check({DAY: DayBill.of(None, Decimal(amount))})
    assert (line.inside, total.inside) == (inside, inside)


@pytest.mark.parametrize(
    "amount, inside",
    [("0.0022000000000000001", True), ("0.0021999999999999999", True), ("0.00219999999999", False), ("1e5", False)],
)
def test_no_amount_is_vaguer_than_half_a_dollar_or_finer_than_a_float(amount: str, inside: bool) -> None:
    """Programs sum dollars in floating point, and write 100,000 of them as 1e5."""
    bills = Bills(None, known_from_ms=0)
    bills.take("openai", NOON, NOON, 110, 110, PRICE)
    bills.take("openai", NOON + DAY_MS, NOON + DAY_MS, 3_000_000, 3_000_000, PRICE)
    day = DAY if amount != "1e5" else NEXT_DAY
    (line, _) = bills.check({day: DayBill.of(None, Decimal(amount))})
    assert line.inside is inside


def test_a_day_of_tokens_and_one_of_money_have_no_total() -> None:
    """What one of them does not say is not nothing: only days that are left out are."""
    bills = some_bills()
    bills.take("openai", NOON + DAY_MS, NOON + DAY_MS, 5, 5, PRICE)
    *days, total = bills.check({DAY: DayBill(110), NEXT_DAY: DayBill.of(None, Decimal("0.0001"))})
    assert [line.inside for line in days] == [True, True]
    assert (total.billed, total.inside) == (DayBill(rounding=total.billed.rounding), True)


def test_roundings_of_many_days_add_up() -> None:
    """A total of rounded amounts may be off by as much as all of them."""
    bills = Bills(None, known_from_ms=0)
    for day in range(10):
        bills.take("openai", NOON + day * DAY_MS, NOON + day * DAY_MS, 200, 200, PRICE)
    invoice = {f"2024-10-{4 + day:02d}": DayBill.of(None, Decimal("0.00")) for day in range(10)}
    assert all(line.inside for line in bills.check(invoice))
    invoice[DAY] = DayBill.of(None, Decimal("0.000"))
    assert not all(line.inside for line in bills.check(invoice))


def test_without_a_price_an_amount_has_no_upper_bound() -> None:
    """Nobody can say what unpriced tokens cost; what is priced must still be in it."""
    bills = some_bills()
    bills.take("openai", NOON, NOON, 5, 5, None)
    assert next(iter(bills.check({DAY: DayBill.of(None, Decimal("9.00"))}))).inside
    assert not next(iter(bills.check({DAY: DayBill.of(None, Decimal("0.0010"))}))).inside


def test_a_call_at_midnight_may_be_billed_on_either_day() -> None:
    """It is certain on none and possible on both, and certain in their sum."""
    midnight = NOON + DAY_MS // 2
    before, after = midnight - 30_000, midnight + 30_000
    for begun, ended in ((midnight - 500, midnight + 500), (before, before + 9), (after, after + 9)):
        for first, second in ((7, 0), (0, 7)):
            bills = Bills(None, known_from_ms=0)
            bills.take("openai", begun, ended, 7, 7, PRICE)
            lines = list(bills.check({DAY: DayBill(first), NEXT_DAY: DayBill(second)}))
            assert [line.inside for line in lines] == [True, True, True]
        lines = list(bills.check({DAY: DayBill(7), NEXT_DAY: DayBill(7)}))
        assert [line.inside for line in lines] == [True, True, False]


def test_a_day_that_an_invoice_leaves_out_is_one_of_nothing() -> None:
    """Between its first and last day; what lies outside of them is not its business."""
    invoice = {"2024-10-03": DayBill(0), NEXT_DAY: DayBill(0)}
    lines = {line.day: line for line in some_bills().check(invoice)}
    assert list(lines) == ["2024-10-03", DAY, NEXT_DAY, "total"]
    assert [lines[DAY].inside, lines["total"].inside] == [False, False]
    assert all(line.inside for line in some_bills().check({NEXT_DAY: DayBill(0)}))


def test_an_invoice_may_be_of_one_deployment() -> None:
    """Calls of others are not on it."""
    assert not next(iter(some_bills("azure-west").check({DAY: DayBill(110)}))).inside
    assert next(iter(some_bills("openai").check({DAY: DayBill(110)}))).inside


@pytest.mark.parametrize("provider, told", [(None, ""), ("openai", ""), ("opnai", "openai")])
def test_a_provider_without_any_call_is_told(provider: str | None, told: str) -> None:
    """Nothing of its invoice can be right, and it may be a slip."""
    assert told in some_bills(provider).stranger
    assert bool(some_bills(provider).stranger) == bool(told)


def test_days_that_the_log_of_calls_has_lost_are_not_judged() -> None:
    """Neither are sums that hold one."""
    lines = list(some_bills(known_from_ms=NOON).check({DAY: DayBill(999), NEXT_DAY: DayBill(0)}))
    assert [(line.provable, line.inside) for line in lines] == [(False, True), (True, True), (False, True)]


@given(
    calls=st.lists(st.tuples(st.integers(0, 3 * DAY_MS), st.integers(0, 120_000), st.integers(0, 99), st.booleans()))
)
def test_the_true_bill_is_always_inside(calls: list[tuple[int, int, int, bool]]) -> None:
    """Whatever moment of a call the provider books it at, and however much of what is unconfirmed."""
    bills, invoice = Bills(None, known_from_ms=0), {f"2024-10-0{day}": DayBill(0, Decimal(0)) for day in range(4, 9)}
    for at_ms, takes_ms, tokens, confirmed in calls:
        begun = NOON - DAY_MS // 2 + at_ms
        bills.take("openai", begun, begun + takes_ms, tokens if confirmed else 0, tokens, PRICE)
        booked_ms = begun + takes_ms * (tokens % 3) // 2
        billed = tokens if confirmed else tokens // 2
        day = f"2024-10-0{4 + (booked_ms - NOON + DAY_MS // 2) // DAY_MS}"
        invoice[day] = invoice[day] + DayBill(billed, Decimal(billed * PRICE).scaleb(-15))
    assert all(line.inside for line in bills.check(invoice))


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    """Rows of a day are summed, and what a row leaves out is not zero."""
    as_csv, as_json = tmp_path / "i.csv", tmp_path / "i.json"
    as_csv.write_text("\ufeffdate,tokens,amount\n2024-10-04,5,0.10\n2024-10-04,6,0.2\n2024-10-05,7,\n2024-10-06,,1\n")
    rows = [("2024-10-04", 5, "0.10"), ("2024-10-04", 6, 0.2), ("2024-10-05", 7, None), ("2024-10-06", None, 1)]
    as_json.write_text(json.dumps([{"date": day, "tokens": tokens, "amount": usd} for day, tokens, usd in rows]))
    expected = {
        "2024-10-04": DayBill(11, Decimal("0.30"), Decimal("0.055")),
        "2024-10-05": DayBill(7),
        "2024-10-06": DayBill.of(None, Decimal(1)),
    }
    assert read_invoice(as_csv) == read_invoice(as_json) == expected


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "holds no day"),
        ("date,tokens\n", "holds no day"),
        ("day,tokens\n2024-10-04,5\n", "row 1: date"),
        ("date,tokens\n04.10.2024,5\n", "row 1: date"),
        ("date,tokens\n20241004,5\n", "row 1: date"),
        ("date,tokens\n2024-10-04,5\n2024-10-05,1.5\n", "row 2: tokens"),
        ('date,tokens\n2024-10-04,"1,000"\n', "row 1: tokens"),
        ("date,tokens\n2024-10-04,-5\n", "row 1: tokens"),
        ("date,amount\n2024-10-04,$5\n", "row 1: amount"),
        ("date,amount\n2024-10-04,NaN\n", "row 1: amount"),
        ("date,amount\n2024-10-04,-1\n", "row 1: amount"),
        ("date,amount\n2024-10-04,1e9999999\n", "row 1: amount"),
        ("date,amount\n2024-10-04,1e-9999999\n", "row 1: amount"),
        ("date,tokens,amount\n2024-10-04,,\n", "row 1: tokens or amount"),
        ('{"date": "2024-10-04"}', "must be a list"),
        ("[1]", "row 1: date"),
        ("date,tokens\n0204-10-04,1\n2024-10-05,1\n", "reaches from 0204-10-04 to 2024-10-05"),
        ("[", "can't be read"),
        ("[" * 100_000, "can't be read"),
        (f"date,tokens\n2024-10-04,{'9' * 5000}", "can't be read"),
        ('[{"date": "2024-10-04", "tokens": true}]', "row 1: tokens"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_invoice_is_told_by_row_and_field(text: str, told: str, tmp_path: Path) -> None:
    """And never by its contents."""
    path = tmp_path / "invoice"
    path.write_text(text)
    with pytest.raises(InvoiceFault, match=told):
        read_invoice(path)


def test_a_file_that_is_no_text_is_no_invoice(tmp_path: Path) -> None:
    """It is told as one."""
    path = tmp_path / "invoice"
    path.write_bytes(b"date,tokens\n\xff")
    with pytest.raises(InvoiceFault, match="can't be read"):
        read_invoice(path)
