"""Token counts against published ones, and truncation by tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.adapters import local_files
from processor.adapters.tokens import WORDPIECE, LocalTokenCounter
from processor.domain import ModelSpec, TokenSource
from tests.support.builders import a_request
from tests.support.steps import Bench

COUNTER = LocalTokenCounter()


def a_model(tokenizer: str | None) -> ModelSpec:
    if tokenizer == "wordpiece":
        tokenizer = f"{WORDPIECE}{local_files.builtin_tokenizer()}"
    return ModelSpec(name="m", weights="m", dimensions=(8,), tokenizer=tokenizer)


def count(text: str, tokenizer: str | None) -> int:
    return COUNTER.count([text], a_model(tokenizer)).counts[0]


@pytest.mark.parametrize(
    "text,cl100k,o200k,wordpiece,estimated",
    [
        ("hello world", 2, 2, 4, 3),
        ("tiktoken is great!", 6, 6, 9, 5),
        ("antidisestablishmentarianism", 6, 6, 10, 7),
        ("2 + 2 = 4", 7, 7, 7, 3),
        ("お誕生日おめでとう", 9, 8, 11, 7),
        ("<|endoftext|>", 7, 7, 10, 4),
        ("[SEP] [CLS]", 6, 6, 9, 3),
        ("a\x00b", 3, 3, 3, 1),
        ("", 0, 0, 2, 1),
        ("'rer", 2, 2, 5, 1),
        ("today\n ", 3, 3, 3, 2),
        ("today\n \n", 2, 2, 3, 2),
        (" \x850", 4, 4, 3, 1),
        ("👍", 3, 1, 3, 1),
        ("def f(x):\n    return x", 7, 7, 10, 6),
        ("<|endofprompt|>", 7, 7, 10, 4),
        ("<|fim_prefix|>", 7, 6, 10, 4),
        ("[MASK]", 3, 3, 5, 2),
    ],
)
def test_counts_are_the_published_ones(text: str, cl100k: int, o200k: int, wordpiece: int, estimated: int) -> None:
    """Special tokens in a text are ordinary text; the two that frame a text of a BERT model are counted."""
    assert count(text, "cl100k_base") == cl100k
    assert count(text, "o200k_base") == o200k
    assert count(text, "wordpiece") == wordpiece
    assert count(text, None) == estimated


@pytest.mark.parametrize(
    "tokenizer,source",
    [("cl100k_base", TokenSource.TOKENIZER), ("wordpiece", TokenSource.TOKENIZER), (None, TokenSource.ESTIMATE)],
)
def test_a_count_says_whether_it_is_exact(tokenizer: str | None, source: TokenSource) -> None:
    """An estimate is never passed off as a count."""
    assert COUNTER.count(["x"], a_model(tokenizer)).source is source


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_an_estimate_is_at_least_one_token(text: str) -> None:
    """U1: a split by estimates gives every text a share, and no text is longer than its bytes."""
    assert 1 <= count(text, None) <= max(1, len(text.encode()))


async def test_a_charge_by_estimates_says_so() -> None:
    """U1: where neither provider nor tokenizer tells, each text is charged what it is estimated at, named as that."""
    async with Bench(counter=COUNTER) as bench:
        bench.provider.spoil = lambda answer: answer._replace(billed_tokens=None)
        outbox = await bench.handle(a_request(["a", "two words"]))
        usage = outbox.usage[0]
        assert usage.token_source is TokenSource.ESTIMATE
        assert usage.billed.tokens == 1 + 3
        assert [(result.token_count, result.token_source) for result in outbox.results] == [
            (1, TokenSource.ESTIMATE),
            (3, TokenSource.ESTIMATE),
        ]


def test_a_tokenizer_that_is_not_installed_leaves_an_estimate() -> None:
    """An unknown name counts as none."""
    assert COUNTER.count(["x"], a_model("some-other-bpe")).source is TokenSource.ESTIMATE


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("a🎉é 文", max_size=60)


@given(texts, st.sampled_from(["cl100k_base", "wordpiece", None]), st.integers(0, 20), st.booleans())
def test_a_cut_is_an_end_of_the_text_within_the_limit(
    text: str, tokenizer: str | None, limit: int, keep_end: bool
) -> None:
    """Head or tail, at most `limit` tokens, and untouched when it fits."""
    model = a_model(tokenizer)
    cut = COUNTER.truncate(text, model, limit, keep_end=keep_end)
    assert text.endswith(cut) if keep_end else text.startswith(cut)
    assert cut == "" or count(cut, tokenizer) <= limit
    if count(text, tokenizer) <= limit:
        assert cut == text


@pytest.mark.parametrize("tokenizer,kept", [("cl100k_base", 50), ("o200k_base", 50), ("wordpiece", 48)])
@pytest.mark.parametrize("keep_end", [False, True])
def test_a_cut_keeps_as_much_as_fits(tokenizer: str, kept: int, keep_end: bool) -> None:
    """Of plain words, one token each, none is given up needlessly."""
    words = ["table"] * 200
    cut = COUNTER.truncate(" ".join(words), a_model(tokenizer), 50, keep_end=keep_end)
    assert len(cut.split()) == kept
    assert count(cut, tokenizer) == 50
