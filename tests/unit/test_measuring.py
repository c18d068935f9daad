"""Step 4, first half: what a miss measures, and what is cut off."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from processor.domain import CallEstimator, ErrorCode, ModelSpec, TokenSource, Truncate
from processor.measuring import SLICE_CHARACTERS, TURN_S, measure
from processor.ports import TokenCounts
from processor.work import Fold
from tests.support.folds import a_fold, a_function
from tests.support.steps import VirtualClock, WordCounter


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
    """The event loop has its turn after two milliseconds of counting, whatever the tokenizer takes for a text."""
    turns: list[float] = []

    class Clock(VirtualClock):
        async def sleep(self, seconds: float) -> None:
            turns.append(self.now_s)

    clock = Clock()

    class Counter(WordCounter):
        def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
            clock.now_s += 0.3e-6 * sum(map(len, texts))
            return super().count(texts, model)

    await measure([a_fold("w" * 1000) for _ in range(100)], Counter(), clock)
    assert clock.now_s > 0.02
    longest_s = max(later - before for before, later in itertools.pairwise([0, *turns, clock.now_s]))
    assert longest_s < TURN_S + 0.3e-6 * (SLICE_CHARACTERS + 1000)
    assert len(turns) <= clock.now_s / TURN_S
