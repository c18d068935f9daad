"""Results read straight from their bytes, the vector by one copy: for clients and sinks.

Only the ordinary shape of the current schema is read here; everything else, all that is malformed included, is left to
the general reader.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from processor.adapters.avro_bytes import (
    read_bool,
    read_long,
    read_map,
    read_optional_long,
    read_optional_text,
    read_text,
)
from processor.adapters.avro_outcomes import FLOAT32
from processor.domain import ErrorCode, Fault, ReceivedResult, Vector


def read_result(value: bytes, start: int) -> ReceivedResult | None:
    """The result that fills `value` from `start` on, written by the current schema; None: ask the general reader."""
    try:
        return _read(value, start)
    except (IndexError, ValueError):
        return None


def _read(value: bytes, at: int) -> ReceivedResult | None:
    result: Any = object.__new__(ReceivedResult)  # filled slot by slot, see RequestReader
    result.request_id, at = read_text(value, at)
    result.tenant_id, at = read_text(value, at)
    result.correlation_id, at = read_text(value, at)
    result.action, at = read_text(value, at)
    result.collection, at = read_optional_text(value, at)
    result.document_id, at = read_optional_text(value, at)
    result.task_id, at = read_optional_text(value, at)
    result.task_total, at = read_optional_long(value, at)
    result.agent_id, at = read_optional_text(value, at)
    result.agent_owner_id, at = read_optional_text(value, at)
    result.conversation_id, at = read_optional_text(value, at)
    result.run_id, at = read_optional_text(value, at)
    result.source_service, at = read_text(value, at)
    result.requested_at_ms, at = read_long(value, at)
    result.metadata, at = read_map(value, at)
    result.input_type, at = read_optional_text(value, at)
    result.operation, at = read_optional_text(value, at)
    result.reply_type, at = read_optional_text(value, at)
    result.source_version, at = read_text(value, at)
    result.accepted_at_ms, at = read_long(value, at)
    result.chunk_count, at = read_long(value, at)
    result.first_chunk_index, at = read_long(value, at)
    result.chunk_index, at = read_long(value, at)
    result.length, at = read_long(value, at)
    result.chunk_id, at = read_text(value, at)
    result.chunk_metadata, at = read_map(value, at)
    result.status, at = read_text(value, at)
    result.error, at = _error(value, at)
    result.vector_id, at = read_optional_text(value, at)
    result.provider, at = read_text(value, at)
    result.model, at = read_text(value, at)
    result.vector_space, at = read_text(value, at)
    result.dimensions, at = read_long(value, at)
    result.token_count, at = read_long(value, at)
    result.token_source, at = read_text(value, at)
    result.cache, at = read_text(value, at)
    result.truncated, at = read_bool(value, at)
    result.cut_tokens, at = read_long(value, at)
    result.cost_nanos, at = read_optional_long(value, at)
    result.time_taken_ms, at = read_long(value, at)
    result.completed_at_ms, at = read_long(value, at)
    result.vector = None if value[at] == 0 and at + 1 == len(value) else read_vector(value, at)
    return cast(ReceivedResult, result)


def read_vector(value: bytes, at: int) -> Vector:
    """The array of floats that begins there and fills the rest, as float32; ValueError unless it is one plain block."""
    count, items = read_long(value, at)
    if count < 1 or len(value) != items + 4 * count + 1 or value[-1]:
        raise ValueError("an unusual array")
    return np.frombuffer(value, FLOAT32, count, items).astype(np.float32)


def _error(value: bytes, at: int) -> tuple[Fault | None, int]:
    if not value[at]:
        return None, at + 1
    if value[at] != 2:
        raise ValueError("an unusual branch")
    code, at = read_text(value, at + 1)
    field, at = read_text(value, at)
    message, at = read_text(value, at)
    retryable, at = read_bool(value, at)
    return Fault(cast(ErrorCode, ErrorCode._value2member_map_.get(code, code)), field, message, retryable), at
