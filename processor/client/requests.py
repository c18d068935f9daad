"""What a caller hands over, checked and cut into requests that fit, before any of it is produced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypedDict, TypeVar

from processor.domain import ACTION_ALIASES, EMBEDDING_ACTIONS, Action, Chunk, Request
from processor.errors import RequestRefused

MAX_CHUNKS = 2_048
MAX_METADATA_BYTES = 8_192
MAX_TENANT_BYTES = 256
MAX_CORRELATION_BYTES = 1_024
STRING_SPARE_BYTES = 10
"""More than Avro puts before a string, a map or a block."""

TEXT_ACTIONS = EMBEDDING_ACTIONS | {Action.VALIDATE}

Part = TypeVar("Part", Chunk, str)


class RequestOptions(TypedDict, total=False):
    """What a request may say beside its texts; each field is one of the schema `EmbeddingRequest`.

    `correlation_id` defaults to a fresh one; send the same one again to repeat a request without a second charge.
    `deadline_ms` is UTC milliseconds: a text not embedded by then fails with `deadline_exceeded`.
    """

    correlation_id: str
    model: str | None
    dimensions: int | None
    input_type: str | None
    use_cache: bool
    truncate: str | None
    task_id: str | None
    task_total: int | None
    agent_id: str | None
    agent_owner_id: str | None
    conversation_id: str | None
    deadline_ms: int | None
    run_id: str | None
    metadata: Mapping[str, str]


class Encode(Protocol):
    """Gives the value of a request as it will be produced."""

    def __call__(self, request: Request) -> bytes: ...


def as_chunks(texts: Sequence[str | Chunk]) -> tuple[Chunk, ...]:
    """Chunks as they are; plain texts become chunks named by their place: "0", "1", ..."""
    if isinstance(texts, str):
        raise RequestRefused("texts: is one text; pass a list of texts")
    return tuple(text if isinstance(text, Chunk) else Chunk(str(place), text) for place, text in enumerate(texts))


def check(request: Request) -> None:
    """Raise RequestRefused for what no worker could accept or even read. Empty texts pass: each has its own outcome."""
    for name, limit in (("tenant_id", MAX_TENANT_BYTES), ("correlation_id", MAX_CORRELATION_BYTES)):
        value = getattr(request, name)
        if not value:
            raise RequestRefused(f"{name}: is empty; every request needs one")
        if len(_encoded(name, value)) > limit:
            raise RequestRefused(f"{name}: is over {limit} bytes; use a shorter one")
    action = ACTION_ALIASES.get(request.action)
    if action is None:
        raise RequestRefused(f"action: must be one of {', '.join(Action)}")
    listed = "chunks" if action in TEXT_ACTIONS else "chunk_ids"
    if not getattr(request, listed) and action is not Action.DOCUMENT_MANIFEST:
        raise RequestRefused(f"{listed}: is empty; pass at least one")
    for name in request.__dataclass_fields__:
        value = getattr(request, name)
        if isinstance(value, str):
            _encoded(name, value)
    if _map_bytes("metadata", request.metadata) > MAX_METADATA_BYTES:
        raise RequestRefused(f"metadata: is over {MAX_METADATA_BYTES} bytes; it is copied into each result")
    for place, chunk in enumerate(request.chunks):
        _encoded(f"chunks[{place}].text", chunk.text)
        _map_bytes(f"chunks[{place}].metadata", chunk.metadata)
    ids = [chunk.chunk_id for chunk in request.chunks] or request.chunk_ids
    _check_ids("chunks[{}].chunk_id" if request.chunks else "chunk_ids[{}]", ids)


def split(request: Request, *, max_bytes: int, encode: Encode) -> list[Request]:
    """A checked request as parts of at most 2,048 chunks (or ids) and `max_bytes` each, in order.

    Each part names its place in the whole by first_chunk_index and chunk_count. A manifest can't be split.
    """
    bare = replace(request, chunks=(), chunk_ids=(), chunk_count=1, first_chunk_index=1)
    room = max_bytes - len(encode(bare)) - 2 * STRING_SPARE_BYTES
    if request.action == Action.DOCUMENT_MANIFEST:
        if sum(map(_id_bytes, request.chunk_ids)) > room:
            raise RequestRefused(f"chunk_ids: a manifest is at most {max_bytes} bytes; use fewer or shorter chunk ids")
        return [request]
    parts: list[Request] = []
    if request.chunks:
        for first, chunks in _packed(request.chunks, [_chunk_bytes(chunk) for chunk in request.chunks], room):
            parts.append(replace(request, chunks=chunks, first_chunk_index=first))
    else:
        for first, chunk_ids in _packed(request.chunk_ids, [*map(_id_bytes, request.chunk_ids)], room):
            parts.append(replace(request, chunk_ids=chunk_ids, first_chunk_index=first))
    if len(parts) == 1:
        return [request]
    return [replace(part, chunk_count=request.length) for part in parts]


def _packed(items: Sequence[Part], sizes: Sequence[int], room: int) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """(index of the first, items) of each part, filled in order."""
    first, held = 0, 0
    for place, size in enumerate(sizes):
        if size > room:
            raise RequestRefused(f"chunks[{place}]: {size} bytes, a request has room for {room}; split the text")
        if held + size > room or place - first == MAX_CHUNKS:
            yield first, tuple(items[first:place])
            first, held = place, 0
        held += size
    yield first, tuple(items[first:])


def _chunk_bytes(chunk: Chunk) -> int:
    metadata = sum(2 * STRING_SPARE_BYTES + len(k.encode()) + len(v.encode()) for k, v in chunk.metadata.items())
    return _id_bytes(chunk.chunk_id) + _id_bytes(chunk.text) + metadata + 2 * STRING_SPARE_BYTES


def _id_bytes(text: str) -> int:
    return STRING_SPARE_BYTES + len(text.encode())


def _check_ids(name: str, ids: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for place, chunk_id in enumerate(ids):
        field = name.format(place)
        _encoded(field, chunk_id)
        if chunk_id in seen:
            raise RequestRefused(f"{field}: is the same as {name.format(seen[chunk_id])}; chunk ids must differ")
        seen[chunk_id] = place


def _map_bytes(name: str, entries: Mapping[str, str]) -> int:
    return sum(len(_encoded(name, key)) + len(_encoded(name, value)) for key, value in entries.items())


def _encoded(field: str, text: str) -> bytes:
    """UTF-8. The error names the place of what has none, never the text."""
    if not isinstance(text, str):
        raise RequestRefused(f"{field}: must be text, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        place = error.start
    raise RequestRefused(f"{field}: character {place} is half of a surrogate pair; decode the text rightly first")
