"""Domain objects with defaults, so that a test shows only what matters to its law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from processor import identity
from processor.adapters.avro import encode_request
from processor.domain import (
    OPERATION_OF,
    Action,
    Amounts,
    CallItem,
    CallKind,
    Chunk,
    Operation,
    Part,
    ProviderCall,
    Record,
    Request,
    Result,
    Source,
    Status,
    TokenSource,
    Usage,
    VectorSpace,
)

NOW_MS = 1_790_000_000_000
"""2026-09-21T14:13:20Z: the present of the tests."""

SPACE = VectorSpace("text-embedding-3-small", "1", 1536, normalised=True)


def a_request(texts: Sequence[str] | None = None, **overrides: Any) -> Request:
    """A `generate` of one chunk; `texts` become chunks c0, c1, ...; any field of Request can be overridden."""
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "correlation_id": "corr-1",
        "action": Action.GENERATE.value,
        "collection": "docs",
        "document_id": "doc-1",
        "source_service": "tests",
        "requested_at_ms": NOW_MS - 1_000,
    }
    if "chunks" not in overrides and "chunk_ids" not in overrides:
        fields["chunks"] = some_chunks(["hello"] if texts is None else texts)
    return Request(**(fields | overrides))


def some_chunks(texts: Sequence[str], metadata: Mapping[str, str] | None = None) -> tuple[Chunk, ...]:
    return tuple(Chunk(f"c{index}", text, dict(metadata or {})) for index, text in enumerate(texts))


def a_source(
    offset: int = 0, *, topic: str = "embedding-requests", partition: int = 0, append_ms: int = NOW_MS
) -> Source:
    return Source(topic, partition, offset, append_ms)


def a_record(
    request: Request | bytes | None, source: Source | None = None, *, key: bytes | None = None, **place: Any
) -> Record:
    """A fetched record of a request (or of raw bytes); `place` are the keywords of `a_source`."""
    value = encode_request(request) if isinstance(request, Request) else request
    return Record(source or a_source(**place), key, value)


def a_vector(dimensions: int = 8, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A unit vector, float32 of shape (dimensions,), the same for the same seed."""
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)


def a_result(request: Request | None = None, index: int = 0, **overrides: Any) -> Result:
    """An `ok` result of the chunk at that place of the request, d=8; with status error there is no vector."""
    request = request or a_request()
    chunk = request.chunks[index] if index < len(request.chunks) else Chunk("c0", "")
    fields: dict[str, Any] = {
        "request": request,
        "source": a_source(),
        "request_id": identity.request_id(request),
        "chunk_index": request.first_chunk_index + index,
        "first_chunk_index": request.first_chunk_index,
        "length": 1,
        "chunk_id": chunk.chunk_id,
        "chunk_metadata": chunk.metadata,
        "status": Status.OK,
        "provider": "openai",
        "model": "text-embedding-3-small",
        "vector_space": str(replace(SPACE, dimensions=8)),
        "dimensions": 8,
        "token_count": 3,
        "token_source": TokenSource.PROVIDER,
        "cost_nanos": 60,
        "time_taken_ms": 120,
        "completed_at_ms": NOW_MS + 120,
    }
    fields |= overrides
    if fields["status"] is Status.OK and "vector" not in overrides:
        fields["vector"] = a_vector(fields["dimensions"], seed=index)
    if request.document_id is not None and fields["status"] is Status.OK and "vector_id" not in overrides:
        fields["vector_id"] = identity.vector_id(
            request.tenant_id, request.collection, request.document_id, chunk.chunk_id, fields["vector_space"]
        )
    return Result(**fields)


def a_usage(request: Request | None = None, **overrides: Any) -> Usage:
    """The usage event of a request whose texts were all embedded by one attempt, 3 tokens a text, none cached."""
    request = request or a_request()
    texts = len(request.chunks)
    characters = sum(len(chunk.text) for chunk in request.chunks)
    source = overrides.get("source") or a_source()
    fields: dict[str, Any] = {
        "request": request,
        "source": source,
        "request_id": identity.request_id(request),
        "payer_id": request.payer_id,
        "operation": OPERATION_OF.get(Action(request.action), Operation.DOCUMENT),
        "model": "text-embedding-3-small",
        "provider": "openai",
        "vector_space": str(SPACE),
        "billed": Amounts(texts, 3 * texts, characters, 60 * texts),
        "saved": Amounts(0, 0, 0, 0),
        "texts": texts,
        "characters": characters,
        "failed_texts": 0,
        "cached_texts": 0,
        "parts": (Part("attempt-1", 3 * texts),) if texts else (),
        "token_source": TokenSource.PROVIDER,
        "price_nanos_per_million": 20_000_000,
        "price_version": "openai-2024-01",
        "charged_at_ms": source.append_ms,
        "completed_at_ms": source.append_ms + 120,
        "time_taken_ms": 120,
    }
    return Usage(**(fields | overrides))


def a_call(kind: CallKind = CallKind.INTENT, **overrides: Any) -> ProviderCall:
    """An intent (or receipt) of one leader item of 3 tokens."""
    fields: dict[str, Any] = {
        "kind": kind,
        "attempt_id": "attempt-1",
        "at_ms": NOW_MS,
        "worker_id": "worker-1",
        "provider": "openai",
        "model": "text-embedding-3-small",
        "vector_space": str(SPACE),
        "items": (CallItem(identity.request_id(a_request()), 0, "acme", 3),),
        "estimated_tokens": 3,
    }
    if kind is CallKind.INTENT:
        fields["confirm_by_ms"] = NOW_MS + 120_000
    return ProviderCall(**(fields | overrides))
