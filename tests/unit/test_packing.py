"""Step 4, second half: how full the calls are that are made of misses, and when they are due."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.domain import (
    CallEstimator,
    ErrorCode,
)
from processor.pools import LOOK_AHEAD
from processor.work import Call, Fold, Outcome
from tests.support.builders import NOW_MS
from tests.support.folds import TINY, a_fold, a_function, a_packer, all_calls, taken
from tests.support.steps import FakeLease

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
    assert asked <= 2 * 4 + 1 + LOOK_AHEAD


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


def test_who_is_left_of_a_search_is_decided_on_too() -> None:
    """Both halves were called for requests that are gone: who has joined them since and is late pays for neither."""
    lost = FakeLease()
    halves = [a_fold(lease=lost), a_fold(lease=lost)]
    for half in halves:
        half.works.append(a_fold(deadline_ms=NOW_MS - 1).works[0])
    packer = a_packer()
    packer.retry(Call(TINY, halves[:1], rest=halves[1:]))
    lost.revoked = True
    assert packer.take(0.0, NOW_MS, 0.0, None) == (None, halves)


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
    assert set(map(id, large.folds)) <= set(map(id, again[:12])), "beside one that was next already"
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


def test_what_failed_in_a_row_is_one_lesson() -> None:
    """After an outage of calls without an answer a few good ones of each size make them as large as before."""
    function = a_function(max_inputs_per_call=100, max_tokens_per_call=500)
    packer = a_packer(*[a_fold(function=function) for _ in range(1_000)])
    while len((call := taken(packer)).folds) > 1:
        packer.too_large(call)
    good = 0
    while len(call.folds) < 100:
        packer.fitted(call)
        call = taken(packer)
        good += 1
    assert good <= 25


def test_texts_of_no_tokens_can_be_called_after_a_failure() -> None:
    """Half of nothing is no limit that anything could be measured by."""
    packer = a_packer(*[a_fold("", tokens=0) for _ in range(4)])
    packer.too_large(taken(packer))
    assert [len(call.folds) for call in all_calls(packer)] == [2, 2]


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
