"""Step 4: texts of a payer whose budget is spent are not paid for; hits and what is paid for already are delivered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import Budget, BudgetKey, BudgetState
from processor.domain import Amounts, CacheLevel, ErrorCode, ModelSpec, Request, Status
from processor.errors import CallTooLarge, InputRejected, ProviderError, ProviderTransient
from processor.packing import Packer
from processor.ports import Found, TokenCounts
from processor.spending import LAG_S, Spending, exceeded
from processor.work import Fold, Policy
from tests.support.builders import NOW_MS, a_request
from tests.support.folds import a_fold, tenants
from tests.support.steps import Bench, FakeLease, MemoryCache, VirtualClock, WordCounter


class View:
    """What a worker knows: these payers' states, in any month."""

    def __init__(self, **states: BudgetState) -> None:
        self.states = states

    def state(self, payer_id: str, charged_at_ms: int) -> BudgetState | None:
        return self.states.get(payer_id)


def a_state(billed: int, tokens: int | None, nanos: int | None = None, *, hard: bool = True) -> BudgetState:
    """A token of the tiny model costs a nano-dollar."""
    return BudgetState(
        key=BudgetKey("acme", "2026-09"),
        budget=Budget(max_tokens=tokens, max_cost_nanos=nanos, hard=hard),
        billed_tokens=billed,
        billed_cost_nanos=billed,
        unpriced_tokens=0,
        reached_percent=0,
        updated_at_ms=NOW_MS,
    )


SPENT = a_state(10, 10, 12_500_000_000)


def spent(*payers: str) -> View:
    return View(**dict.fromkeys(payers, SPENT))


def of(owner: str, texts: list[str], correlation_id: str, **fields: Any) -> Request:
    """A request of the tenant acme for which that owner of an agent pays."""
    return a_request(
        texts, correlation_id=correlation_id, agent_id="a", agent_owner_id=owner, document_id=None, **fields
    )


def outcomes(bench: Bench) -> dict[str, list[str]]:
    """Correlation id -> "ok" or the error code of each chunk."""
    found: dict[str, dict[int, str]] = {}
    for result in bench.outbox.results:
        code = result.error.code.value if result.error is not None else "ok"
        found.setdefault(result.request.correlation_id, {}).setdefault(result.chunk_index, code)
    return {name: [chunks[index] for index in sorted(chunks)] for name, chunks in found.items()}


async def test_a_text_over_budget_is_not_paid_for_and_says_why() -> None:
    """No call; an error result per chunk, usage of nothing with all texts failed, and the offset is finished."""
    async with Bench(budgets=spent("rich")) as bench:
        await bench.handle(of("rich", ["one", "two words"], "c1"))
        assert bench.provider.asked == []
        assert outcomes(bench) == {"c1": ["budget_exceeded"] * 2}
        (usage,) = bench.outbox.usage
        assert (usage.payer_id, usage.billed.tokens, usage.failed_texts, usage.parts) == ("rich", 0, 2, [])
        assert bench.lease.finished == [0]


def test_the_refusal_names_month_limits_and_fix_and_no_payer() -> None:
    """Field `budget`; not retryable, since the same request again has its outcome already for many readers."""
    fault = exceeded(SPENT)
    assert (fault.code, fault.field, fault.retryable) == (ErrorCode.BUDGET_EXCEEDED, "budget", False)
    assert "10 tokens or 12.5 dollars of 2026-09" in fault.message
    assert "new correlation id" in fault.message
    assert "acme" not in fault.message


@pytest.mark.parametrize("first, second", [("poor", "other"), ("other", "poor")])
async def test_the_next_payer_of_a_fold_leads(first: str, second: str) -> None:
    """U2: where payers share a text, the one over budget ends alone, and another one pays for it once."""
    async with Bench(budgets=spent("poor")) as bench:
        await bench.handle(of(first, ["same text"], first), of(second, ["same text"], second))
        assert outcomes(bench) == {"poor": ["budget_exceeded"], "other": ["ok"]}
        assert {usage.payer_id: usage.billed.tokens for usage in bench.outbox.usage} == {"poor": 0, "other": 2}
        assert [item.payer_id for intent in bench.intents() for item in intent.items] == ["other"]


