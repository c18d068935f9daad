"""Step 4: what misses measure, how full and how fair the calls made of them are, and when they are due."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.domain import (
    CallEstimator,
    EmbeddingFunction,
    ErrorCode,
    InputType,
    Item,
    ModelSpec,
    TokenSource,
    Truncate,
)
from processor.fairness import Text, Turns
from processor.packing import LOOK_AHEAD, Packer, measure
from processor.ports import TokenCounts
from processor.work import Call, Fold, Job, Outcome, Policy, Work
from tests.support.builders import NOW_MS, a_request, a_source
from tests.support.steps import MODEL, FakeLease, VirtualClock, WordCounter

NUMBERS = itertools.count()


def a_function(prefix: str = "", truncate: Truncate = Truncate.ERROR, **model: Any) -> EmbeddingFunction:
    """Of the tiny model (10 words a text, 8 texts and 40 words a call) unless fields of it are given."""
    spec = replace(MODEL, **model)
    return EmbeddingFunction(spec, spec.space(4), InputType.DOCUMENT, prefix, truncate)


TINY = a_function()


def a_fold(
    text: str = "hello",
    tokens: int = 1,
    *,
    function: EmbeddingFunction = TINY,
    tenant: str = "acme",
    arrived: float = 0.0,
    deadline_ms: int | None = None,
    lease: FakeLease | None = None,
) -> Fold:
    """A measured miss of one work; its text is what its size in bytes is taken from."""
    number = next(NUMBERS)
    request = a_request([text], tenant_id=tenant, deadline_ms=deadline_ms)
    job = Job(lease or FakeLease(), a_source(number), 1, arrived, request=request, request_id=f"r{number}")
    work = Work(job, chunk_id="c0", chunk=request.chunks[0], item=Item(f"r{number}", 0))
    fold = work.fold = Fold(b"%d" % number, function, [work], arrived, tokens)
    fold.sent, fold.tokens, fold.estimated, fold.sent_bytes = text, tokens, tokens, len(text.encode())
    return fold


def a_packer(*folds: Fold, now: float = 0.0, **policy: Any) -> Packer:
    packer = Packer(Policy(**policy))
    packer.add(folds, now, NOW_MS)
    return packer


def taken(packer: Packer, *, now: float = 0.0, max_tokens: int | None = None) -> Call:
    """The next call, without any patience."""
    call, ended = packer.take(now, NOW_MS, 0.0, max_tokens)
    assert call is not None
    assert not ended
    return call


def all_calls(packer: Packer, max_tokens: int | None = None) -> list[Call]:
    calls = []
    while packer.next_tokens(0.0, 0.0, max_tokens) is not None:
        calls.append(taken(packer, max_tokens=max_tokens))
    return calls


def tenants(folds: Iterable[Fold]) -> list[str]:
    return [fold.works[0].job.request.tenant_id for fold in folds]


# Measuring


async def measured(*texts: str, **function: Any) -> list[Fold]:
    """The folds of these texts as `measure` leaves them, counted in words."""
    folds = [a_fold(text, 0, function=a_function(**function)) for text in texts]
    for fold in folds:
        fold.sent = ""
    await measure(folds, WordCounter(), VirtualClock())
    return folds


async def test_a_miss_is_counted_exactly_with_its_prefix() -> None:
    """What limits and bills go by is what goes out: the prefix counts."""
    (fold,) = await measured("grün ist es", prefix="query: ")
    assert fold.sent == "query: grün ist es"
    assert (fold.tokens, fold.token_source, fold.cut_tokens, fold.fault) == (4, TokenSource.TOKENIZER, 0, None)
    assert fold.sent_bytes == len("query: grün ist es") + 1


@pytest.mark.parametrize(
    "estimator, estimated", [(CallEstimator.TOKENS, 3), (CallEstimator.BYTES_4, 4)], ids=["tokens", "bytes"]
)
async def test_a_provider_counts_calls_in_its_own_way(estimator: CallEstimator, estimated: int) -> None:
    """A call is held to the provider's own estimate, which may be UTF-8 bytes x 0.25."""
    (fold,) = await measured("grün ist es.", call_estimator=estimator)
    assert fold.estimated == estimated


