"""Windows: which texts are looked up together, and in which order."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.batching import TURN_TEXTS, Batcher
from processor.domain import Item
from processor.work import Job, Policy, Window, Work
from tests.support.builders import a_request, a_source
from tests.support.folds import TINY
from tests.support.steps import FakeLease

NUMBERS = itertools.count()


def add(batcher: Batcher, count: int, tenant: str = "acme", *, lease: FakeLease | None = None) -> None:
    """So many texts, none like another, which arrive now."""
    for number in itertools.islice(NUMBERS, count):
        request = a_request([f"text {number}"], tenant_id=tenant)
        job = Job(lease or FakeLease(), a_source(number), 1, float(number), request=request, request_id=f"r{number}")
        work = Work(job, chunk_id="c0", chunk=request.chunks[0], item=Item(f"r{number}", 0))
        batcher.add(work, b"%d" % number, TINY, float(number))


def equal_to_all(batcher: Batcher, tenant: str, numbers: range) -> None:
    """The tenant's texts, each equal to one that waits: with a shared scope they have its key."""
    for number in numbers:
        request = a_request([f"text {number}"], tenant_id=tenant)
        job = Job(FakeLease(), a_source(number), 1, 0.0, request=request, request_id=f"{tenant}{number}")
        batcher.add(Work(job, chunk_id="c0", chunk=request.chunks[0], item=Item("r", 0)), b"%d" % number, TINY, 0.0)


def closed(batcher: Batcher) -> Window:
    window = batcher.take(0.0, flush=True)
    assert window is not None
    return window


def tenants(window: Window) -> list[str]:
    return [fold.works[0].job.request.tenant_id for fold in window.folds]


def test_a_window_holds_the_oldest_texts_of_a_tenant_in_their_order() -> None:
    """With one tenant alone nothing is put in another order."""
    batcher = Batcher(Policy(window_max_texts=100))
    add(batcher, 250)
    windows = [closed(batcher) for _ in range(3)]
    assert [len(window.folds) for window in windows] == [100, 100, 50]
    arrivals = [fold.waiting_since for window in windows for fold in window.folds]
    assert arrivals == sorted(arrivals)


def test_a_small_tenant_is_in_the_next_window() -> None:
    """However many texts of another wait before it, it waits for no more than a turn of theirs."""
    batcher = Batcher(Policy(window_max_texts=100))
    add(batcher, 5_000, "large")
    add(batcher, 10, "small")
    assert tenants(closed(batcher))[TURN_TEXTS:].count("small") == 10


def test_a_text_shared_by_tenants_goes_in_the_turn_that_comes_first() -> None:
    """With a shared scope a small tenant's texts don't wait behind a large one's that asked for some of them first."""
    batcher = Batcher(Policy(window_max_texts=100))
    first = next(NUMBERS) + 1
    add(batcher, 5_000, "large")
    equal_to_all(batcher, "small", range(first + 4_000, first + 4_010))
    folds = closed(batcher).folds
    assert sum(len(fold.works) == 2 for fold in folds) == 10
    while (window := batcher.take(0.0, flush=True)) is not None:
        folds += window.folds
    assert len(set(map(id, folds))) == len(folds) == 5_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 120))
def test_every_text_is_in_one_window(counts: list[int], most: int) -> None:
    """Nothing is lost or doubled by the turns, and no window is larger than allowed."""
    batcher = Batcher(Policy(window_max_texts=most))
    for tenant, count in enumerate(counts):
        add(batcher, count, f"t{tenant}")
    seen: Counter[bytes] = Counter()
    while (window := batcher.take(0.0, flush=True)) is not None:
        assert len(window.folds) <= most
        seen.update(fold.key for fold in window.folds)
    assert len(batcher) == 0
    assert set(seen.values()) == {1}
    assert len(seen) == sum(counts)


@pytest.mark.parametrize("gone", ["large", "small"])
def test_what_is_let_go_takes_no_room_in_a_window(gone: str) -> None:
    """Texts of a revoked partition are passed over, whoever's turn it is."""
    batcher = Batcher(Policy(window_max_texts=100))
    leases = {"large": FakeLease(), "small": FakeLease()}
    for tenant, count in (("large", 200), ("small", 40)):
        add(batcher, count, tenant, lease=leases[tenant])
    leases[gone].revoked = True
    batcher.let_go()
    assert set(tenants(closed(batcher))) == {"large", "small"} - {gone}
