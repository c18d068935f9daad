"""What a provider's answer is worth: its vectors once they are verified, its bill, and each text's share of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from processor.domain import EmbeddingFunction, TokenSource, Vector
from processor.errors import ProviderTransient
from processor.ports import Clock, ProviderAnswer
from processor.work import Call

BYTES_A_TURN = 2_000_000
"""Of vectors, looked at in about two milliseconds; then everybody else gets a turn."""


async def verify(answer: ProviderAnswer, function: EmbeddingFunction, count: int, clock: Clock) -> list[Vector]:
    """The vectors in the order of the call's `count` texts, each finite, of the right dimension and not all zero.

    Raises ProviderTransient with what is wrong; a paid answer that fails here is an `invalid` receipt.
    """
    dimensions, accepted = function.dimensions, function.model.answers_as
    if len(answer.vectors) != count or sorted(answer.indices) != list(range(count)):
        raise ProviderTransient("wrong_count_or_indices")
    if accepted is not None and answer.model not in accepted:
        raise ProviderTransient("wrong_model")
    ordered: list[Vector] = [answer.vectors[0]] * count
    looked_at_bytes = 0
    for vector, index in zip(answer.vectors, answer.indices, strict=True):
        if vector.shape != (dimensions,):
            raise ProviderTransient("wrong_dimension")
        # One pass: a sum of squares is neither finite nor positive when an element or all of them are amiss. It can
        # overflow or vanish for numbers that are sound, so that only a suspicion is looked at closely.
        length = float(vector @ vector)
        if not 0.0 < length < np.inf:
            if not np.isfinite(vector).all():
                raise ProviderTransient("not_finite")
            if not vector.any():
                raise ProviderTransient("all_zero")
        ordered[index] = vector
        looked_at_bytes += vector.nbytes
        if looked_at_bytes >= BYTES_A_TURN:
            looked_at_bytes = 0
            await clock.sleep(0)
    return ordered


def bill(answer: ProviderAnswer, call: Call) -> tuple[int, TokenSource]:
    """What the provider says it billed; a server that says nothing is taken at the local count, which is named."""
    if answer.billed_tokens is None:
        return call.tokens, call.folds[0].token_source
    return answer.billed_tokens, TokenSource.PROVIDER


def split(billed: int, counts: Sequence[int]) -> list[int]:
    """Share a bill by local counts: largest remainder, ties by lower position (U1). The shares sum to the bill.

    With exact counts (their sum is the bill) each share is the local count, in any batch.
    """
    total = sum(counts)
    if total == 0:
        counts, total = [1] * len(counts), len(counts)
    if total == billed:
        return list(counts)
    shares = [billed * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(billed * counts[i] % total), i))
    for i in by_remainder[: billed - sum(shares)]:
        shares[i] += 1
    return shares