async def test_hits_are_delivered_over_budget() -> None:
    """What costs nothing more is given, and partial hits keep their places."""
    cache = MemoryCache()
    async with Bench(cache=cache) as bench:
        await bench.handle(of("poor", ["known"], "before"))
    async with Bench(cache=cache, budgets=spent("poor")) as bench:
        await bench.handle(of("poor", ["new", "known", "newer"], "after"))
        assert outcomes(bench) == {"after": ["budget_exceeded", "ok", "budget_exceeded"]}
        assert bench.provider.asked == []


async def test_a_replay_over_budget_still_finds_what_was_paid() -> None:
    """Crash after step 6: the vector that its payer was about to be charged for is delivered and charged."""
    cache = MemoryCache()
    request = of("poor", ["two words"], "c")
    async with Bench(cache=cache) as bench:
        await bench.handle(request)
        paid = bench.outbox.usage[0]
    async with Bench(cache=cache, budgets=spent("poor")) as bench:
        await bench.handle(request)
        assert [(each.status, each.vector is not None) for each in bench.outbox.results] == [(Status.OK, True)]
        assert (bench.outbox.usage[0].billed, bench.outbox.usage[0].parts) == (paid.billed, paid.parts)


@pytest.mark.parametrize("error", [ProviderTransient("try_again"), CallTooLarge("call_too_large", http_status=413)])
async def test_a_fold_that_has_been_called_is_not_refused_any_more(error: ProviderError) -> None:
    """Decided once, before the first call: a budget spent meanwhile does not end what may be paid for already."""
    view = spent()
    async with Bench(budgets=view) as bench:
        bench.provider.script = [error]
        bench.provider.gate = asyncio.Event()
        await bench.publish(of("poor", ["text", "more"], "begun"))
        await bench.step()
        assert len(bench.provider.asked) == 1
        view.states["poor"] = SPENT
        bench.provider.gate.set()
        await bench.publish(of("poor", ["other"], "late"))
        await bench.run_until_idle()
        assert outcomes(bench) == {"begun": ["ok", "ok"], "late": ["budget_exceeded"]}
        assert sorted(chain(*bench.provider.asked)) == ["more", "more", "text", "text"]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.tuples(st.sampled_from(["poor", "rich", "other"]), st.integers(1, 10)), min_size=1, max_size=60)
)
def test_no_call_holds_a_text_over_budget(texts: list[tuple[str, int]]) -> None:
    """However calls are filled, each text either goes once or ends once, by its payer alone."""
    folds = [a_fold("w", tokens, tenant=tenant) for tenant, tokens in texts]
    packer = Packer(Policy(), Spending(spent("poor"), VirtualClock()))
    packer.add(folds, 0.0, NOW_MS)
    sent: list[Fold] = []
    ended: list[Fold] = []
    while packer.next_tokens(0.0, 0.0, None) is not None:
        call, over = packer.take(0.0, NOW_MS, 0.0, None)
        sent += call.folds if call is not None else []
        ended += over
    assert Counter(tenants(sent)) == Counter(tenant for tenant, _ in texts if tenant != "poor")
    assert Counter(tenants(ended)) == Counter(tenant for tenant, _ in texts if tenant == "poor")
    assert len(packer) == 0


async def test_a_budget_that_is_spent_meanwhile_does_not_cut_a_request() -> None:
    """Once a text of it has gone out, its others follow: half a charge would be all of it when it is sent again."""
    view = View(payer=a_state(0, 10))
    async with Bench(budgets=view, max_concurrent_calls=1) as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(of("payer", [f"text-{number}" for number in range(12)], "begun"))  # a call takes 8
        await bench.publish(of("payer", ["another"], "next"))
        while not bench.provider.asked:
            await bench.step()
        view.states["payer"] = SPENT
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert [len(texts) for texts in bench.provider.asked] == [8, 4]
        assert outcomes(bench) == {"begun": ["ok"] * 12, "next": ["budget_exceeded"]}


async def test_a_request_that_only_shares_a_text_with_a_call_has_not_begun() -> None:
    """One text that all of them have, and a window of its own each: else they would all go out beside the first."""
    async with Bench(budgets=View(payer=a_state(0, 4)), max_concurrent_calls=1, window_max_texts=8) as bench:
        requests = [
            of("payer", ["same", *(f"{number}-{index}" for index in range(7))], str(number)) for number in range(6)
        ]
        await bench.handle(*requests)
        assert sum(usage.billed.tokens for usage in bench.outbox.usage) == 8
        assert [usage.billed.texts for usage in bench.outbox.usage if usage.billed.texts] == [8]


