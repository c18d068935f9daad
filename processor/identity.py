"""Identities: request id and digest (U0), vector ids. Golden vectors lie in schemas/examples/identity.json.

Every part is length-prefixed, so no two different inputs share an encoding; null is distinct from empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from uuid import UUID

from processor.domain import ACTION_ALIASES, Request, VectorSpace

REQUEST_NAMESPACE = UUID("6f1d7a52-3c0e-5b1f-9a77-0f4c2b9f6e10")
VECTOR_NAMESPACE = UUID("c2b8a4de-57a1-5f0d-8f3b-6d1e94a0b7c3")

NULL = b"-"


def encode_text(value: str | None) -> bytes:
    """`<byte length>:<UTF-8>`, or `-` for null."""
    if value is None:
        return NULL
    raw = value.encode()
    return b"%d:%b" % (len(raw), raw)


def encode_int(value: int | None) -> bytes:
    return encode_text(None if value is None else str(value))


def encode_map(value: Mapping[str, str]) -> bytes:
    """`m<entries>:` and then key and value by key bytes."""
    pairs = sorted((key.encode(), entry) for key, entry in value.items())
    body = b"".join(b"%d:%b%b" % (len(key), key, encode_text(entry)) for key, entry in pairs)
    return b"m%d:%b" % (len(pairs), body)


def encode_list(values: Sequence[bytes]) -> bytes:
    return b"l%d:%b" % (len(values), b"".join(values))


def digest(request: Request) -> bytes:
    """SHA-256 over what is asked for and who pays; never over reply_to, deadline, trace, times or source_service.

    Order of the parts: action (aliases resolved), tenant, agent, agent owner, collection, document, model,
    dimensions, input_type, use_cache, truncate, metadata, vector_spaces, first_chunk_index, chunk_count, chunks,
    chunk_ids. A chunk is its id, text and metadata; a bool is the text "true" or "false".
    """
    parts = [
        encode_text(ACTION_ALIASES.get(request.action, request.action)),
        encode_text(request.tenant_id),
        encode_text(request.agent_id),
        encode_text(request.agent_owner_id),
        encode_text(request.collection),
        encode_text(request.document_id),
        encode_text(request.model),
        encode_int(request.dimensions),
        encode_text(request.input_type),
        encode_text("true" if request.use_cache else "false"),
        encode_text(request.truncate),
        encode_map(request.metadata),
        encode_list([encode_text(space) for space in request.vector_spaces]),
        encode_int(request.first_chunk_index),
        encode_int(request.chunk_count),
        encode_list(
            [
                encode_text(chunk.chunk_id) + encode_text(chunk.text) + encode_map(chunk.metadata)
                for chunk in request.chunks
            ]
        ),
        encode_list([encode_text(chunk_id) for chunk_id in request.chunk_ids]),
    ]
    return hashlib.sha256(b"".join(parts)).digest()


def uuid5(namespace: UUID, name: bytes) -> str:
    """UUID version 5 (RFC 9562, section 5.5) of raw bytes; the standard library takes only text before 3.12."""
    raw = hashlib.sha1(namespace.bytes + name, usedforsecurity=False).digest()[:16]
    return str(UUID(bytes=raw, version=5))


def request_id(request: Request) -> str:
    """UUIDv5 of requester tenant, correlation id, digest and run id: the same request sent again is the same charge."""
    name = (
        encode_text(request.tenant_id)
        + encode_text(request.correlation_id)
        + encode_text(digest(request).hex())
        + encode_text(request.run_id)
    )
    return uuid5(REQUEST_NAMESPACE, name)


def vector_id(
    tenant_id: str, collection: str | None, document_id: str | None, chunk_id: str, space: VectorSpace | str
) -> str:
    """UUIDv5 under which a sink keeps this chunk's vector of this space."""
    name = b"".join(map(encode_text, (tenant_id, collection, document_id, chunk_id, str(space))))
    return uuid5(VECTOR_NAMESPACE, name)
