"""The audit's ledger: each class of residual and breach, seeded on purpose, is found and classed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.cli.audit import FOLDED
from processor.domain import MAX_PRICE, Amounts, CallKind, CallOutcome, TokenType
from processor.findings import Breach, Line, Residual
from processor.identity import refusal_key, request_id
from processor.invoice import DayBill
from processor.ports import Destination
from tests.support.aggregation import (
    DAY_MS,
    HORIZON_MS,
    TOPICS,
    MemoryLog,
    a_bench,
)
from tests.support.builders import NOW_MS, a_call, a_request
from tests.support.ledgers import ONE, PRICE, THREE, TWO, a_ledger, audited, call, charge, receive


async def test_a_bill_that_is_charged_to_the_token_leaves_nothing() -> None:
    """Where every share is charged, billed equals attributed, in money too, and there is no finding."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    charge(log, ONE, ("a", 3))
    charge(log, TWO, ("a", 4))
    charge(log, TWO, ("a", 4))
    ledger, classes = await a_ledger(log)
    assert classes == {}
    assert ledger.billed == ledger.attributed == Line(attempts=1, tokens=7, cost_nanos=140)


async def test_a_paid_answer_that_failed_verification_is_waste() -> None:
    """All of its bill, priced."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3, CallOutcome.INVALID)
    ledger, classes = await a_ledger(log)
    assert classes == {"waste": 3}
    assert ledger.residuals[Residual.WASTE].cost_nanos == 60


async def test_what_was_embedded_again_is_rework() -> None:
    """Its request is charged, from another attempt; the shares beside it stay attributed."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    call(log, "b", (TWO, 4))
    receive(log, "b", 4)
    charge(log, ONE, ("a", 3))
    charge(log, TWO, ("b", 4))
    ledger, classes = await a_ledger(log)
    assert classes == {"rework": 4}
    assert ledger.attributed.tokens == 7


async def test_what_no_request_was_charged_for_yet_is_unclaimed() -> None:
    """The share of the request that has no charge, and no more."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4), (THREE, 5))
    receive(log, "a", 12)
    charge(log, ONE, ("a", 3))
    charge(log, THREE, ("a", 5))
    assert (await a_ledger(log))[1] == {"unclaimed": 4}


async def test_what_was_paid_for_a_request_that_is_refused_since_is_rework() -> None:
    """Its worker died, the cache was lost, and delivered again it was past its deadline: no charge is waited for."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    charge(log, ONE, failed_texts=1, billed=Amounts(0, 0, 0, 0), event_key=refusal_key(request_id(ONE)))
    assert (await a_ledger(log))[1] == {"rework": 3, "unclaimed": 4}


async def test_one_attempt_is_split_into_rework_late_and_unclaimed() -> None:
    """Each share goes by its own request, whatever the bill differs from the local counts."""
    log = MemoryLog()
    four = a_request(correlation_id="four")
    call(log, "a", (ONE, 3), (TWO, 4), (THREE, 5), (four, 8))
    receive(log, "a", 40)
    call(log, "b", (THREE, 5))
    receive(log, "b", 5)
    charge(log, ONE, ("a", 6), charged_at_ms=log.now_ms - HORIZON_MS - 1)
    charge(log, THREE, ("b", 5))
    charge(log, four, ("a", 16))
    books = await audited(log)
    assert books.usage.late == Line(attempts=1, tokens=6, cost_nanos=120)
    _, classes = await a_ledger(log)
    assert classes == {"late": 6, "unclaimed": 8, "rework": 10}


async def test_a_share_that_was_charged_on_time_is_not_late_for_a_late_copy() -> None:
    """Copies that stand far apart are charges of their own, and the later one may be late."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    charge(log, ONE, ("a", 3))
    charged_at_ms = log.now_ms
    log.now_ms += 2 * HORIZON_MS + 1
    charge(log, ONE, ("a", 3), charged_at_ms=charged_at_ms)
    assert (await audited(log)).usage.late.attempts == 1
    assert (await a_ledger(log))[1] == {}


async def test_a_share_that_is_charged_on_time_in_the_end_is_not_late() -> None:
    """The same request sent again after a long time is charged anew."""
    log = MemoryLog()
    charge(log, ONE, charged_at_ms=log.now_ms - HORIZON_MS - 1)
    log.now_ms += 2 * HORIZON_MS + 1
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    charge(log, ONE, ("a", 3))
    assert (await a_ledger(log))[1] == {}


async def test_an_attempt_without_receipt_is_in_flight_and_then_unconfirmed() -> None:
    """Up to its `confirm_by` and beyond it; between 0 and its estimate."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), confirm_by_ms=log.now_ms)
    assert (await a_ledger(log))[1] == {"in_flight": 3}
    assert (await a_ledger(log, now_ms=log.now_ms + 1))[1] == {"unconfirmed": 3}