async def test_a_text_over_the_limit_is_a_fault_of_its_own() -> None:
    """By default an over-long text fails, and its neighbours go out."""
    long, short = await measured("w " * 11, "w " * 10)
    assert long.fault is not None
    assert long.fault.code is ErrorCode.TEXT_TOO_LONG
    assert (short.fault, short.tokens) == (None, 10)


@pytest.mark.parametrize("truncate, kept", [(Truncate.END, "w0 w1"), (Truncate.START, "w10 w11")])
async def test_a_text_is_cut_around_its_prefix(truncate: Truncate, kept: str) -> None:
    """Law 6: the prefix is part of the embedding function, so no cut may take it away."""
    (fold,) = await measured(" ".join(f"w{i}" for i in range(12)), prefix="search query: ", truncate=truncate)
    assert fold.sent.startswith("search query: ")
    assert kept in fold.sent
    assert fold.cut_tokens > 0
    assert fold.tokens == len(fold.sent.split()) == 10


async def test_a_prefix_that_leaves_no_room_stands_alone() -> None:
    """Cutting ends, whatever the operator's prefix."""
    (fold,) = await measured("a b c", prefix="p " * 10, truncate=Truncate.START)
    assert fold.sent == "p " * 10


async def test_counting_gives_others_a_turn() -> None:
    """No more than some 16 KB of text are counted between two turns of the event loop."""
    turns: list[int] = []
    counted = 0

    class Clock(VirtualClock):
        async def sleep(self, seconds: float) -> None:
            turns.append(counted)

    class Counter(WordCounter):
        def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
            nonlocal counted
            counted += sum(map(len, texts))
            return super().count(texts, model)

    await measure([a_fold("w" * 1000) for _ in range(100)], Counter(), Clock())
    assert counted == 100_000
    assert max(later - before for before, later in itertools.pairwise([0, *turns])) <= 17_000


# Packing


@dataclass(frozen=True)
class Corpus:
    """Texts of some tenants, of which few to many go into a call, by any of its limits."""

    inputs: int
    tokens: int
    body_bytes: int
    estimator: CallEstimator
    texts: Sequence[tuple[int, str, int, int]]

    def folds(self) -> list[Fold]:
        function = a_function(
            max_inputs_per_call=self.inputs,
            max_tokens_per_call=self.tokens,
            max_bytes_per_call=self.body_bytes,
            call_estimator=self.estimator,
        )
        return [
            a_fold(letter * length, tokens, function=function, tenant=f"t{tenant}", arrived=float(i // 10))
            for i, (length, letter, tokens, tenant) in enumerate(self.texts)
        ]


CORPORA = st.builds(
    Corpus,
    st.integers(1, 30),
    st.integers(20, 400),
    st.integers(100, 2000),
    st.sampled_from(CallEstimator),
    st.lists(
        st.tuples(st.integers(1, 80), st.sampled_from("aü€\n"), st.integers(1, 20), st.integers(0, 2)), max_size=100
    ),
)


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.none() | st.integers(5, 100))
def test_no_limit_is_ever_passed_and_each_text_goes_once(corpus: Corpus, max_tokens: int | None) -> None:
    """A call of several texts is within every limit at once, and the calls hold each text exactly once, in order."""
    folds = corpus.folds()
    calls = all_calls(a_packer(*folds), max_tokens)
    assert sorted(fold.key for call in calls for fold in call.folds) == sorted(fold.key for fold in folds)
    for call in calls:
        assert [fold.waiting_since for fold in call.folds] == sorted(fold.waiting_since for fold in call.folds)
        if len(call.folds) == 1:
            continue
        model = call.function.model
        assert len(call.folds) <= model.max_inputs_per_call
        assert sum(fold.tokens for fold in call.folds) <= (max_tokens or 1000)
        estimated = sum(
            fold.sent_bytes * 0.25 if model.call_estimator is CallEstimator.BYTES_4 else fold.estimated
            for fold in call.folds
        )
        assert estimated <= model.max_tokens_per_call
        body = json.dumps([fold.sent for fold in call.folds])
        assert len(body) <= model.max_bytes_per_call + 2


def least_calls(sizes: Sequence[int], limit: int) -> int:
    return -(-sum(sizes) // limit)


def first_fit_decreasing(sizes: Sequence[int], limit: int) -> int:
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        for i, used in enumerate(bins):
            if used + size <= limit:
                bins[i] += size
                break
        else:
            bins.append(size)
    return len(bins)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=300), st.integers(1, 3))
