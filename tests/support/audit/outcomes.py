"""What became of every text: one outcome each, and its own vector."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from processor.domain import WHOLE_REQUEST, Chunk, ReceivedResult
from processor.identity import request_id
from tests.support.audit.books import Books


def check_outcomes(
    books: Books,
    *,
    vector_of: Callable[[str, int], np.ndarray[Any, Any]],
    dimensions: int,
    refused: Mapping[str, str] | None = None,
    refused_models: Mapping[str, str] | None = None,
    budgeted: Collection[str] = (),
) -> int:
    """Laws 1 and 6: one outcome per accepted chunk, none invented, copies agree, each vector is its own text's.

    A text that holds a marker of `refused` must have ended as an error of that code, a request for a model of
    `refused_models` as a whole, and no other as any but for a deadline of its own, or if its payer is `budgeted`.
    Returns how many records were copies beyond the first.
    """
    accepted = books.accepted()
    hurried = {request_id(request) for _, request in books.requests if request.deadline_ms is not None}
    outcomes: dict[tuple[str, int], ReceivedResult] = {}
    copies = 0
    for _, result in books.results:
        request = accepted.get(result.request_id)
        assert request is not None, f"a result for nobody: {result.request_id}"
        for name in ("tenant_id", "correlation_id", "collection", "document_id"):
            assert getattr(result, name) == getattr(request, name), f"another's {name}"
        assert dict(result.metadata) == dict(request.metadata)
        code = (refused_models or {}).get(request.model or "")
        excuses: set[str] = set()
        if code is not None:
            assert (result.chunk_index, result.length) == (WHOLE_REQUEST, len(request.chunks)), "of all its chunks"
            assert result.error
            assert result.error.code == code
            stands_for = range(len(request.chunks))
        else:
            position = result.chunk_index - request.first_chunk_index
            assert 0 <= position < len(request.chunks), "a chunk that was never sent"
            excuses |= {"deadline_exceeded"} if result.request_id in hurried else set()
            excuses |= {"budget_exceeded"} if (request.agent_owner_id or request.tenant_id) in budgeted else set()
            chunk = request.chunks[position]
            _check_outcome(result, chunk, _codes(chunk.text, refused or {}), excuses, vector_of, dimensions)
            stands_for = range(position, position + 1)
        for position in stands_for:
            place = (result.request_id, position)
            copies += place in outcomes
            first = outcomes.setdefault(place, result)
            assert (first.chunk_id, first.vector_id) == (result.chunk_id, result.vector_id)
            assert first.status == result.status or excuses, "copies that differ in status"
    missing = {(name, i) for name, request in accepted.items() for i in range(len(request.chunks))} - set(outcomes)
    assert not missing, f"{len(missing)} chunks without outcome, e.g. {sorted(missing)[:3]}"
    return copies


def _codes(text: str, refused: Mapping[str, str]) -> set[str]:
    """What this text must end as, if it is to fail."""
    if not text or text.isspace():
        return {"empty_text"}
    return {code for marker, code in refused.items() if marker in text}


def _check_outcome(
    result: ReceivedResult,
    chunk: Chunk,
    codes: set[str],
    excuses: set[str],
    vector_of: Callable[[str, int], np.ndarray[Any, Any]],
    dimensions: int,
) -> None:
    assert result.chunk_id == chunk.chunk_id
    assert dict(result.chunk_metadata) == dict(chunk.metadata), "metadata of another chunk"
    if codes or (excuses and result.status == "error"):
        assert result.status == "error", result.status
        assert result.error is not None
        assert result.error.code in codes | excuses, (result.error.code, codes, excuses)
        return
    assert result.status == "ok", (result.status, result.error)
    assert result.vector is not None
    assert result.vector.shape == (dimensions,)
    assert np.isfinite(result.vector).all()
    cosine = float(result.vector @ vector_of(chunk.text, dimensions) / np.linalg.norm(result.vector))
    assert cosine > 0.99, f"the vector of another text: cosine {cosine:.3f}"