async def test_an_attempt_without_receipt_that_a_charge_names_is_recovered() -> None:
    """What the charge names was billed; the rest of the estimate is unconfirmed."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4), confirm_by_ms=log.now_ms)
    charge(log, TWO, ("a", 4))
    ledger, classes = await a_ledger(log, now_ms=log.now_ms + 1)
    assert classes == {"unconfirmed": 3}
    assert ledger.recovered == Line(attempts=1, tokens=4, cost_nanos=80)


async def test_an_answered_error_is_billed_nothing() -> None:
    """It is counted, and is no finding."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 0, CallOutcome.FAILED)
    ledger, classes = await a_ledger(log)
    assert (ledger.failed_attempts, ledger.billed.tokens, classes) == (1, 0, {})


@pytest.mark.parametrize("charged", [{"one": 9}, {"one": 5, "two": 4}, {"two": 7}])
async def test_more_charged_than_billed_is_a_breach(charged: dict[str, int]) -> None:
    """Of the attempt as a whole, and of the share of one request while another one's share is free."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    for name, tokens in charged.items():
        charge(log, a_request(correlation_id=name), ("a", tokens))
    ledger, classes = await a_ledger(log)
    assert classes["over_attributed"] > 0
    assert ledger.breaches[Breach.OVER_ATTRIBUTED].attempts == 1


async def test_a_charge_without_an_intent_is_unmatched() -> None:
    """Its tokens were never asked for: nobody can have been billed for them."""
    log = MemoryLog()
    charge(log, ONE, ("nobody", 3))
    assert (await a_ledger(log))[1] == {"unmatched": 3}


async def test_a_receipt_without_an_intent_is_unmatched() -> None:
    """The intent is awaited before the call, so that there is none without."""
    log = MemoryLog()
    receive(log, "a", 3)
    charge(log, ONE, ("a", 3))
    assert (await a_ledger(log))[1] == {"unmatched": 3}


async def test_parts_that_are_not_the_bill_are_a_breach() -> None:
    """Of the charge; its request is named."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    charge(log, ONE, ("a", 3), billed=Amounts(1, 5, 5, 100))
    ledger, classes = await a_ledger(log)
    assert classes == {"parts_differ": 2}
    assert [finding.request_id for finding in ledger.findings] == [request_id(ONE)]


@pytest.mark.parametrize(
    "said",
    [
        {"billed": Amounts(1, 3, 5, 61)},
        {"billed": Amounts(1, 3, 5, None)},
        {"saved": Amounts(1, 3, 5, 0)},
        {"price_nanos_per_million": None},
    ],
    ids=str,
)
async def test_a_cost_that_is_not_tokens_times_price_is_a_breach(said: dict[str, Any]) -> None:
    """Billed or saved, by a nano-dollar, or without a price: a total of wrong costs is equal to its recomputation."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    charge(log, ONE, ("a", 3), **said)
    assert (await a_ledger(log))[1] == {"cost_differs": 3}


async def test_what_may_be_on_an_invoice_is_what_the_ledger_says_of_each_deployment() -> None:
    """Receipts for certain, what charges name without a receipt too, and the rest of an estimate perhaps."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    call(log, "b", (TWO, 4), (THREE, 5), provider="azure-west")
    charge(log, TWO, ("b", 4))
    day = f"{datetime.fromtimestamp(log.now_ms / 1000, UTC):%Y-%m-%d}"
    for provider, low, high in ((None, 7, 12), ("openai", 3, 3), ("azure-west", 4, 9), ("nobody", 0, 0)):
        (line, _) = (await audited(log, provider=provider)).bills.check({day: DayBill(low)})
        assert (line.known.low_tokens, line.known.high_tokens, line.inside) == (low, high, True)
        assert line.known.high_micronanos == high * PRICE


async def test_copies_of_intents_and_receipts_count_once() -> None:
    """A send that was tried again may have left both twice; the first ones stand."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    call(log, "a", (ONE, 9), price_nanos_per_million=1)
    receive(log, "a", 3)
    receive(log, "a", 4)
    call(log, "a", (ONE, 3))
    charge(log, ONE, ("a", 3))
    ledger, classes = await a_ledger(log)
    assert (ledger.billed, classes) == (Line(attempts=1, tokens=3, cost_nanos=60), {})


async def test_residuals_without_a_price_are_summed_apart() -> None:
    """No price is no cost of zero."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), price_nanos_per_million=None, confirm_by_ms=log.now_ms)
    ledger, _ = await a_ledger(log, now_ms=log.now_ms + 1)
    assert ledger.residuals[Residual.UNCONFIRMED] == Line(attempts=1, tokens=3, unpriced_tokens=3)