async def test_copies_of_a_request_begin_together() -> None:
    """Each is charged whatever is paid for either: one that was refused the rest would be charged for a part."""
    view = View(payer=a_state(0, 100))
    async with Bench(budgets=view, max_concurrent_calls=2) as bench:
        others = bench.provider.gate = asyncio.Event()
        await bench.publish(of("other", ["other"], "other"))
        await bench.step()
        answered = bench.provider.gate = asyncio.Event()
        request = of("payer", [f"text-{number}" for number in range(12)], "twice")  # a call takes 8
        await bench.publish(request, request)
        await bench.step()
        view.states["payer"] = SPENT
        others.set()
        await bench.step()
        assert [len(texts) for texts in bench.provider.asked] == [1, 8, 4], "what is left goes beside it"
        answered.set()
        await bench.run_until_idle()
        assert [(usage.billed.texts, usage.failed_texts) for usage in bench.outbox.usage[1:]] == [(12, 0)] * 2


async def test_copies_of_a_request_are_let_through_together() -> None:
    """Whichever came first: a copy that is refused would be an error for who is charged for vectors."""
    async with Bench(budgets=View(payer=a_state(0, 2))) as bench:
        request = of("payer", ["one", "two", "three"], "twice")
        await bench.publish(request, lease=FakeLease(partition=1))
        await bench.publish(request, of("payer", ["more"], "more"))
        await bench.run_until_idle()
        assert outcomes(bench) == {"twice": ["ok"] * 3, "more": ["budget_exceeded"]}
        assert sorted((usage.billed.texts, usage.failed_texts) for usage in bench.outbox.usage) == [
            (0, 1),
            (3, 0),
            (3, 0),
        ]
        spending = bench.worker.pipeline.spending
        assert spending is not None
        assert not spending._requests


class Remembered(MemoryCache):
    """The process has not ended since: every hit is `l1`."""

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        entry = self.entries.get(key)
        return None if entry is None else Found(entry, CacheLevel.L1)


@pytest.mark.parametrize("cached", [MemoryCache, Remembered])
@pytest.mark.parametrize("late", [False, True])
async def test_a_request_that_was_paid_in_part_before_a_crash_is_done_whole(
    late: bool, cached: type[MemoryCache]
) -> None:
    """Whatever deadline and budget say by now: its charge names all that it gets, and nothing of it is left to send."""
    cache = cached()
    texts = [f"text-{number}" for number in range(12)]
    request = of("payer", texts, "c", deadline_ms=NOW_MS + 1_000 if late else None)
    async with Bench(cache=cache) as bench:
        await bench.handle(request)
        for key in list(cache.entries)[8:]:  # as if the worker had ended before its second call was answered
            del cache.entries[key]
    async with Bench(cache=cache, budgets=View() if late else spent("payer")) as bench:
        bench.clock.now_s += 2.0
        await bench.handle(request)
        assert outcomes(bench) == {"c": ["ok"] * 12}
        assert [(usage.billed.texts, usage.failed_texts) for usage in bench.outbox.usage] == [(12, 0)]


async def test_what_was_paid_is_known_before_the_rest_of_a_window_is_measured() -> None:
    """A call that is made meanwhile decides of the request: it must not refuse what its owner has paid for in part."""

    class Slow(WordCounter):
        def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
            bench.clock.now_s += 0.01  # everybody else gets a turn
            bench.worker._work.set()
            return super().count(texts, model)

    cache = MemoryCache()
    request = of("payer", [f"text-{number}" for number in range(12)], "c")
    async with Bench(cache=cache) as bench:
        await bench.handle(request)
        for key in list(cache.entries)[:8]:
            del cache.entries[key]
    async with Bench(cache=cache, budgets=spent("payer"), counter=Slow()) as bench:
        await bench.handle(request, a_request([f"other-{number}" for number in range(300)], tenant_id="other"))
        assert set(outcomes(bench)["c"]) == {"ok"}


async def test_a_raised_budget_lets_texts_through_again() -> None:
    """The view is asked for each text: what comes after the release is embedded."""
    view = spent("poor")
    async with Bench(budgets=view) as bench:
        await bench.handle(of("poor", ["text"], "refused"))
        view.states.clear()
        await bench.handle(of("poor", ["text"], "released"))
        assert outcomes(bench) == {"refused": ["budget_exceeded"], "released": ["ok"]}


