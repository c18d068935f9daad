"""Windows and calls: what goes into one call, and how an over-long text is cut for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from processor.batching import Call, pack
from processor.domain import EmbeddingFunction, InputType, Item, Truncate
from processor.work import Fold, Job, Work
from tests.support.builders import NOW_MS, a_request, a_source
from tests.support.steps import MODEL, FakeLease, WordCounter


def packed(*texts: str, prefix: str = "", truncate: Truncate = Truncate.ERROR) -> list[Call]:
    """The calls for these texts by the tiny model: 10 words a text, 8 texts and 40 words a call."""
    model = replace(MODEL, prefixes={InputType.DOCUMENT: prefix})
    function = EmbeddingFunction(model, model.space(4), InputType.DOCUMENT, prefix, truncate)
    request = a_request(texts)
    job = Job(FakeLease(), a_source(), 1, 0.0, request=request, request_id="r")
    works = [
        Work(job, chunk_id=chunk.chunk_id, chunk=chunk, item=Item("r", i)) for i, chunk in enumerate(request.chunks)
    ]
    folds = [Fold(b"%d" % i, function, [work], 0.0, 1) for i, work in enumerate(works)]
    return pack(folds, WordCounter(), NOW_MS)


@pytest.mark.parametrize("truncate, kept", [(Truncate.END, "w0 w1"), (Truncate.START, "w10 w11")])
def test_a_text_is_cut_around_its_prefix(truncate: Truncate, kept: str) -> None:
    """Law 6: the prefix is part of the embedding function, so no cut may take it away."""
    (call,) = packed(" ".join(f"w{i}" for i in range(12)), prefix="search query: ", truncate=truncate)
    (text,) = call.texts
    assert text.startswith("search query: ")
    assert kept in text
    assert call.counts == [len(text.split())] == [10]


def test_a_prefix_that_leaves_no_room_stands_alone() -> None:
    """Cutting ends, whatever the operator's prefix."""
    (call,) = packed("a b c", prefix="p " * 10, truncate=Truncate.START)
    assert call.texts == ["p " * 10]


def test_calls_are_filled_up_to_the_limits_of_the_model() -> None:
    """Few, full calls: neither 8 texts nor 40 words are exceeded, and the order is kept."""
    calls = packed(*["one"] * 9, *["w " * 9] * 5)
    assert [len(call.texts) for call in calls] == [8, 5, 1]
    assert [sum(call.counts) for call in calls] == [8, 37, 9]
