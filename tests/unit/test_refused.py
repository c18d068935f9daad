"""A request that was refused and is sent again: what it gets then is paid for, and the refusal itself costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID, uuid5

import pytest

from processor.accounts import Budget, BudgetKey, BudgetState, UsageSums
from processor.domain import Request
from processor.embed import embed
from processor.errors import ProviderTransient
from processor.pools import PAST_DEADLINE
from processor.ports import Destination
from tests.support.aggregation import a_bench
from tests.support.builders import NOW_MS, a_request
from tests.support.folds import a_fold, taken
from tests.support.steps import Bench, FakeLease, MemoryCache, MemoryOutbox

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


async def test_a_request_that_is_read_again_while_its_call_is_out_is_done_whole() -> None:
    """A call made under the lease before bills it: whatever deadline and budget say by now, the rest follows."""
    limit = Limit()
    limit.max_tokens = 100
    request = a_request([f"text-{number}" for number in range(12)])  # a call takes 8
    async with Bench(budgets=limit, max_concurrent_calls=2) as bench:
        others = bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["other"], correlation_id="other"))
        await bench.step()
        answered = bench.provider.gate = asyncio.Event()
        lost = FakeLease()
        await bench.publish(request, lease=lost)
        await bench.step()
        assert [len(texts) for texts in bench.provider.asked] == [1, 8]
        lost.revoked = True
        await bench.worker.on_revoke([lost], 0.0)
        limit.max_tokens = 0
        await bench.publish(replace(request, deadline_ms=NOW_MS - 1), lease=FakeLease(generation=2))
        others.set()
        await bench.step()
        assert [len(texts) for texts in bench.provider.asked] == [1, 8, 4], "what is left goes beside it"
        answered.set()
        await bench.run_until_idle()
        assert {result.status for result in bench.outbox.results} == {"ok"}
        assert [(usage.billed.texts, usage.failed_texts) for usage in bench.outbox.usage] == [(1, 0), (12, 0)]
        assert sum(bench.provider.bills.values()) == sum(bench.attributed().values())


@pytest.mark.parametrize("texts", [["own", "shared"], ["shared"]])
@pytest.mark.parametrize("others_leave", [False, True])
async def test_a_refused_request_leads_no_call_that_it_joined(texts: list[str], others_leave: bool) -> None:
    """It is refused whole: a text that it shares with a call that is tried again is paid for by others, or nobody."""
    async with Bench(retry_initial_s=10.0) as bench:
        bench.provider.script = [ProviderTransient("try_again")]
        lost = FakeLease(partition=1)
        await bench.publish(a_request(["shared"], correlation_id="first"), lease=lost)
        while not bench.provider.asked:
            await bench.step()
        late = a_request(texts, correlation_id="late", deadline_ms=NOW_MS - 1)
        await bench.publish(late)
        if others_leave:
            lost.revoked = True
            await bench.worker.on_revoke([lost], 0.0)
        await bench.run_until_idle()
        said = [result for result in bench.outbox.results if result.request.correlation_id == "late"]
        assert {result.status for result in said} == {"error"}
        assert len(said) == len(texts)
        assert bench.provider.asked == [["shared"]] * (1 if others_leave else 2)
        assert sum(bench.provider.bills.values()) == sum(bench.attributed().values())


@pytest.mark.parametrize("refused", [False, True])
async def test_whoever_leads_when_a_call_begins_was_not_refused_and_has_begun(refused: bool) -> None:
    """Between the making of a call and its intent its leader may be lost, and another request have joined."""
    async with Bench() as bench:
        lost, packer = FakeLease(), bench.worker.pipeline.packer
        fold = a_fold("shared", lease=lost)
        packer.add([fold], 0.0, NOW_MS)
        call, on = taken(packer), bench.route.choose(1)
        assert on is not None
        joined = a_fold("shared").works[0]
        joined.fold, joined.job.refused = fold, PAST_DEADLINE if refused else None
        fold.works.append(joined)
        lost.revoked = True
        done, _ = await embed(call, on, on.begin(call), bench.route, packer)
        assert done == [fold]
        assert bench.provider.asked == ([] if refused else [["shared"]])
        assert (joined.outcome is not None, joined.job.begun) == (refused, not refused)