@settings(max_examples=60, deadline=None)
@given(
    left=st.integers(1, 30),
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=8),
    by_cost=st.booleans(),
)
async def test_what_is_in_work_counts_before_it_is_charged(left: int, sizes: list[list[int]], by_cost: bool) -> None:
    """While the view stands still, requests go out whole as long as any of the budget is left, and none after that."""
    limits = (None, 100 + left) if by_cost else (100 + left, None)
    async with Bench(budgets=View(payer=a_state(100, *limits))) as bench:
        bench.provider.gate = asyncio.Event()
        texts = [[f"{i}-{j} " + "w " * (size - 1) for j, size in enumerate(each)] for i, each in enumerate(sizes)]
        await bench.publish(*(of("payer", each, str(i)) for i, each in enumerate(texts)))
        for _ in range(5):
            await bench.step()
        bench.provider.gate.set()
        await bench.run_until_idle()
        paid = sum(usage.billed.tokens for usage in bench.outbox.usage)
        refused = sum(usage.failed_texts for usage in bench.outbox.usage)
        assert paid < left + max(map(sum, sizes))
        assert all(len(set(each)) == 1 for each in outcomes(bench).values()), "nobody has half a request"
        assert (paid >= left) if refused else (paid == sum(sum(each) for each in sizes))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_a_text_never_counts_against_itself(sizes: list[int]) -> None:
    """However often a text is looked at before it fits a call: a budget of just so many tokens lets all of them out."""
    packer = Packer(Policy(), Spending(View(acme=a_state(0, sum(sizes))), VirtualClock()))
    packer.add([a_fold("w", tokens) for tokens in sizes], 0.0, NOW_MS)
    sent = 0
    while packer.next_tokens(0.0, 0.0, None) is not None:
        call, over = packer.take(0.0, NOW_MS, 0.0, None)
        assert over == []
        sent += len(call.folds) if call is not None else 0
    assert sent == len(sizes)


def test_a_request_that_is_let_through_counts_whole() -> None:
    """All that is known to be missing of it, with its first text: else as many would go out as there are tenants."""
    spending = Spending(View(acme=a_state(0, 10)), VirtualClock())
    one, another = (a_fold("text", 3) for _ in range(2))
    for _ in range(3):
        fold = a_fold("text", 3)
        fold.works[0].ticket = one.works[0].job
        one.works[0].job.works.append(fold.works[0])
    one.works[0].job.works.append(one.works[0])
    spending.allow(one)
    assert spending.over(one.works[0].job) is None, "it never counts against itself"
    assert spending.over(another.works[0].job) is not None


async def test_what_was_charged_counts_until_the_view_tells_of_it() -> None:
    """Between its usage event and the payer's next state a request counts still, but not for ever."""
    view = View(payer=a_state(0, 2))
    async with Bench(budgets=view) as bench:
        await bench.handle(of("payer", ["two words"], "charged"))
        await bench.handle(of("payer", ["before"], "before"))
        view.states["payer"] = a_state(2, 3)
        await bench.handle(of("payer", ["after"], "after"))
        await bench.handle(of("payer", ["again"], "again"))
        bench.clock.now_s += LAG_S  # nobody told anything: it was charged before
        await bench.handle(of("payer", ["later"], "later"))
        assert outcomes(bench) == {
            "charged": ["ok"],
            "before": ["budget_exceeded"],
            "after": ["ok"],
            "again": ["budget_exceeded"],
            "later": ["ok"],
        }


async def test_a_charge_that_the_view_tells_of_at_once_counts_once() -> None:
    """However long the worker waits for the rest of its acknowledgements: what is left of the budget is not refused."""
    view = View(payer=a_state(0, 4))
    async with Bench(budgets=view) as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(of("payer", ["two words"], "first"))
        await bench.step()
        acknowledged = bench.outbox.posts_acknowledged = asyncio.Event()  # of its receipt
        bench.provider.gate.set()
        while not bench.outbox.usage:
            await bench.step()
        view.states["payer"] = a_state(2, 4)
        await bench.publish(of("payer", ["more"], "second"))
        await bench.step()
        acknowledged.set()
        await bench.run_until_idle()
        assert outcomes(bench) == {"first": ["ok"], "second": ["ok"]}


