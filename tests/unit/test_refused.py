"""A request that was refused and is sent again: what it gets then is paid for, and the refusal itself costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from uuid import UUID, uuid5

import pytest

from processor.accounts import Budget, BudgetKey, BudgetState, UsageSums
from processor.domain import Request
from processor.ports import Destination
from tests.support.aggregation import a_bench
from tests.support.builders import NOW_MS, a_request
from tests.support.steps import Bench, MemoryCache, MemoryOutbox

TEXTS = ["one two three", "four five"]


class Limit:
    """A budget of everybody that can be raised."""

    def __init__(self) -> None:
        self.max_tokens = 0

    def state(self, payer_id: str, charged_at_ms: int) -> BudgetState:
        return BudgetState(
            key=BudgetKey(payer_id, "2026-09"),
            budget=Budget(max_tokens=self.max_tokens, max_cost_nanos=None, hard=True),
            billed_tokens=0,
            billed_cost_nanos=0,
            unpriced_tokens=0,
            reached_percent=100,
            updated_at_ms=charged_at_ms,
        )


async def totalled(outbox: MemoryOutbox) -> tuple[UsageSums, int]:
    """The month's total of the only payer, and the tokens that charges name, once the events are folded."""
    with a_bench() as bench:
        for usage in outbox.usage:
            bench.log.append(Destination("usage", usage))
        ledger = await bench.run()
        totals = await bench.log.totals()
    assert ledger is not None
    months = {key: sums for key, sums in totals.items() if key.dimension == "all" and len(key.bucket) == len("2026-11")}
    assert len(months) == 1
    return next(iter(months.values())), ledger.sums.attributed_tokens + ledger.sums.unmatched_tokens


REFUSED: Mapping[str, Request] = {
    "past its deadline": a_request(TEXTS, deadline_ms=NOW_MS - 1),
    "over the budget": a_request(TEXTS),
}


@pytest.mark.parametrize("why", REFUSED)
async def test_a_request_that_was_refused_and_is_sent_again_pays_for_what_it_gets(why: str) -> None:
    """A refusal is no charge of nothing that what is paid for later would be a copy of."""
    limit = Limit()
    async with Bench(budgets=limit) as bench:
        if why != "over the budget":
            limit.max_tokens = 100
        await bench.handle(REFUSED[why])
        assert [result.status for result in bench.outbox.results] == ["error", "error"]
        limit.max_tokens = 100
        await bench.handle(a_request(TEXTS))
        await bench.handle(a_request(TEXTS))
        paid = sum(bench.provider.bills.values())
        sums, attributed = await totalled(bench.outbox)
    assert len({usage.request_id for usage in bench.outbox.usage}) == 1, "the very same request"
    assert (sums.billed_tokens, attributed, paid) == (5, 5, 5)
    assert (sums.requests, sums.failed_texts, sums.billed_texts) == (2, 2, 2)


async def test_a_refused_request_that_is_delivered_again_is_refused_once() -> None:
    """The key of a refusal depends on the request alone too: its copies count nothing."""
    async with Bench() as bench:
        for _ in range(3):
            await bench.handle(REFUSED["past its deadline"])
        sums, attributed = await totalled(bench.outbox)
    assert not bench.provider.bills
    assert (sums.requests, sums.failed_texts, sums.billed_tokens, attributed) == (1, 2, 0, 0)


async def test_what_was_charged_before_is_not_charged_again_by_a_refusal() -> None:
    """A request that was served, and whose copy is refused since the cache was lost, has its charge and a refusal."""
    outbox = MemoryOutbox()
    async with Bench(outbox=outbox) as bench:
        await bench.handle(a_request(TEXTS))
    async with Bench(outbox=outbox, cache=MemoryCache()) as bench:
        await bench.handle(REFUSED["past its deadline"])
    sums, attributed = await totalled(outbox)
    assert (sums.billed_tokens, attributed, sums.failed_texts) == (5, 5, 2)


@pytest.mark.parametrize(
    "request_,refusal",
    [
        (a_request(TEXTS), False),
        (a_request([TEXTS[0], " "]), False),
        (a_request([" "]), True),
        (a_request(TEXTS, model="nonsense"), True),
        (a_request(TEXTS, deadline_ms=NOW_MS - 1), True),
    ],
    ids=["paid", "paid in part", "no text is any good", "as a whole", "past its deadline"],
)
async def test_only_what_bills_nothing_and_fails_is_a_refusal(request_: Request, refusal: bool) -> None:
    """A charge has the request id for its key, a refusal one that is derived from it; readers can tell."""
    async with Bench() as bench:
        (usage,) = (await bench.handle(request_)).usage
    expected = str(uuid5(UUID(usage.request_id), "refusal")) if refusal else usage.request_id
    assert usage.idempotency_key == expected
    assert usage.is_refusal == refusal


async def test_a_request_that_is_only_saved_has_its_charge() -> None:
    """To bill nothing is no refusal where nothing failed."""
    cache = MemoryCache()
    async with Bench(cache=cache) as bench:
        await bench.handle(a_request(TEXTS, correlation_id="before"))
        await bench.handle(a_request(TEXTS))
        usage = bench.outbox.usage[-1]
    assert usage.saved.texts == 2
    assert usage.idempotency_key == usage.request_id


async def test_no_request_is_half_past_its_deadline() -> None:
    """Whether it is in time is decided once, with the first of its texts that goes into a call or is refused."""
    texts = [f"text {number}" for number in range(12)]  # a call takes 8
    async with Bench(max_concurrent_calls=1) as bench:
        answered = bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(texts, deadline_ms=NOW_MS + 10_000))
        while not bench.provider.asked:
            await bench.step()
        bench.clock.now_s += 20.0
        answered.set()
        await bench.run_until_idle()
        statuses = {result.status for result in bench.outbox.results}
        calls = len(bench.provider.asked)
    assert statuses == {"ok"}
    assert calls > 1


async def test_what_was_looked_at_and_had_no_room_in_a_call_is_not_in_time_for_that() -> None:
    """Only what goes into a call decides: the rest of the queue may still pass its deadline."""
    async with Bench(max_concurrent_calls=1) as bench:
        answered = bench.provider.gate = asyncio.Event()
        first = a_request([f"text {number}" for number in range(8)])  # a whole call
        await bench.publish(first, a_request(["late"], correlation_id="late", deadline_ms=NOW_MS + 100_000))
        while not bench.provider.asked:
            await bench.step()
        bench.clock.now_s += 200.0
        answered.set()
        await bench.run_until_idle()
        late = [result for result in bench.outbox.results if result.request.correlation_id == "late"]
    assert [len(texts) for texts in bench.provider.asked] == [8]
    assert [result.status for result in late] == ["error"]
