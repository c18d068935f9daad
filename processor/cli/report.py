"""`usage report`: the published totals by one thing over a range of UTC days or months, for people and spreadsheets."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TextIO

from rich.markup import escape
from rich.table import Table

from processor.accounts import BucketKey, UsageSums
from processor.cli.totals import add, is_bucket, sums_table

By = Literal["day", "month", "payer", "model", "operation", "agent", "collection"]
OPTIONAL_DIMENSIONS = ("agent", "collection")
"""What a charge may have none of: its row is the rest of all."""

NONE = "(none)"
DAY_LENGTH = len("2026-11-21")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A name that begins so would be a formula in a spreadsheet."""


class PeriodFault(ValueError):
    """`option` of the command line is wrong, and the message says how."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Periods(NamedTuple):
    """The UTC days (or months) from `first` to `last`, both included; None: without a bound."""

    days: bool
    first: str | None
    last: str | None

    def hold(self, bucket: str) -> bool:
        return (
            (len(bucket) == DAY_LENGTH) == self.days
            and (self.first is None or self.first <= bucket)
            and (self.last is None or bucket <= self.last)
        )


def periods(by: By, first: str | None, last: str | None) -> Periods:
    """What the options mean: a month stands for all its days where days are meant. Raises PeriodFault."""
    given = {"--from": first, "--to": last}
    for option, text in given.items():
        if text is not None and not is_bucket(text):
            raise PeriodFault(option, "must be a day such as 2026-11-21 or a month such as 2026-11")
        if by == "month" and text is not None and len(text) == DAY_LENGTH:
            raise PeriodFault(option, "must be a month such as 2026-11 with --by month")
    days = by == "day" or any(text is not None and len(text) == DAY_LENGTH for text in given.values())
    if days:
        first = None if first is None else f"{first}-01"[:DAY_LENGTH]
        last = None if last is None else f"{last}-31"[:DAY_LENGTH]
    if first is not None and last is not None and last < first:
        raise PeriodFault("--to", "must not be before --from")
    return Periods(days, first, last)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """A row for each value, None for what has no such value, in the order of their names; `total` is their sum."""

    by: By
    rows: Mapping[str | None, UsageSums]
    total: UsageSums


def report(totals: Mapping[BucketKey, UsageSums], by: By, chosen: Periods, payer_id: str | None = None) -> UsageReport:
    """The sum over all payers, or of one, of what lies in the periods."""
    dimension = "all" if by in ("day", "month", "payer") else by
    parts: defaultdict[str | None, list[UsageSums]] = defaultdict(list)
    everything = []
    for key, sums in totals.items():
        if not chosen.hold(key.bucket) or payer_id not in (None, key.payer_id):
            continue
        if key.dimension == "all":
            everything.append(sums)
        if key.dimension == dimension:
            parts[{"day": key.bucket, "month": key.bucket, "payer": key.payer_id}.get(by, key.value)].append(sums)
    rows: dict[str | None, UsageSums] = {value: add(parts[value]) for value in sorted(parts, key=str)}
    total = add(everything)
    if by in OPTIONAL_DIMENSIONS and (rest := _minus(total, add(rows.values()))) != UsageSums():
        rows[None] = rest
    return UsageReport(by, rows, total)


def _minus(sums: UsageSums, taken: UsageSums) -> UsageSums:
    return UsageSums(**{each.name: getattr(sums, each.name) - getattr(taken, each.name) for each in fields(UsageSums)})


def table(shown: UsageReport) -> Table:
    rows = [((NONE if value is None else escape(value),), sums) for value, sums in shown.rows.items()]
    return sums_table((shown.by,), [*rows, (("total",), shown.total)])


def json_lines(shown: UsageReport) -> Iterator[dict[str, Any]]:
    """A line for each row, and the total."""
    for value, sums in shown.rows.items():
        yield {shown.by: value, **asdict(sums)}
    yield {"total": True, **asdict(shown.total)}


def write_csv(shown: UsageReport, out: TextIO) -> None:
    """Rows without the total, which a spreadsheet makes itself; costs as exact dollars and as nano-dollars.

    A name that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    writer = csv.writer(out, lineterminator="\n")
    names = [each.name for each in fields(UsageSums)]
    dollars = [name for name in names if name.endswith("_nanos")]
    writer.writerow([shown.by, *names, *(name.replace("_nanos", "_usd") for name in dollars)])
    for value, sums in shown.rows.items():
        name = "" if value is None else f"'{value}" if value.startswith(FORMULA_STARTS) else value
        writer.writerow(
            [name, *(getattr(sums, each) for each in names), *(usd(getattr(sums, each)) for each in dollars)]
        )


def usd(nanos: int) -> str:
    """Nano-dollars as an exact decimal of dollars, never in scientific notation."""
    return f"{Decimal(nanos).scaleb(-9):f}"