@pytest.mark.parametrize(
    "told, counts",
    [([0], 7), ([2], 7), ([3], 4), ([6], 4), ([7], 0), ([4], 4), ([4, 7], 0), ([2, 5], 4), ([3, 0, 4], 0)],
)
def test_a_state_tells_of_charges_one_after_the_other(told: list[int], counts: int) -> None:
    """First 3 tokens, then 4, each whole: what the state has not risen by counts still, in whatever steps it rises."""
    view = View(acme=a_state(0, 100))
    spending = Spending(view, VirtualClock())
    for tokens in (3, 4):
        fold = a_fold("text", 9)
        job = fold.works[0].job
        job.works.append(fold.works[0])
        spending.allow(fold)
        spending.charged(job, Amounts(tokens=tokens, cost_nanos=tokens))
        spending.finished([job])

    def is_over(billed: int, left: int) -> bool:
        view.states["acme"] = a_state(billed, billed + left)
        return spending.over(a_fold("another", 1).works[0].job) is not None

    for billed in told:
        is_over(billed, 100)
    assert is_over(told[-1], counts)
    assert not is_over(told[-1], counts + 1)


async def test_what_was_in_work_leaves_no_trace() -> None:
    """Nothing drifts: charged, refused by the provider or dropped with its partition, it is forgotten."""
    async with Bench(budgets=View(payer=a_state(0, 2)), poison_attempts=1) as bench:
        spending = bench.worker.pipeline.spending
        assert spending is not None
        rejected = InputRejected("input_refused", http_status=400)
        bench.provider.refuses = lambda texts: rejected if "bad" in texts else None
        await bench.handle(of("payer", ["bad"], "rejected"))
        bench.clock.now_s += LAG_S
        bench.provider.gate = asyncio.Event()
        lost = FakeLease(partition=1)
        await bench.publish(of("payer", ["never done"], "lost"), lease=lost)
        await bench.step()
        await bench.publish(of("payer", ["one more"], "beside"))
        await bench.step()
        lost.revoked = True
        await bench.worker.on_revoke([lost], 0.0)
        bench.provider.gate.set()
        await bench.handle(of("payer", ["new ones"], "after"))
        assert outcomes(bench) == {"rejected": ["provider_rejects"], "beside": ["budget_exceeded"], "after": ["ok"]}
        assert (spending._allowed, spending._jobs, spending._sums) == ({}, {}, {})
        bench.clock.now_s += LAG_S
        await bench.handle(of("payer", ["x"], "last"))
        assert [untold.tokens for untold in spending._untold.values()] == [1]


async def test_payers_that_never_come_back_are_forgotten() -> None:
    """However many a worker has seen, it remembers those whose requests ended a moment ago."""
    payers = [f"p{number}" for number in range(5)]
    async with Bench(budgets=View(**dict.fromkeys(payers, a_state(0, 9)))) as bench:
        for payer in payers:
            await bench.handle(of(payer, [payer], payer))
            bench.clock.now_s += LAG_S
        spending = bench.worker.pipeline.spending
        assert spending is not None
        assert {key.payer_id for key in spending._untold} == {"p4"}


async def test_soft_budgets_and_payers_without_one_are_never_refused() -> None:
    """A soft budget only tells."""
    async with Bench(budgets=View(soft=replace(SPENT, budget=replace(SPENT.budget, hard=False)))) as bench:
        await bench.handle(of("soft", ["one"], "soft"), of("free", ["two"], "free"))
        assert outcomes(bench) == {"soft": ["ok"], "free": ["ok"]}


OWNERS = ["poor", "broke", "rich", "other"]


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(OWNERS), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4)),
        min_size=1,
        max_size=8,
    ),
    over=st.sets(st.sampled_from(OWNERS)),
    expired=st.sets(st.integers(0, 7)),
)
async def test_no_text_is_paid_by_a_payer_over_budget(
    asked: list[tuple[str, list[str]]], over: set[str], expired: set[int]
) -> None:
    """Whoever shares texts with whom: each chunk has one outcome, those over budget pay nothing, the others get all."""
    async with Bench(budgets=spent(*over)) as bench:
        requests = [
            replace(of(owner, texts, str(i)), deadline_ms=NOW_MS - 1 if i in expired else None)
            for i, (owner, texts) in enumerate(asked)
        ]
        await bench.handle(*requests)
        for i, (owner, texts) in enumerate(asked):
            want = "deadline_exceeded" if i in expired else "budget_exceeded" if owner in over else "ok"
            assert outcomes(bench)[str(i)] == [want] * len(texts)
        assert all(usage.billed.tokens == 0 for usage in bench.outbox.usage if usage.payer_id in over)
        assert sum(bench.provider.bills.values()) == sum(bench.attributed().values())
        assert not {item.payer_id for intent in bench.intents() for item in intent.items} & over
        assert set(bench.lease.finished) == set(range(len(requests)))
