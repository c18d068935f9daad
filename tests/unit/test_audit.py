"""The audit: what must add up does, and each kind of difference, residual and breach is found and classed."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import UsageSums, UsageTotal
from processor.audit import Audit
from processor.cli.audit import FOLDED, read_books
from processor.domain import Amounts, CallItem, CallKind, CallOutcome, Part, Request, TokenType
from processor.findings import Breach, LedgerCheck, Line, Residual
from processor.identity import request_id
from processor.ports import Destination
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
from tests.support.builders import NOW_MS, a_call, a_request, a_usage

EMBEDDING = frozenset({"embedding"})


async def audited(log: MemoryLog, **options: Any) -> Audit:
    """The finished audit of a log as it stands."""
    wanted: dict[str, Any] = {"horizon_ms": HORIZON_MS, "now_ms": log.now_ms, "token_types": EMBEDDING}
    books, unread, _ = await read_books(log, log.codec, TOPICS, **wanted | options)
    assert unread == []
    return books


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
    """While nothing has expired each published bucket equals the recomputation, cut at any moment or not."""
    with a_bench() as bench:
        history: History = []
        append(bench.log, history, coming)
        await bench.run(crash_at=crash_at)
        check = (await audited(bench.log)).totals()
        assert (check.differences, check.proven) == ([], check.buckets)
        append(bench.log, history, later)
        await bench.run()
        books = await audited(bench.log)
        check = books.totals()
        assert (check.differences, check.proven, check.equal) == ([], check.buckets, check.buckets)
        assert books.usage.not_folded == 0
        assert books.usage.events == len(history)


@settings(max_examples=40, deadline=None)
@given(coming=EVENTS, kept=st.integers(0, 14))
async def test_no_expired_head_makes_a_difference(coming: list[Event], kept: int) -> None:
    """Whatever retention removes of what it may, totals that were right are never called wrong."""
    with a_bench() as bench:
        history: History = []
        append(bench.log, history, coming)
        await bench.run()
        for partition in range(PARTITIONS):
            records = bench.log.after(TOPICS.usage, partition, 0)
            old = [r for r in records if r.source.append_ms < bench.log.now_ms - 2 * HORIZON_MS - 30 * DAY_MS]
            bench.log.expire(TOPICS.usage, partition, len(old[:kept]))
        check = (await audited(bench.log)).totals()
        assert check.differences == []
        assert check.proven + check.not_provable == check.buckets


# --- the ledger --------------------------------------------------------------------------------------------

ONE, TWO, THREE = (a_request(correlation_id=name) for name in ("one", "two", "three"))
PRICE = 20_000_000


def call(log: MemoryLog, attempt_id: str, *shares: tuple[Request, int], **intent: Any) -> None:
    """An intent of one item per request."""
    items = tuple(CallItem(request_id(request), 0, "acme", tokens) for request, tokens in shares)
    fields: dict[str, Any] = {
        "attempt_id": attempt_id,
        "items": items,
        "estimated_tokens": sum(tokens for _, tokens in shares),
        "confirm_by_ms": log.now_ms + 60_000,
        "price_nanos_per_million": PRICE,
    }
    log.append(Destination("calls", a_call(**fields | intent)))


def receive(log: MemoryLog, attempt_id: str, billed: int, outcome: CallOutcome = CallOutcome.OK) -> None:
    """Its receipt."""
    receipt = a_call(
        CallKind.RECEIPT,
        attempt_id=attempt_id,
        outcome=outcome,
        billed_tokens=billed,
        price_nanos_per_million=PRICE,
        items=(),
    )
    log.append(Destination("calls", receipt))


def charge(log: MemoryLog, request: Request, *parts: tuple[str, int], **overrides: Any) -> None:
    tokens = sum(tokens for _, tokens in parts)
    fields: dict[str, Any] = {
        "billed": Amounts(1, tokens, 5, 20 * tokens),
        "parts": tuple(Part(*part) for part in parts),
        "charged_at_ms": log.now_ms,
    }
    log.append(Destination("usage", a_usage(request, **fields | overrides)))


async def a_ledger(log: MemoryLog, **options: Any) -> tuple[LedgerCheck, dict[str, int]]:
    """The ledger, and the tokens of each class that is not empty."""
    ledger = (await audited(log, **options)).ledger
    assert ledger.balanced
    lines = [*ledger.residuals.items(), *ledger.breaches.items()]
    classes = {kind.value: line.tokens for kind, line in lines if line.attempts}
    assert sorted((f.kind.value, f.tokens) for f in ledger.findings) == sorted(classes.items())
    return ledger, classes


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


async def test_copies_of_intents_and_receipts_count_once() -> None:
    """A send that was tried again may have left both twice."""
    log = MemoryLog()
    for _ in range(2):
        call(log, "a", (ONE, 3))
    receive(log, "a", 3)
    receive(log, "a", 3)
    call(log, "a", (ONE, 3))
    charge(log, ONE, ("a", 3))
    ledger, classes = await a_ledger(log)
    assert (ledger.billed.attempts, classes) == (1, {})


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


# --- the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heading, words", [("Residuals", Residual), ("Breaches", Breach)])
def test_each_class_is_explained(heading: str, words: type[StrEnum]) -> None:
    """docs/audit.md has the words of the code, in its order, and no others."""
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text(encoding="utf-8")
    rows = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == [str(word) for word in words]
