"""A provider's invoice by UTC day, held against the ledger: an interval, since what nobody confirmed may be billed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal

NANOS = 10**9
MILLION = 10**6
DAY_MS, EPOCH_DAY = 86_400_000, date(1970, 1, 1).toordinal()
FLOAT_NOISE = Decimal("1e-12")
"""Of an amount: by more than so much a sum of floating-point numbers is not off. It hides no token."""
CLOCKS_APART_MS = 60_000
"""How far a provider's clock may stand from the brokers': a call so near to midnight may be billed on either day."""


@dataclass(frozen=True, slots=True)
class DayBill:
    """What an invoice says of a UTC day, or of several; None: nothing. `amount` is in dollars.

    `rounding` is how far the amount may lie from what it was rounded from.
    """

    tokens: int | None = None
    amount: Decimal | None = None
    rounding: Decimal = Decimal(0)

    @classmethod
    def of(cls, tokens: int | None, amount: Decimal | None) -> DayBill:
        """A row as it is printed: its amount may be off by half a unit of its last digit, half a dollar at most."""
        if amount is None:
            return cls(tokens)
        exponent = amount.as_tuple().exponent
        assert isinstance(exponent, int), "the amount is finite"
        return cls(tokens, amount, max(Decimal((0, (5,), min(exponent, 0) - 1)), amount * FLOAT_NOISE))

    def __add__(self, other: DayBill) -> DayBill:
        tokens = [each.tokens for each in (self, other) if each.tokens is not None]
        amounts = [each.amount for each in (self, other) if each.amount is not None]
        return DayBill(
            sum(tokens) if tokens else None,
            sum(amounts, Decimal(0)) if amounts else None,
            self.rounding + other.rounding,
        )


@dataclass(slots=True)
class Interval:
    """What may have been billed. `*_micronanos` are tokens x price, a million of them a nano-dollar: exact.

    `unpriced_tokens` (of `high_tokens`) have no price: with some, the money has no upper bound.
    """

    low_tokens: int = 0
    high_tokens: int = 0
    low_micronanos: int = 0
    high_micronanos: int = 0
    unpriced_tokens: int = 0

    def add(self, low_tokens: int, high_tokens: int, price: int | None) -> None:
        self.low_tokens += low_tokens
        self.high_tokens += high_tokens
        if price is None:
            self.unpriced_tokens += high_tokens
        else:
            self.low_micronanos += low_tokens * price
            self.high_micronanos += high_tokens * price


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """One day of an invoice, or its total, beside what the ledger knows. `provable`: the log of calls reaches back."""

    day: str
    billed: DayBill
    known: Interval
    provable: bool

    @property
    def tokens_inside(self) -> bool:
        tokens = self.billed.tokens
        return tokens is None or self.known.low_tokens <= tokens <= self.known.high_tokens

    @property
    def amount_inside(self) -> bool:
        """An amount stands for what is rounded to it."""
        if self.billed.amount is None:
            return True
        low = Decimal(self.known.low_micronanos) / (MILLION * NANOS) - self.billed.rounding
        high = Decimal(self.known.high_micronanos) / (MILLION * NANOS) + self.billed.rounding
        return low <= self.billed.amount and (self.known.unpriced_tokens > 0 or self.billed.amount <= high)

    @property
    def inside(self) -> bool:
        """Whether it may be right, as far as anybody can tell."""
        return not self.provable or (self.tokens_inside and self.amount_inside)


class Bills:
    """What the ledger says that a provider billed, by the first and last UTC day on which it may have.

    `provider`: only calls of that deployment. Before `known_from_ms` the log of calls has lost records.
    """

    def __init__(self, provider: str | None, *, known_from_ms: int) -> None:
        self._provider = provider
        self._known_from_ms = known_from_ms
        self._spans: dict[tuple[int, int], Interval] = {}
        self.providers: set[str] = set()
        """Everybody that the ledger names."""

    def take(
        self, provider: str, begun_ms: int, ended_ms: int, low_tokens: int, high_tokens: int, price: int | None
    ) -> None:
        """A call that began and ended then, whose bill lies between these."""
        self.providers.add(provider)
        if self._provider in (None, provider) and high_tokens:
            span = _day_of(begun_ms - CLOCKS_APART_MS), _day_of(ended_ms + CLOCKS_APART_MS)
            self._spans.setdefault(span, Interval()).add(low_tokens, high_tokens, price)

    @property
    def stranger(self) -> str:
        """What is odd about the provider that was asked for: no call is its. Nothing, else."""
        if self._provider is None or self._provider in self.providers:
            return ""
        return f"no call is of {self._provider}: the ledger names {', '.join(sorted(self.providers)) or 'nobody'}"

    def check(self, invoice: Mapping[str, DayBill]) -> Iterator[InvoiceLine]:
        """A line for each day from the first to the last one of the invoice, and for all together.

        A day between that the invoice leaves out is one of nothing. What a day does not say has no total.
        """
        if not invoice:
            return
        days = {_ordinal(day): bill for day, bill in invoice.items()}
        whole = sum(days.values(), DayBill())
        nothing = DayBill(
            None if whole.tokens is None else 0,
            None if whole.amount is None else Decimal(0),
            max(bill.rounding for bill in days.values()),
        )
        if any(bill.tokens is None for bill in days.values()):
            whole = replace(whole, tokens=None)
        if any(bill.amount is None for bill in days.values()):
            whole = replace(whole, amount=None)
        first, last = min(days), max(days)
        for day in range(first, last + 1):
            yield self._line(date.fromordinal(day).isoformat(), days.get(day, nothing), day, day)
        yield self._line("total", whole, first, last)

    def _line(self, name: str, billed: DayBill, first: int, last: int) -> InvoiceLine:
        known = Interval()
        for (begun, ended), span in self._spans.items():
            if first <= ended and begun <= last:
                known.high_tokens += span.high_tokens
                known.high_micronanos += span.high_micronanos
                known.unpriced_tokens += span.unpriced_tokens
                if first <= begun and ended <= last:
                    known.low_tokens += span.low_tokens
                    known.low_micronanos += span.low_micronanos
        return InvoiceLine(name, billed, known, provable=_begins_ms(first) >= self._known_from_ms)


def _day_of(ms: int) -> int:
    return EPOCH_DAY + ms // DAY_MS


def _ordinal(day: str) -> int:
    return date.fromisoformat(day).toordinal()


def _begins_ms(day: int) -> int:
    return (day - EPOCH_DAY) * DAY_MS