async def test_usage_of_other_services_is_passed_over_or_totalled_by_setting() -> None:
    """Neither way do its parts stand in our ledger."""
    log = MemoryLog()
    charge(log, ONE, ("theirs", 3), token_type=TokenType.OUTPUT)
    books = await audited(log)
    assert (books.usage.others, books.usage.charges, books.ledger.findings) == (1, 0, [])
    books = await audited(log, token_types=None)
    assert (books.usage.others, books.usage.charges, books.ledger.findings) == (0, 1, [])


async def test_events_of_other_services_are_told_apart_by_their_own_keys() -> None:
    """A request's input and output are two charges, each with its copies."""
    log = MemoryLog()
    for key in ("in", "out", "out"):
        charge(log, ONE, token_type=TokenType.OUTPUT, event_key=key)
    books = await audited(log, token_types=None)
    assert (books.usage.charges, books.usage.duplicates) == (2, 1)


async def test_charges_and_receipts_whose_intents_have_expired_are_no_breach() -> None:
    """Where the log of calls has lost its head, only what lies well after that must have its intent."""
    log = MemoryLog()
    log.partitions[TOPICS.calls] = 1
    call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    log.expire(TOPICS.calls, 0, 1)
    charge(log, ONE, ("a", 3))
    charge(log, TWO, ("b", 3))
    assert (await a_ledger(log))[1] == {}
    log.now_ms += HORIZON_MS + DAY_MS
    charge(log, THREE, ("c", 3))
    receive(log, "d", 2)
    ledger = (await audited(log)).ledger
    assert [(finding.kind, finding.attempt_id) for finding in ledger.findings] == [
        ("expired", "d"),
        ("unmatched", "c"),
        ("unmatched", "d"),
    ]


async def test_attempts_whose_charges_have_expired_are_not_called_unclaimed() -> None:
    """Where the log of usage has lost its head, a share of an old attempt may be charged there."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    charge(log, ONE, ("a", 3))
    charge(log, TWO, ("a", 4))
    (record, *_) = log.all_of(TOPICS.usage)
    log.expire(TOPICS.usage, record.source.partition, 1)
    assert (await a_ledger(log))[1] == {"expired": 3}


async def test_no_word_or_number_in_the_ledger_ends_the_aggregator() -> None:
    """A newer worker's kinds and outcomes are folded alike by both; what no sum can hold is a dead letter."""
    with a_bench() as bench:
        log = bench.log
        call(log, "a", (ONE, 3))
        odd: dict[str, Any] = {"attempt_id": "a", "items": (), "billed_tokens": 5}
        log.append(Destination("calls", a_call(cast(CallKind, "correction"), **odd)))
        log.append(Destination("calls", a_call(CallKind.RECEIPT, outcome=cast(CallOutcome, "partial"), **odd)))
        books = await audited(log)
        for number in ({"estimated_tokens": 2**62}, {"at_ms": 2**62}):
            call(log, f"b{number}", (ONE, 3), **number)
        call(log, "c", (ONE, 1), price_nanos_per_million=MAX_PRICE + 1)
        call(log, "d", estimated_tokens=0, price_nanos_per_million=2**62)
        log.append(Destination("calls", a_call(CallKind.RECEIPT, attempt_id="d", items=(), billed_tokens=10**15)))
        summary = await bench.run()
        assert summary is not None
        assert (summary.sums.billed_tokens, summary.sums.uncharged_tokens) == (5, 5)
        assert {name: summary.sums._asdict()[name] for name in FOLDED} == {
            name: books.as_folded[name] for name in FOLDED
        }
        assert len(log.all_of("embedding-requests-dlq")) == 5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
async def test_the_ledger_is_the_aggregators(data: st.DataObject) -> None:
    """Whatever intents, receipts and charges there are: each sum that both have is the same."""
    with a_bench() as bench:
        log = bench.log
        requests = [a_request(correlation_id=f"r{i}") for i in range(4)]
        for i in range(data.draw(st.integers(0, 5))):
            shares = data.draw(st.lists(st.tuples(st.sampled_from(requests), st.integers(0, 9)), max_size=4))
            price = data.draw(st.sampled_from([None, PRICE, 1]))
            if data.draw(st.booleans()):
                call(log, f"a{i}", *shares, confirm_by_ms=NOW_MS + i, price_nanos_per_million=price)
            if data.draw(st.booleans()):
                receive(log, f"a{i}", data.draw(st.integers(0, 40)), data.draw(st.sampled_from(CallOutcome)))
        for request in data.draw(st.lists(st.sampled_from(requests))):
            parts = data.draw(st.dictionaries(st.sampled_from([f"a{i}" for i in range(5)]), st.integers(0, 9)))
            charge(log, request, *parts.items(), charged_at_ms=NOW_MS - data.draw(st.integers(0, 2)) * HORIZON_MS)
        log.now_ms += 2
        summary = await bench.run()
        assert summary is not None
        books = await audited(log)
        folded = summary.sums._asdict()
        assert {name: folded[name] for name in FOLDED} == {name: books.as_folded[name] for name in FOLDED}
        assert books.ledger.balanced
