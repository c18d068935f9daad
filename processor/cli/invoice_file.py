"""Reads a provider's daily amounts: CSV with a head, or a JSON list of objects, of `date`, `tokens`, `amount`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from processor.invoice import DayBill

LONGEST = timedelta(days=1_000)
"""Every day between the first and the last is told."""
GREATEST, FINEST = 15, -60
"""Powers of ten: an amount beyond is a slip, and more than sums can hold."""


class InvoiceFault(ValueError):
    """The file is no invoice of ours; the message names line and field."""


def read_invoice(path: Path) -> dict[str, DayBill]:
    """UTC day -> its bill; rows of one day are summed. Raises InvoiceFault.

    `date` is "2026-11-21", `tokens` a whole number, `amount` dollars; a row has one of the two at least.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(text) if text.lstrip().startswith(("[", "{")) else csv.DictReader(text.splitlines())
        return _bills(rows)
    except InvoiceFault:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InvoiceFault(f"can't be read as CSV or JSON ({type(error).__name__})") from None


def _json_rows(text: str) -> list[Any]:
    rows = json.loads(text, parse_float=Decimal)
    if not isinstance(rows, list):
        raise InvoiceFault('must be a list such as [{"date": "2026-11-21", "tokens": 1000, "amount": "0.02"}]')
    return rows


def _bills(rows: Iterable[Any]) -> dict[str, DayBill]:
    bills: dict[str, DayBill] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not row.get("date"):
            raise InvoiceFault(f"row {number}: date: is missing; the fields are date, tokens, amount")
        day, bill = _day(number, row["date"]), DayBill.of(_tokens(number, row), _amount(number, row))
        if bill == DayBill():
            raise InvoiceFault(f"row {number}: tokens or amount must be given")
        bills[day] = bills.get(day, DayBill()) + bill
    if not bills:
        raise InvoiceFault("holds no day")
    first, last = min(bills), max(bills)
    if date.fromisoformat(last) - date.fromisoformat(first) > LONGEST:
        raise InvoiceFault(f"reaches from {first} to {last}: one of them is wrong, or it is several invoices")
    return bills


def _day(number: int, text: Any) -> str:
    try:
        day = date.fromisoformat(str(text).strip()).isoformat()
    except ValueError:
        day = ""
    if day != str(text).strip():
        raise InvoiceFault(f"row {number}: date: must be a UTC day such as 2026-11-21")
    return day


def _tokens(number: int, row: Mapping[Any, Any]) -> int | None:
    given = row.get("tokens")
    if given is None or given == "":
        return None
    text = str(given).strip()
    if isinstance(given, bool) or not (text.isascii() and text.isdecimal()):
        raise InvoiceFault(f"row {number}: tokens: must be a whole number without separators")
    return int(text)


def _amount(number: int, row: Mapping[Any, Any]) -> Decimal | None:
    given = row.get("amount")
    if given is None or given == "":
        return None
    try:
        amount = Decimal(str(given).strip())
    except InvalidOperation:
        amount = Decimal("NaN")
    if isinstance(given, bool) or not _is_amount(amount):
        raise InvoiceFault(f"row {number}: amount: must be dollars such as 1.25")
    return amount


def _is_amount(amount: Decimal) -> bool:
    exponent = amount.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= FINEST and amount.adjusted() <= GREATEST and amount >= 0