def test_calls_are_as_few_as_can_be(sizes: list[int], count: int) -> None:
    """Texts of up to a quarter of a call: at most 1.05 x the least number of calls that could hold them, and one."""
    function = a_function(max_inputs_per_call=2048, max_tokens_per_call=400)
    folds = [a_fold("w", size, function=function, tenant=f"t{i % count}") for i, size in enumerate(sizes)]
    assert len(all_calls(a_packer(*folds))) <= 1.05 * least_calls(sizes, 400) + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50) | st.sampled_from([40, 60]), min_size=1, max_size=200))
def test_large_texts_are_packed_like_first_fit_decreasing(sizes: list[int]) -> None:
    """Where two texts fill a call: within 1.05 x the calls of first-fit decreasing, and one, in whatever order."""
    folds = [a_fold("w", size, function=a_function(max_tokens_per_call=100, max_inputs_per_call=99)) for size in sizes]
    assert len(all_calls(a_packer(*folds))) <= 1.05 * first_fit_decreasing(sizes, 100) + 1


def test_small_texts_are_not_spent_on_each_other() -> None:
    """Forties before sixties: two of a kind leave a fifth of the call empty, one of each none."""
    function = a_function(max_tokens_per_call=100)
    folds = [a_fold("w", size, function=function) for size in [40] * 20 + [60] * 20]
    assert {call.tokens for call in all_calls(a_packer(*folds))} == {100}


def test_bytes_are_summed_before_they_are_rounded() -> None:
    """A provider that holds UTF-8 bytes x 0.25 against its limit takes a call of exactly four bytes a token."""
    function = a_function(max_tokens_per_call=75, max_inputs_per_call=200, call_estimator=CallEstimator.BYTES_4)
    calls = all_calls(a_packer(*[a_fold("abc", 1, function=function) for _ in range(101)]))
    assert [len(call.folds) for call in calls] == [100, 1]


def test_a_text_larger_than_any_call_goes_alone() -> None:
    """What fits nowhere does not wait for ever: it is a call of its own, in its turn."""
    packer = a_packer(a_fold(tokens=5), a_fold(tokens=30), a_fold(tokens=5))
    calls = all_calls(packer, max_tokens=10)
    assert [[fold.tokens for fold in call.folds] for call in calls] == [[5, 5], [30]]


def test_a_call_costs_what_it_holds_and_not_what_waits() -> None:
    """To make a call looks at its own texts and a bounded number of others, however many wait."""
    asked = 0

    class Lease(FakeLease):
        @property
        def revoked(self) -> bool:
            nonlocal asked
            asked += 1
            return False

        @revoked.setter
        def revoked(self, value: bool) -> None: ...

    function, lease = a_function(max_inputs_per_call=99), Lease()
    packer = a_packer(
        *[a_fold(tokens=9, function=function, tenant=f"t{i % 3}", lease=lease) for i in range(3000)],
    )
    call = taken(packer)
    assert len(call.folds) == 4
    assert asked <= 4 + 1 + LOOK_AHEAD


# Fairness


