"""Step 4, first half: what a miss sends and how large it is."""

from __future__ import annotations

from collections.abc import Sequence

from processor.decode import too_long
from processor.domain import CallEstimator, EmbeddingFunction, Truncate
from processor.ports import Clock, TokenCounter
from processor.work import Fold

SLICE_CHARACTERS, TURN_S = 4_096, 0.002
"""Texts are counted a slice at a time: 0.1 ms of byte pairs, 1.2 ms of word pieces. Everybody else gets a turn once
that has taken so long, no sooner: on a busy loop several calls begin in a few turns."""


async def measure(folds: Sequence[Fold], counter: TokenCounter, clock: Clock) -> None:
    """Fill in what each fold sends and how large it is, or the fault of a text that is too long.

    Counting is CPU-bound: everybody else gets a turn every `TURN_S`.
    """
    start, since = 0, clock.monotonic()
    while start < len(folds):
        function, end, characters = folds[start].function, start, 0
        texts: list[str] = []
        while end < len(folds) and folds[end].function is function and characters < SLICE_CHARACTERS:
            texts.append(function.prefix + folds[end].text)
            characters += len(texts[-1])
            end += 1
        _measure(folds[start:end], texts, function, counter)
        start = end
        if clock.monotonic() - since >= TURN_S:
            await clock.sleep(0)
            since = clock.monotonic()


def _measure(folds: Sequence[Fold], texts: Sequence[str], function: EmbeddingFunction, counter: TokenCounter) -> None:
    model = function.model
    counts, source = counter.count(texts, model)
    for fold, text, tokens in zip(folds, texts, counts, strict=True):
        fold.fault = too_long(tokens, function)
        if fold.fault is None and tokens > model.max_input_tokens:
            text, whole = _cut(fold.text, function, counter), tokens
            tokens = counter.count([text], model).counts[0]
            fold.cut_tokens = whole - tokens
        fold.sent = text
        fold.tokens = tokens
        fold.token_source = source
        fold.sent_bytes = len(text) if text.isascii() else len(text.encode())
        fold.estimated = -(-fold.sent_bytes // 4) if model.call_estimator is CallEstimator.BYTES_4 else tokens


def _cut(text: str, function: EmbeddingFunction, counter: TokenCounter) -> str:
    """The text with its prefix, cut to the model's limit; the prefix stays whichever end is cut off."""
    model, prefix = function.model, function.prefix
    limit = model.max_input_tokens
    if function.truncate is Truncate.END or not prefix:
        return counter.truncate(prefix + text, model, limit, keep_end=function.truncate is Truncate.START)
    room = limit - counter.count([prefix], model).counts[0]
    while True:
        cut = prefix + counter.truncate(text, model, max(0, room), keep_end=True)
        # Where prefix and text meet, tokens may fall apart into more of them.
        if room <= 0 or counter.count([cut], model).counts[0] <= limit:
            return cut
        room -= 1
