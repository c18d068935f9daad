"""The rules of the bill as arithmetic: shares, prices, charges, order per document."""

from __future__ import annotations

from dataclasses import fields, replace
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.answers import split
from processor.domain import Price, Result, Usage
from processor.ordering import DocumentOrder
from processor.ports import Run
from processor.usage import cost_nanos
from processor.work import Parcel, Ticket
from tests.support import steps
from tests.support.builders import NOW_MS, a_record, a_request, a_source
from tests.support.steps import Bench, FakeLease

COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=50)


@given(bill=st.integers(0, 10**7), counts=COUNTS)
def test_shares_sum_to_the_bill(bill: int, counts: list[int]) -> None:
    """U1: largest remainder loses and invents no token, and no share is negative."""
    shares = split(bill, counts)
    assert sum(shares) == bill
    assert min(shares) >= 0


@given(counts=COUNTS)
def test_an_exact_count_is_its_own_share(counts: list[int]) -> None:
    """U1: with an exact tokenizer a share is the local count, in any batch."""
    if sum(counts):
        assert split(sum(counts), counts) == counts


def test_ties_go_to_the_lower_position() -> None:
    """U1: of equal remainders the first text gets the odd token."""
    assert split(4, [1, 1, 1]) == [2, 1, 1]


@given(tokens=st.integers(0, 10**9), price=st.integers(0, 10**9))
def test_money_is_rounded_once_half_to_even(tokens: int, price: int) -> None:
    """Nano-dollars are the exact product over a million, rounded half to even."""
    exact = Decimal(tokens) * price / 1_000_000
    assert cost_nanos(tokens, price) == int(exact.quantize(Decimal(1), ROUND_HALF_EVEN))


def test_no_price_is_null_never_zero() -> None:
    """An unpriced token costs null."""
    assert cost_nanos(5, None) is None


async def test_the_time_of_a_charge_is_the_append_time_of_the_source() -> None:
    """A client's or worker's clock can't move a bill."""
    async with Bench() as bench:
        bench.clock.now_s = 9_999.0
        outbox = await bench.handle(a_request(["text"], requested_at_ms=1))
        assert outbox.usage[0].charged_at_ms == outbox.usage[0].source.append_ms


@pytest.mark.parametrize("appended_ms, version, nanos", [(-1, "old", 6), (0, "new", 9), (1, "new", 9)])
async def test_a_new_price_never_rewrites_the_past(
    appended_ms: int, version: str, nanos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is priced by the list in force when it was appended, and says which, however late it is handled."""
    prices = (Price(2_000_000, 0, "old"), Price(3_000_000, NOW_MS, "new"))
    monkeypatch.setattr(steps, "MODEL", replace(steps.MODEL, prices=prices))
    async with Bench() as bench:
        bench.clock.now_s = 86_400.0
        record = a_record(a_request(["one two three"], model="tiny"), append_ms=NOW_MS + appended_ms)
        await bench.worker.on_run(Run(bench.lease, [record]))
        await bench.run_until_idle()
    (usage,) = bench.outbox.usage
    assert (usage.billed.tokens, usage.billed.cost_nanos) == (3, nanos)
    assert (usage.price_version, usage.price_nanos_per_million) == (version, nanos * 1_000_000 // 3)


@given(
    offsets=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12),
    picks=st.randoms(use_true_random=False),
)
def test_whatever_leaves_first_each_chunk_leaves_in_offset_order(offsets: list[tuple[int, int]], picks: object) -> None:
    """Law 8: among equal chunks of a document only the lowest offset is ever ready, and all get their turn."""
    lease, order = FakeLease(), DocumentOrder()
    waiting: list[Parcel] = []
    for offset, (document, chunk) in enumerate(offsets):
        parcel = Parcel(Ticket(lease, a_source(offset), 1, 0.0), chunk_id=f"c{chunk}")
        order.enter(("t", None, f"d{document}"), [parcel])
        waiting.append(parcel)
    left: dict[tuple[object, object], int] = {}
    while waiting:
        ready = [parcel for parcel in waiting if order.ready(parcel)]
        assert ready, "nobody may go: a deadlock"
        parcel = picks.choice(ready)  # type: ignore[attr-defined]
        place = (parcel.document, parcel.chunk_id)
        assert left.get(place, -1) < parcel.ticket.source.offset
        left[place] = parcel.ticket.source.offset
        order.leave([parcel])
        waiting.remove(parcel)
    assert len(order) == 0


async def test_results_and_usage_are_made_whole() -> None:
    """Both are made by assignments, and no field is left out, whatever the outcome."""
    async with Bench() as bench:
        outbox = await bench.handle(a_request(["fine", " "]))
        for kind, made in (Result, outbox.results), (Usage, outbox.usage):
            assert made
            assert all(hasattr(each, field.name) for each in made for field in fields(kind))