def test_a_small_tenant_waits_for_a_bounded_number_of_calls() -> None:
    """A tenant's thousands delay another's ten texts by the call that is made of what waited before, and no more."""
    function = a_function(max_tokens_per_call=20_000, max_inputs_per_call=2048)
    packer = a_packer(*[a_fold(tokens=150, function=function, tenant="large") for _ in range(5_000)])
    taken(packer)
    packer.add([a_fold(tokens=150, function=function, tenant="small") for _ in range(10)], 1.0, NOW_MS)
    assert tenants(taken(packer).folds).count("small") == 10


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 5))
def test_the_delay_by_other_tenants_is_bounded(others: int, tokens: int, weight: int) -> None:
    """Until a tenant's n tokens are out, others get at most their turns meanwhile: a turn and a text each round."""
    function = a_function(max_tokens_per_call=8192, max_inputs_per_call=2048)
    packer = a_packer(tenant_weights={"small": weight})
    for other in range(others):
        packer.add([a_fold(tokens=170, function=function, tenant=f"o{other}") for _ in range(80)], 0.0, NOW_MS)
    taken(packer)
    packer.add([a_fold(tokens=tokens, function=function, tenant="small") for _ in range(10)], 0.0, NOW_MS)
    rounds = -(-10 * tokens // (1024 * weight)) + 1
    bound = 1 + (rounds * others * (1024 + 170) + 10 * tokens) // 8000
    small = calls = 0
    while small < 10:
        small += tenants(taken(packer).folds).count("small")
        calls += 1
    assert calls <= bound


def test_tenants_get_tokens_by_their_weights() -> None:
    """Tokens, not texts, are shared, over calls and within each of them."""
    function = a_function(max_tokens_per_call=16_000, max_inputs_per_call=2048)
    folds = [a_fold(tokens=300, function=function, tenant="long") for _ in range(500)]
    folds += [a_fold(tokens=20, function=function, tenant="short") for _ in range(8000)]
    packer = a_packer(*folds, tenant_weights={"long": 3})
    for _ in range(8):
        call = taken(packer)
        long = sum(fold.tokens for fold in call.folds if tenants([fold]) == ["long"])
        assert long / call.tokens == pytest.approx(0.75, abs=0.12)


def test_what_fills_a_gap_is_paid_for() -> None:
    """Small texts that always fit beside large ones bring their tenant no more than its share."""
    function = a_function(max_tokens_per_call=100)
    folds = [a_fold(tokens=60, function=function, tenant="large") for _ in range(600)]
    folds += [a_fold(tokens=20, function=function, tenant="small") for _ in range(1800)]
    packer = a_packer(*folds)
    went = [fold for _ in range(300) for fold in taken(packer).folds]
    tokens = {name: sum(fold.tokens for fold in went if tenants([fold]) == [name]) for name in ("large", "small")}
    assert tokens["small"] == pytest.approx(tokens["large"], rel=0.15)


def test_a_debt_is_bounded() -> None:
    """A tenant whose texts filled the calls of others for long pays for a turn of that, and no more."""
    turns = Turns({})
    for number in range(1000):
        fold = a_fold(tokens=100, tenant="ab"[number % 2])
        turns.push(Text(0.0, number, fold, 100, 400, 1))
    for _ in range(200):
        turns.settle(charged=turns.borrow(1), returned=[])
    went = [text.fold for _ in range(60) if (text := turns.pop()) is not None]
    assert tenants(went).count("a") >= 20


@pytest.mark.parametrize("gone", ["", "ad"], ids=["all", "some"])
def test_tenants_come_in_the_order_in_which_they_came(gone: str) -> None:
    """Nobody loses a turn when the tenant before is let go or has nothing left."""
    lost = FakeLease()
    packer = a_packer(*[a_fold(tenant=tenant, lease=lost if tenant in gone else None) for tenant in "abcdef"])
    lost.revoked = True
    packer.let_go()
    order = [tenant for call in all_calls(packer, max_tokens=1) for tenant in tenants(call.folds)]
    assert order == [tenant for tenant in "abcdef" if tenant not in gone]


def test_who_leaves_takes_no_credit_along() -> None:
    """A tenant that had nothing waiting has no claim on what it did not use."""
    function = a_function(max_tokens_per_call=10_000, max_inputs_per_call=2048)
    packer = a_packer(*[a_fold(tokens=100, function=function, tenant="busy") for _ in range(1000)])
    for _ in range(5):
        packer.add([a_fold(tokens=1, function=function, tenant="rare")], 0.0, NOW_MS)
        taken(packer)
    packer.add([a_fold(tokens=100, function=function, tenant="rare") for _ in range(1000)], 0.0, NOW_MS)
    assert tenants(taken(packer).folds).count("rare") <= 60


def test_nearly_due_texts_go_first_within_a_tenant() -> None:
    """A deadline goes before what has none, the nearer one before the farther one."""
    folds = [a_fold("none"), a_fold("late", deadline_ms=NOW_MS + 9000), a_fold("soon", deadline_ms=NOW_MS + 5000)]
    packer = a_packer(*folds)
    assert [taken(packer, max_tokens=1).folds[0].sent for _ in folds] == ["soon", "late", "none"]


def test_nearly_due_texts_starve_nobody() -> None:
    """What has no deadline gives way to those who have for a minute, and then goes before them."""
    packer = a_packer(a_fold("patient", arrived=0.0))
    packer.add([a_fold("soon", arrived=60.0, deadline_ms=NOW_MS + 1000)], 60.0, NOW_MS)
    assert taken(packer, now=60.0, max_tokens=1).folds[0].sent == "patient"


# Deadlines and leases


def test_a_text_past_its_deadline_is_not_paid_for() -> None:
    """Deadlines are decided before the first call: the late work ends, another one of its text leads."""
    late, shared = a_fold(deadline_ms=NOW_MS - 1), a_fold(deadline_ms=NOW_MS - 1)
    follower = a_fold().works[0]
    shared.works.append(follower)
    call, ended = a_packer(late, shared).take(0.0, NOW_MS, 0.0, None)
    assert call is not None
    assert call.folds == [shared]
    assert shared.live_works() == [follower]
    assert ended == [late]
    for fold in (late, shared):
        outcome = fold.works[0].outcome
        assert outcome is not None
        assert outcome.fault is not None
        assert outcome.fault.code is ErrorCode.DEADLINE_EXCEEDED


def test_a_deadline_is_decided_once() -> None:
    """What was in a call may have been paid for: it is called again and delivered, late or not."""
    packer = a_packer(*[a_fold(deadline_ms=NOW_MS + 10) for _ in range(2)])
    packer.too_large(taken(packer))
    call, ended = packer.take(60.0, NOW_MS + 60_000, 0.0, None)
    assert call is not None
    assert not ended


def test_when_all_has_ended_there_is_no_call() -> None:
    """Folds that end instead are handed out, so that their outcomes can be delivered."""
    gone, late = a_fold(), a_fold(deadline_ms=NOW_MS - 1)
    gone.works[0].ticket.dropped = True
    packer = a_packer(gone, late)
    call, ended = packer.take(0.0, NOW_MS, 0.0, None)
    assert call is None
    assert sorted(fold.key for fold in ended) == sorted([gone.key, late.key])
    assert len(packer) == 0
    assert packer.take(0.0, NOW_MS, 0.0, None) == (None, [])


def test_what_nobody_wants_is_let_go() -> None:
    """Each rebalance leaves texts of lost partitions behind: pools and waiting calls forget them."""
    lost, kept = FakeLease(), FakeLease()
    packer = a_packer(*[a_fold(lease=lost, tenant=f"t{i % 2}") for i in range(7)], a_fold(lease=kept, tenant="t0"))
    packer.retry(Call(TINY, [a_fold(lease=lost)], rest=[a_fold(lease=kept)]))
    packer.retry(Call(TINY, [a_fold(lease=lost)], spared=[a_fold(lease=kept)]))
    packer.retry(Call(TINY, [a_fold(lease=lost), a_fold(lease=lost)]))
    assert packer.let_go() == []
    lost.revoked = True
    assert len(packer.let_go()) == 11
    assert len(packer) == 3
    calls = all_calls(packer)
    assert [len(call.folds) for call in calls] == [1, 2]
    assert all(fold.wanted for call in calls for fold in call.folds)


def test_what_is_kept_keeps_its_order() -> None:
    """When texts and calls are let go, what is due first among the others still goes first."""
    lost = FakeLease()
    packer = a_packer(
        a_fold("lost", deadline_ms=NOW_MS + 1000, lease=lost),
        a_fold("last", deadline_ms=NOW_MS + 9000),
        a_fold("next", deadline_ms=NOW_MS + 5000),
    )
    for not_before, lease in ((-9.0, lost), (-1.0, FakeLease()), (-5.0, FakeLease())):
        packer.retry(Call(TINY, [a_fold(lease=lease)], not_before=not_before))
    lost.revoked = True
    packer.let_go()
    assert [taken(packer).not_before for _ in range(2)] == [-5.0, -1.0]
    assert [taken(packer, max_tokens=1).folds[0].sent for _ in range(2)] == ["next", "last"]


# When a call is due


@pytest.mark.parametrize(
    "folds, function",
    [
        (8, {}),
        (4, {"max_tokens_per_call": 4}),
        (4, {"max_tokens_per_call": 5, "call_estimator": CallEstimator.BYTES_4}),
        (4, {"max_bytes_per_call": 40}),
    ],
    ids=["inputs", "tokens", "estimate", "bytes"],
)
def test_a_full_call_waits_for_nothing(folds: int, function: dict[str, Any]) -> None:
    """Whichever limit is reached, the call is due; a text fewer waits for more to come."""
    some = [a_fold(function=a_function(**function)) for _ in range(folds)]
    assert a_packer(*some).next_tokens(0.0, 1.0, None) == folds
    fewer = a_packer(*some[1:])
    assert fewer.next_tokens(0.0, 1.0, None) is None
    assert fewer.take(0.0, NOW_MS, 1.0, None) == (None, [])
    assert fewer.next_tokens(0.0, 1.0, folds - 1) == folds - 1


def test_patience_ends() -> None:
    """A call that is not full goes after the patience, at once without any."""
    packer = a_packer(a_fold(), now=5.0)
    assert packer.next_tokens(5.0, 0.0, None) == 1
    assert packer.due_at(5.0, 0.5) == 5.5
    assert packer.next_tokens(5.4, 0.5, None) is None
    assert packer.next_tokens(5.5, 0.5, None) == 1


def test_a_near_deadline_is_not_waited_for() -> None:
    """A text that is due sooner than the patience ends goes right away."""
    packer = a_packer(a_fold(deadline_ms=NOW_MS + 3000))
    assert packer.due_at(0.0, 2.0) == 1.0
    assert packer.next_tokens(0.9, 2.0, None) is None
    assert packer.next_tokens(1.0, 2.0, None) == 1


def test_what_is_left_over_waits_anew() -> None:
    """After a full call the rest is the beginning of the next one."""
    packer = a_packer(*[a_fold() for _ in range(10)])
    assert len(taken(packer, now=3.0).folds) == 8
    assert packer.due_at(3.0, 1.0) == 4.0
    assert packer.next_tokens(3.0, 1.0, None) is None


def test_nothing_is_due_of_nothing() -> None:
    """An empty packer gives no call and no time."""
    packer = a_packer()
    assert (packer.due_at(0.0, 1.0), packer.next_tokens(0.0, 0.0, None), len(packer)) == (None, None, 0)


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.none() | st.integers(5, 100), st.floats(0.0, 2.0))
def test_what_is_announced_is_what_is_given(corpus: Corpus, max_tokens: int | None, patience_s: float) -> None:
    """`take` gives a call exactly when `next_tokens` says so, of just so many tokens when it takes all there is."""
    packer, now = a_packer(*corpus.folds()), 0.0
    while (at := packer.due_at(now, patience_s)) is not None:
        announced = packer.next_tokens(now, patience_s, max_tokens)
        call, _ = packer.take(now, NOW_MS, patience_s, max_tokens)
        assert (announced is None) == (call is None)
        if call is not None and len(packer) == 0:
            assert announced == call.tokens
        now = max(now, at)


