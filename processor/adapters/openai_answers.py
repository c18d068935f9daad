"""Reads answers of the embeddings API while they arrive, in slices of whole rows.

An answer of 2,048 texts is 16 MB: parsed in one piece it would hold the event loop for tens of milliseconds.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import time
from collections.abc import AsyncIterable, Mapping
from typing import Any

import numpy as np
from pydantic_core import SchemaValidator, ValidationError, core_schema, from_json

from processor.adapters.refusals import in_words, rate_limits
from processor.domain import Vector
from processor.errors import ProviderTransient
from processor.ports import ProviderAnswer

SLICE_BYTES = 256 * 1024
"""Parsed and decoded in about a millisecond."""

MAX_BILL_TOKENS = 2**31 - 1
"""More for one call is nonsense, and no usage that could be read."""

_HEAD = re.compile(rb'\s*\{\s*(?:"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*\[\s*')
"""The answer's beginning up to the first row, where nothing but plain members comes before the rows."""

_BASE64_ROWS = SchemaValidator(
    core_schema.list_schema(
        core_schema.typed_dict_schema(
            {
                "index": core_schema.typed_dict_field(core_schema.int_schema(strict=True)),
                "embedding": core_schema.typed_dict_field(core_schema.bytes_schema()),
            },
            extra_behavior="ignore",
            config={"val_json_bytes": "base64"},
        )
    )
)
"""Rows as OpenAI sends them, decoded at 6 us for 1,536 dimensions; by way of a str and binascii it takes 22."""

_EMPTY: Vector = np.empty(0, np.float32)


async def read_answer(
    chunks: AsyncIterable[bytes],
    headers: Mapping[str, str],
    *,
    texts: int,
    max_bytes: int = 2**31,
    now_s: float | None = None,
) -> ProviderAnswer:
    """The body of an HTTP 200 to a call of so many texts. Others have their turn between two slices.

    A vector that can't be read is empty, a missing index is -1. Raises ProviderError when neither vectors nor a bill
    can be read; without an `http_status`: nobody says that the call was not billed.
    """
    waiting = bytearray()
    head = b""
    vectors: list[Vector] = []
    indices: list[int] = []
    sliced = as_base64 = True
    async for chunk in chunks:
        max_bytes -= len(chunk)
        if max_bytes < 0:  # a few compressed kilobytes can become gigabytes
            raise ProviderTransient("answer_too_large")
        waiting += chunk
        if sliced and not head:
            if found := _HEAD.match(waiting, 0, SLICE_BYTES):
                head = bytes(waiting[: found.end()])
                del waiting[: found.end()]
            sliced = bool(head) or len(waiting) < SLICE_BYTES
        # Rows hold no braces but their own: the first one that closes, past a slice, ends a row.
        while sliced and head and (end := waiting.find(b"}", SLICE_BYTES) + 1):
            piece = b"[" + waiting[:end].lstrip(b", \t\r\n") + b"]"
            as_base64 = as_base64 and _add_base64(piece, vectors, indices)
            if not as_base64 and not _add_rows(piece, vectors, indices):
                sliced = False  # the last rows and what follows them, or a layout of another kind
                break
            del waiting[:end]
            await asyncio.sleep(0)
    parsed = _parsed(head + waiting.lstrip(b", \t\r\n") if vectors else head + waiting)
    if parsed is None:
        raise ProviderTransient("broken_body")
    rest, error = parsed.get("data"), parsed.get("error")
    if error and not rest and not vectors:
        raise in_words(error, headers, time.time() if now_s is None else now_s, texts=texts)
    billed_tokens = _bill(parsed.get("usage"))
    if not isinstance(rest, list):
        if billed_tokens is None:
            raise ProviderTransient("broken_body")
        rest = []
    _add(rest, vectors, indices)
    model = parsed.get("model")
    return ProviderAnswer(
        vectors=vectors,
        indices=indices,
        model=model if isinstance(model, str) else "",
        billed_tokens=billed_tokens,
        limits=rate_limits(headers),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object; ProviderTransient when it is none."""
    parsed = _parsed(body)
    if parsed is None:
        raise ProviderTransient("broken_body")
    return parsed


def read_vector(value: object, *, double_bytes: int | None = None) -> Vector:
    """Of a list of numbers, or base64 of float32 (of float64 where it is of `double_bytes`); else empty."""
    try:
        if isinstance(value, str):
            raw = binascii.a2b_base64(value, strict_mode=True)
            return np.frombuffer(raw, "<f8" if len(raw) == double_bytes else "<f4").astype(np.float32, copy=False)
        if isinstance(value, list):
            with np.errstate(over="ignore"):
                return np.asarray(value, np.float32)
    except (ValueError, TypeError, OverflowError):
        pass
    return _EMPTY


def _add_base64(piece: bytes, vectors: list[Vector], indices: list[int]) -> bool:
    """False, and nothing added, when one of the rows has another form or can't be read."""
    try:
        rows = _BASE64_ROWS.validate_json(piece)
        read: list[Vector] = [np.frombuffer(row["embedding"], "<f4") for row in rows]
    except (ValidationError, ValueError):
        return False
    vectors += read
    indices += [row["index"] for row in rows]
    return True


def _add_rows(piece: bytes, vectors: list[Vector], indices: list[int]) -> bool:
    """False, and nothing added, when these are no rows."""
    try:
        rows = from_json(piece)
    except ValueError:
        return False
    _add(rows, vectors, indices)
    return True


def _parsed(body: bytes | bytearray) -> dict[str, Any] | None:
    try:
        parsed = from_json(body)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _add(rows: list[object], vectors: list[Vector], indices: list[int]) -> None:
    for row in rows:
        vectors.append(read_vector(row.get("embedding") if isinstance(row, dict) else None))
        indices.append(_index(row))


def _index(row: object) -> int:
    index = row.get("index") if isinstance(row, dict) else None
    return index if isinstance(index, int) else -1


def _bill(usage: object) -> int | None:
    if isinstance(usage, dict):
        for name in ("total_tokens", "prompt_tokens"):
            tokens = usage.get(name)
            if isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MAX_BILL_TOKENS:
                return tokens
    return None
