"""Vectors shortened on our side are of length 1 again, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from processor.adapters.local_calls import failure
from processor.adapters.shortening import Shortening, shortened
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate, Vector
from processor.errors import CallTooLarge, ProviderTransient
from processor.ports import ProviderAnswer

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=finite), st.integers(1, 40))
def test_a_shortened_vector_has_length_one_and_the_direction_of_its_first_values(vector: Vector, size: int) -> None:
    """Of any numbers that float32 can hold; of nothing but zeros none can be made."""
    head = vector[:size].astype(np.float64)
    length = float(np.sqrt(head @ head))
    found = shortened(vector, size)
    assert found.dtype == np.float32
    assert found.shape == head.shape
    if length == 0:
        assert not found.any()
    else:
        assert np.isclose(np.linalg.norm(found.astype(np.float64)), 1, atol=1e-6)
        assert np.allclose(found, head / length, atol=1e-6)


@given(st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_stays_so(value: float) -> None:
    """The verification must see it."""
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(shortened(np.array([1, value, 2], np.float32), 2)).all()


class Whole:
    """Answers with a vector of eight ones a text, the second one too short, and notes what it was asked for."""

    name = "whole"

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        self.asked.append(function.dimensions)
        vectors = [np.ones(7 if index == 1 else 8, np.float32) for index in range(len(texts))]
        return ProviderAnswer(vectors, range(len(texts)), function.model.name, 5)

    async def list_models(self) -> Sequence[str]:
        return ["m"]

    async def close(self) -> None:
        self.asked.clear()


@pytest.mark.parametrize(
    "here,size,asked,sizes",
    [(True, 4, 8, [4, 7]), (True, 8, 8, [8, 7]), (False, 4, 4, [8, 7])],
)
async def test_only_what_is_shortened_here_is_asked_for_whole(
    here: bool, size: int, asked: int, sizes: list[int]
) -> None:
    """A vector of another size than expected goes on as it is, for the verification to refuse."""
    inner = Whole()
    model = ModelSpec(name="m", weights="m", dimensions=(8,), shortenable=True, shortened_here=here)
    function = EmbeddingFunction(model, model.space(size), InputType.DOCUMENT, "", Truncate.ERROR)
    provider = Shortening(inner)
    answer = await provider.embed(["a", "b"], function, "attempt")
    assert (inner.asked, answer.billed_tokens, list(answer.indices)) == ([asked], 5, [0, 1])
    assert [vector.size for vector in answer.vectors] == sizes
    assert (provider.name, await provider.list_models()) == ("whole", ["m"])
    await provider.close()
    assert inner.asked == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 388.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 13194139533312"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_runtime_without_memory_asks_for_smaller_calls(error: Exception) -> None:
    """In the words of torch and onnxruntime; a call of one text can't be made smaller."""
    assert isinstance(failure(error, 2), CallTooLarge)
    assert isinstance(failure(error, 1), ProviderTransient)
    assert failure(error, 2).code == "out_of_memory"


def test_what_a_runtime_says_goes_no_further() -> None:
    """Its message may quote a text: only its class is told."""
    told = failure(ValueError("canary-7d1f"), 2)
    assert isinstance(told, ProviderTransient)
    assert str(told) == "inference_valueerror"
