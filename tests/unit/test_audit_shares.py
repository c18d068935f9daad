"""The audit of shares: what charges name of a call is what its texts came to, each request once."""

from __future__ import annotations

import pytest

from processor.domain import CallOutcome
from processor.findings import Breach, Line
from tests.support.aggregation import HORIZON_MS, TOPICS, MemoryLog
from tests.support.builders import a_request
from tests.support.ledgers import ONE, TWO, a_ledger, audited, call, charge, receive


@pytest.mark.parametrize(
    "billed, charged, odd",
    [
        (7, {"one": 3, "two": 4}, 0),
        (14, {"one": 6, "two": 8}, 0),
        (7, {"one": 3}, 0),
        (7, {"one": 2, "two": 4}, 2),
        (8, {"one": 3, "two": 4}, 4),
        (7, {"one": 3, "three": 4}, 4),
    ],
    ids=str,
)
async def test_a_charge_that_is_no_share_of_the_bill_is_a_breach(
    billed: int, charged: dict[str, int], odd: int
) -> None:
    """A token too few, a receipt of one too many, and the share of a text that another request sent."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", billed)
    for name, tokens in charged.items():
        charge(log, a_request(correlation_id=name), ("a", tokens))
    assert (await a_ledger(log))[1].get("share_differs", 0) == odd


@pytest.mark.parametrize("charged, odd", [(0, 0), (3, 0), (5, 0), (8, 0), (4, 4), (7, 7)])
async def test_a_request_may_be_charged_for_some_of_its_texts_in_a_call(charged: int, odd: int) -> None:
    """Whole texts: the others were found elsewhere when it was done again."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (ONE, 5))
    receive(log, "a", 8)
    charge(log, ONE, ("a", charged))
    assert (await a_ledger(log))[1].get("share_differs", 0) == odd


async def test_a_charge_to_another_payer_than_the_intent_names_is_a_breach() -> None:
    """Whoever changed it: the bill of a call adds up, and the wrong one pays."""
    log = MemoryLog()
    call(log, "a", (ONE, 3), (TWO, 4))
    receive(log, "a", 7)
    charge(log, ONE, ("a", 3), payer_id="globex")
    charge(log, TWO, ("a", 4))
    assert (await a_ledger(log))[1] == {"share_differs": 3}


@pytest.mark.parametrize("outcome", [CallOutcome.INVALID, CallOutcome.FAILED])
async def test_a_charge_of_a_call_that_gave_nothing_is_a_breach(outcome: CallOutcome) -> None:
    """What failed verification is waste, whatever was billed for it."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    receive(log, "a", 3, outcome)
    charge(log, ONE, ("a", 3))
    assert (await a_ledger(log))[1]["share_differs"] == 3


async def test_a_stranger_to_a_call_without_receipt_is_a_breach() -> None:
    """Its bill is not known, its requests are."""
    log = MemoryLog()
    call(log, "a", (ONE, 30), confirm_by_ms=log.now_ms)
    charge(log, TWO, ("a", 4))
    assert (await a_ledger(log))[1] == {"in_flight": 26, "share_differs": 4}


async def test_made_up_amounts_of_any_size_are_judged_at_once() -> None:
    """A foreign writer's ledger: beyond what calls have, the shares of a request are not added up bit by bit."""
    log = MemoryLog()
    call(log, "a", (ONE, 10**9), (ONE, 10**9))
    receive(log, "a", 2 * 10**9)
    charge(log, ONE, ("a", 10**9 - 10**8))
    assert (await a_ledger(log))[1] == {"rework": 10**9 + 10**8}


@pytest.mark.parametrize("billed", [0, 3])
async def test_a_charge_in_a_second_partition_is_a_breach(billed: int) -> None:
    """Copies are told within one: whoever put it there made a second charge of it, of saved tokens too."""
    log = MemoryLog()
    call(log, "a", (ONE, 3))
    charge(log, ONE, ("a", billed))
    (record,) = log.all_of(TOPICS.usage)
    log.append_bytes(TOPICS.usage, 1 - record.source.partition, record.value, key=record.key)
    ledger = (await audited(log)).ledger
    assert ledger.breaches[Breach.CHARGED_TWICE] == Line(attempts=1, tokens=billed, cost_nanos=20 * billed)


async def test_a_charge_in_a_second_partition_is_one_of_its_own_once_no_copy_can_be_meant() -> None:
    """As in one partition: the same request sent again after two horizons, to a topic that has grown meanwhile."""
    log = MemoryLog()
    charge(log, ONE)
    (record,) = log.all_of(TOPICS.usage)
    log.now_ms += 2 * HORIZON_MS + 1
    log.append_bytes(TOPICS.usage, 1 - record.source.partition, record.value, key=record.key)
    books = await audited(log)
    assert (books.usage.charges, books.ledger.breaches[Breach.CHARGED_TWICE].attempts) == (2, 0)
