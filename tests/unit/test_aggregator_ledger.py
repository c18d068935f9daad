"""The aggregator's ledger of calls: what was billed, what of it is charged, and the class of all that is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters.avro_records import MAX_CALL_TOKENS
from processor.domain import MAX_PRICE, CallKind, CallOutcome, Part
from processor.ports import Destination
from tests.support.aggregation import HORIZON_MS, TOPIC_OF, History, a_bench, a_bill, a_charge, charges
from tests.support.builders import a_call, a_usage
from tests.support.lives import NEAR, Life, live, lives


@pytest.mark.parametrize("order", [("calls", "usage"), ("usage", "calls")])
async def test_each_residual_has_its_class(order: tuple[str, str]) -> None:
    """Bill = attributed + waste + uncharged, and what has no receipt in time lies between 0 and its estimate."""
    with a_bench() as bench:
        log = bench.log
        a_bill(log, "charged")
        a_charge(log, "charged", number=1)
        a_bill(log, "partly charged", tokens=7)
        a_charge(log, "partly charged", number=2, tokens=2)
        a_bill(log, "wasted", tokens=11, outcome=CallOutcome.INVALID)
        a_bill(log, "refused", tokens=0, outcome=CallOutcome.FAILED)
        a_bill(log, "unanswered", tokens=13, outcome=None)
        a_bill(log, "recovered", tokens=17, outcome=None)
        a_charge(log, "recovered", number=3, tokens=16)
        a_charge(log, "elsewhere", number=4, tokens=19)
        folded = [TOPIC_OF[name] for name in order]
        early = await bench.run(order=folded)
        log.now_ms += 2_000
        late = await bench.run(order=folded)

    assert early is not None
    assert late is not None
    assert (early.in_flight_attempts, early.sums.unconfirmed_attempts) == (2, 0)
    assert late.in_flight_attempts == 0
    assert late.sums._asdict() == {
        "attempts": 6,
        "billed_tokens": 3 + 7 + 11,
        "attributed_tokens": 3 + 2 + 16,
        "waste_attempts": 1,
        "waste_tokens": 11,
        "waste_cost_nanos": 11,
        "uncharged_attempts": 1,
        "uncharged_tokens": 5,
        "uncharged_cost_nanos": 5,
        "unconfirmed_attempts": 2,
        "unconfirmed_max_tokens": 13 + 1,
        "unconfirmed_max_cost_nanos": 13 + 1,
        "unpriced_tokens": 0,
        "over_attributed_attempts": 0,
        "over_attributed_tokens": 0,
        "unmatched_tokens": 19,
        "recovered_attempts": 1,
        "recovered_tokens": 16,
    }
    assert late.residual_tokens == 11 + 5 + 14


async def test_no_price_and_bill_of_two_records_end_the_aggregator() -> None:
    """An attempt has its price from one record and its bill from another: each must be one that any sum can hold."""
    greatest: dict[str, Any] = {"price_nanos_per_million": MAX_PRICE, "estimated_tokens": 0}
    bill: dict[str, Any] = {"kind": CallKind.RECEIPT, "billed_tokens": MAX_CALL_TOKENS, "price_nanos_per_million": None}
    with a_bench() as bench:
        for attempt, price, tokens in [("a", 0, 0), ("b", 1, 0), ("c", 0, 1)]:
            intent = greatest | {"price_nanos_per_million": MAX_PRICE + price, "attempt_id": attempt}
            bench.log.append(Destination("calls", a_call(**intent)))
            receipt = bill | {"billed_tokens": MAX_CALL_TOKENS + tokens, "attempt_id": attempt}
            bench.log.append(Destination("calls", a_call(**receipt)))
        summary = await bench.run()
        assert summary is not None
        assert summary.sums.uncharged_cost_nanos == MAX_CALL_TOKENS * MAX_PRICE // 10**6
        assert len(bench.log.all_of(TOPIC_OF["dlq"])) == 2


async def test_an_attempt_that_charged_more_than_its_bill_raises_the_alarm() -> None:
    """Over-attribution is counted, once."""
    with a_bench() as bench:
        a_bill(bench.log, "a", tokens=5)
        a_charge(bench.log, "a", number=1, tokens=3)
        assert (await bench.run()).sums.over_attributed_attempts == 0  # type: ignore[union-attr]
        a_charge(bench.log, "a", number=2, tokens=3)
        summary = await bench.run()

    assert summary is not None
    assert (summary.sums.over_attributed_attempts, summary.sums.over_attributed_tokens) == (1, 1)
    assert bench.counts["ledger_over_attributed_attempts", ""] == 1


@settings(max_examples=60, deadline=None)
@given(
    past=lives(NEAR),
    bills=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.sampled_from(CallOutcome))),
)
async def test_the_ledger_is_that_of_first_copies_and_receipts_across_crashes(
    past: list[Life], bills: list[tuple[int, int, int, CallOutcome]]
) -> None:
    """U6: attributed tokens are the parts of first copies, and the running sums equal a recomputation."""
    with a_bench() as bench:
        history: History = []
        billed: dict[str, tuple[int, CallOutcome]] = {}
        for payer, number, attempt, outcome in bills:
            name = f"a{payer}{number}{attempt}"
            tokens = 0 if outcome is CallOutcome.FAILED else 100
            a_bill(bench.log, name, tokens=tokens, outcome=outcome)
            billed.setdefault(name, (tokens, outcome))
        await live(bench, history, past)
        summary = await bench.run()

    attributed: dict[str, int] = {}
    for _, usage in charges(history):
        for part in usage.parts:
            attributed[part.attempt_id] = attributed.get(part.attempt_id, 0) + part.tokens
    residuals = {name: (tokens - attributed.get(name, 0), outcome) for name, (tokens, outcome) in billed.items()}
    assert summary is not None
    assert summary.sums.attempts == len(billed)
    assert summary.sums.billed_tokens == sum(tokens for tokens, _ in billed.values())
    assert summary.sums.attributed_tokens == sum(attributed.get(name, 0) for name in billed)
    assert summary.sums.unmatched_tokens == sum(n for name, n in attributed.items() if name not in billed)
    assert summary.sums.waste_tokens == sum(
        n for n, outcome in residuals.values() if n > 0 and outcome is CallOutcome.INVALID
    )
    assert summary.sums.uncharged_tokens == sum(
        n for n, outcome in residuals.values() if n > 0 and outcome is not CallOutcome.INVALID
    )
    assert summary.sums.over_attributed_tokens == -sum(n for n, _ in residuals.values() if n < 0)


async def test_a_late_charge_stays_uncharged() -> None:
    """A quarantined charge is attributed to nobody, so its attempt keeps its residual."""
    with a_bench() as bench:
        a_bill(bench.log, "a")
        usage = a_usage(parts=(Part("a", 3),), charged_at_ms=bench.log.now_ms - HORIZON_MS - 1)
        bench.log.append(Destination("usage", usage))
        summary = await bench.run()

        assert summary is not None
        assert (summary.sums.attributed_tokens, summary.sums.uncharged_tokens) == (0, 3)
        assert await bench.log.totals() == {}