def test_functions_take_turns() -> None:
    """Of several pools that are due the one that was served least recently is next."""
    one, other = (a_function(prefix=prefix) for prefix in ("a", "b"))
    packer = a_packer(*[a_fold(function=one) for _ in range(20)], *[a_fold(function=other) for _ in range(20)])
    assert [call.function.prefix for call in all_calls(packer)] == ["a", "b"] * 3


def test_a_call_to_be_tried_again_is_whole_and_first() -> None:
    """From its time on it goes before what waits, with just the texts that it had, less those nobody wants."""
    packer = a_packer(*[a_fold() for _ in range(8)])
    call = taken(packer)
    call.not_before = 7.0
    packer.add([a_fold()], 0.0, NOW_MS)
    packer.retry(call)
    assert len(packer) == 9
    assert len(taken(packer).folds) == 1
    assert (packer.next_tokens(6.9, 0.0, None), packer.due_at(6.9, 0.0)) == (None, 7.0)
    assert packer.next_tokens(7.0, 0.0, 3) == 8
    call.folds[0].works[0].outcome = Outcome()
    again, ended = packer.take(7.0, NOW_MS, 0.0, 3)
    assert again is call
    assert (len(again.folds), len(ended)) == (7, 1)


# Calls that were too large


def test_a_call_that_was_too_large_halves_those_that_follow() -> None:
    """The smaller cap holds for every function of the model, and its texts go first and lose nothing."""
    packer = a_packer(*[a_fold(str(i)) for i in range(16)])
    large = taken(packer)
    packer.too_large(large)
    packer.add([a_fold(function=a_function(prefix="other")) for _ in range(8)], 0.0, NOW_MS)
    assert not any(fold.in_call for fold in large.folds)
    calls = all_calls(packer)
    assert [len(call.folds) for call in calls] == [4] * 6
    again = [fold for call in calls if not call.function.prefix for fold in call.folds]
    assert again[:8] == large.folds
    assert all(fold.in_call for fold in again)


