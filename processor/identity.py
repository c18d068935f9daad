"""Identities: request id and digest (U0), refusal key, vector id. Golden vectors lie in schemas/examples/identity.json.

Every part is length-prefixed, so no two different inputs share an encoding; null is distinct from empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from uuid import UUID

from processor.domain import ACTION_ALIASES, Request, VectorSpace

REQUEST_NAMESPACE = UUID("6f1d7a52-3c0e-5b1f-9a77-0f4c2b9f6e10")
VECTOR_NAMESPACE = UUID("c2b8a4de-57a1-5f0d-8f3b-6d1e94a0b7c3")

NULL = b"-"
EMPTY_MAP = b"m0:"
EMPTY_LIST = b"l0:"
WHOLE = b"1:0-"
"""Of a request that was not split: its first chunk index is 0, its chunk count null."""

MAX_SENDERS = 1_024
"""Of how many senders something is remembered, see `Request.sender`."""

_REQUESTS, _VECTORS = REQUEST_NAMESPACE.bytes, VECTOR_NAMESPACE.bytes
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))
"""The hex digit of a UUID that holds its variant, for each that a hash has there."""


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
    parts = [b"m%d:" % len(value)]
    for key in sorted(value):  # by code points, which is the order of their UTF-8
        parts += (encode_text(key), encode_text(value[key]))
    return b"".join(parts)


def encode_list(values: Sequence[bytes]) -> bytes:
    return b"l%d:%b" % (len(values), b"".join(values))


def digest(request: Request) -> bytes:
    """SHA-256 over what is asked for and who pays; never over reply_to, deadline, trace, times or source_service.

    Order of the parts: action (aliases resolved), tenant, agent, agent owner, collection, document, model,
    dimensions, input_type, use_cache, truncate, metadata, vector_spaces, first_chunk_index, chunk_count, chunks,
    chunk_ids. A chunk is its id, text and metadata; a bool is the text "true" or "false".
    """
    return hashlib.sha256(_encode(request)).digest()


def _encode(request: Request) -> bytes:
    before, after = _senders.get(request.sender) or _sender(request)
    whole = request.first_chunk_index == 0 and request.chunk_count is None
    parts = [
        before,
        encode_text(request.document_id),
        after,
        WHOLE if whole else encode_int(request.first_chunk_index) + encode_int(request.chunk_count),
        b"l%d:" % len(request.chunks),
    ]
    for chunk in request.chunks:
        chunk_id, text = chunk.chunk_id.encode(), chunk.text.encode()
        parts += (
            b"%d:%b%d:" % (len(chunk_id), chunk_id, len(text)),
            text,
            encode_map(chunk.metadata) if chunk.metadata else EMPTY_MAP,
        )
    chunk_ids = request.chunk_ids
    parts.append(encode_list([encode_text(chunk_id) for chunk_id in chunk_ids]) if chunk_ids else EMPTY_LIST)
    return b"".join(parts)


_senders: dict[object, tuple[bytes, bytes]] = {}


def _sender(request: Request) -> tuple[bytes, bytes]:
    """The parts of a digest before and after the document, up to vector_spaces."""
    before = (
        ACTION_ALIASES.get(request.action, request.action),
        request.tenant_id,
        request.agent_id,
        request.agent_owner_id,
        request.collection,
    )
    after = (
        encode_text(request.model),
        encode_int(request.dimensions),
        encode_text(request.input_type),
        encode_text("true" if request.use_cache else "false"),
        encode_text(request.truncate),
        encode_map(request.metadata),
        encode_list([encode_text(space) for space in request.vector_spaces]),
    )
    parts = b"".join(map(encode_text, before)), b"".join(after)
    if request.sender is not None:
        if len(_senders) >= MAX_SENDERS:
            _senders.clear()
        _senders[request.sender] = parts
    return parts


def _uuid5(name: bytes) -> str:
    """UUID version 5 (RFC 9562, section 5.5) of a namespace's bytes and a name, as text."""
    text = hashlib.sha1(name, usedforsecurity=False).hexdigest()
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}"


def request_id(request: Request) -> str:
    """UUIDv5 of requester tenant, correlation id, digest and run id: the same request sent again is the same charge."""
    tenant_id, correlation_id = request.tenant_id.encode(), request.correlation_id.encode()
    return _uuid5(
        b"%b%d:%b%d:%b64:%b%b"
        % (
            _REQUESTS,
            len(tenant_id),
            tenant_id,
            len(correlation_id),
            correlation_id,
            hashlib.sha256(_encode(request)).hexdigest().encode(),
            encode_text(request.run_id),
        )
    )


def refusal_key(request_id: str) -> str:
    """The idempotency key of a usage event that refuses the request: UUIDv5 of `refusal`, the id is the namespace."""
    return _uuid5(UUID(request_id).bytes + b"refusal")


def vector_id(
    tenant_id: str, collection: str | None, document_id: str | None, chunk_id: str, space: VectorSpace | str
) -> str:
    """UUIDv5 under which a sink keeps this chunk's vector of this space."""
    before, after = _scope(tenant_id, collection, space)
    chunk = chunk_id.encode()
    return _uuid5(b"%b%b%d:%b%b" % (before, encode_text(document_id), len(chunk), chunk, after))


@lru_cache(maxsize=MAX_SENDERS)
def _scope(tenant_id: str, collection: str | None, space: VectorSpace | str) -> tuple[bytes, bytes]:
    """The parts of a vector id before the document and after the chunk id."""
    return _VECTORS + encode_text(tenant_id) + encode_text(collection), encode_text(str(space))
