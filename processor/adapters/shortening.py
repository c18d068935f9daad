"""Vectors shortened on our side: their first values, of length 1 again, for servers that can't be asked for fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from processor.domain import EmbeddingFunction, Vector
from processor.ports import EmbeddingProvider, ProviderAnswer


class Shortening:
    """An EmbeddingProvider around another, which is asked for whole vectors of models that are `shortened_here`.

    Of every other function, and of one that wants the model's own size, it changes nothing.
    """

    def __init__(self, provider: EmbeddingProvider) -> None:
        self.name = provider.name
        self._provider = provider

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        model = function.model
        whole = model.dimensions[0]
        if not model.shortened_here or function.dimensions == whole:
            return await self._provider.embed(texts, function, attempt_id)
        asked = replace(function, space=model.space(whole))
        answer = await self._provider.embed(texts, asked, attempt_id)
        # One of another size is amiss: it goes on as it is, for the verification to say so.
        return answer._replace(
            vectors=[
                shortened(vector, function.dimensions) if vector.shape == (whole,) else vector
                for vector in answer.vectors
            ]
        )

    async def list_models(self) -> Sequence[str]:
        return await self._provider.list_models()

    async def close(self) -> None:
        await self._provider.close()


def shortened(vector: Vector, dimensions: int) -> Vector:
    """The first `dimensions` values as float32 of length 1; zeros stay zeros, and what is not finite stays so."""
    # In float64 no square of a float32 overflows or vanishes.
    head = vector[:dimensions].astype(np.float64)
    length = np.sqrt(head @ head)
    short: Vector = (head / length if 0.0 < length < np.inf else head).astype(np.float32)
    return short
