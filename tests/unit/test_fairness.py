"""Whose text goes next: shares of tenants by their weights, and nearly due texts first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.fairness import Text, Turns
from tests.support.builders import NOW_MS
from tests.support.folds import a_fold, a_function, a_packer, all_calls, taken, tenants
from tests.support.steps import FakeLease


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
        turns.push(Text(0.0, number, fold, 100, 400, 1, fold.tenant_id))
    for _ in range(200):
        turns.settle(charged=turns.borrow(1), returned=[])
    went = [text.fold for _ in range(60) if (text := turns.pop()) is not None]
    assert tenants(went).count("a") >= 20


def test_a_text_keeps_its_turn_when_another_tenant_is_left_with_it() -> None:
    """With a shared scope: who asked first is gone, and what is borrowed is settled with the turn that it came from."""
    turns = Turns({})
    fold = a_fold(tenant="first")
    turns.push(Text(0.0, 0, fold, 100, 400, 1, fold.tenant_id))
    fold.works = a_fold(tenant="joined").works
    borrowed = turns.borrow(1)
    turns.settle(charged=[], returned=borrowed)
    assert turns.pop() == borrowed[0]
    assert turns.pop() is None


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


def test_what_was_put_back_holds_up_no_other_tenant() -> None:
    """A backlog whose calls turned out too large goes on in its tenant's turns."""
    function = a_function(max_inputs_per_call=100, max_tokens_per_call=100_000)
    packer = a_packer(*[a_fold(tokens=100, function=function, tenant="large") for _ in range(1_000)])
    for call in [taken(packer) for _ in range(10)]:
        packer.too_large(call)
    packer.too_large(taken(packer))
    packer.add([a_fold(tokens=100, function=function, tenant="small")], 0.0, NOW_MS)
    assert any("small" in tenants(taken(packer).folds) for _ in range(3))