def test_a_cap_holds_tokens_too() -> None:
    """Half of a call is half of its texts and half of its tokens."""
    packer = a_packer(*[a_fold(tokens=10) for _ in range(4)])
    packer.too_large(taken(packer))
    assert [call.tokens for call in all_calls(packer)] == [20, 20]
    packer.add([a_fold(tokens=3) for _ in range(6)], 0.0, NOW_MS)
    assert [len(call.folds) for call in all_calls(packer)] == [2, 2, 2]


def test_calls_made_before_the_cap_do_not_lower_it_again() -> None:
    """Several large calls in flight that fail for the same reason are one lesson."""
    packer = a_packer(*[a_fold() for _ in range(24)])
    for call in [taken(packer) for _ in range(3)]:
        packer.too_large(call)
    assert {len(call.folds) for call in all_calls(packer)} == {4}


def test_a_cap_grows_until_it_is_forgotten() -> None:
    """Calls that nearly fill the cap and succeed widen it by a quarter each; smaller ones say nothing."""
    packer = a_packer(*[a_fold() for _ in range(200)])
    packer.too_large(taken(packer))
    packer.fitted(Call(TINY, [a_fold()]))
    sizes = []
    for _ in range(6):
        call = taken(packer)
        packer.fitted(call)
        sizes.append(len(call.folds))
    assert sizes == [4, 5, 6, 7, 8, 8]


def test_a_limit_that_stays_is_seldom_tried() -> None:
    """Each time the cap proves too wide it takes twice as many good calls to widen it."""
    function = a_function(max_inputs_per_call=100, max_tokens_per_call=500)
    packer = a_packer(*[a_fold(function=function) for _ in range(200)])
    failed = []
    for number in range(300):
        packer.add([a_fold(function=function) for _ in range(60)], 0.0, NOW_MS)
        call = taken(packer)
        if len(call.folds) > 50:
            packer.too_large(call)
            failed.append(number)
        else:
            packer.fitted(call)
    assert len(failed) <= 9


def test_innocent_texts_of_a_search_go_at_once() -> None:
    """They have waited for a search already: no patience applies, and they come first."""
    packer = a_packer(*[a_fold("innocent") for _ in range(2)])
    call = taken(packer)
    packer.add([a_fold("fresh") for _ in range(3)], 1.0, NOW_MS)
    packer.give_back(call.folds, 1.0)
    assert packer.due_at(1.0, 10.0) == 1.0
    again, _ = packer.take(1.0, NOW_MS, 10.0, 2)
    assert again is not None
    assert again.folds == call.folds
