"""Domain objects to the bodies of their Avro records and back, without framing.

Vectors are written and read at the speed of a copy, byte for byte as any Avro library has them: see `_vector_layout`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import lru_cache
from io import BytesIO
from typing import Any, Final, TypeVar, cast

import numpy as np
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from processor.accounts import BucketKey, TaskProgress, UsageSums, UsageTotal
from processor.adapters.schemas import Schema, current
from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    TOKEN_TYPE_EMBEDDING,
    Amounts,
    CallItem,
    CallKind,
    CallOutcome,
    Chunk,
    DlqClass,
    DocumentManifest,
    ErrorCode,
    Fault,
    Operation,
    Part,
    ProviderCall,
    ReceivedResult,
    ReplyTo,
    Request,
    Result,
    Source,
    TokenSource,
    Usage,
    Vector,
)
from processor.ports import Undecodable

T = TypeVar("T")
Word = TypeVar("Word", bound=StrEnum)
Fields = dict[str, Any]

WIRE_NAME: Final[Mapping[type, str]] = {
    Request: "EmbeddingRequest",
    Result: "EmbeddingResult",
    ReceivedResult: "EmbeddingResult",
    Usage: "TokenUsage",
    UsageTotal: "UsageTotal",
    ProviderCall: "ProviderCall",
    DocumentManifest: "DocumentManifest",
    TaskProgress: "TaskProgress",
}
"""The schema of each domain class."""


def write(message: Any) -> bytes:
    """The body of any message but a Result."""
    kind = type(message)
    out = BytesIO()
    schemaless_writer(out, current(WIRE_NAME[kind]).parsed, _FIELDS[kind](message))
    return out.getvalue()


class ResultWriter:
    """Writes results; remembers the last one, which is sent several times, and the part that its neighbours share."""

    def __init__(self) -> None:
        self._result: Result | None = None
        self._body = b""
        self._shared_by: Result | None = None
        self._shared = b""

    def write(self, result: Result) -> bytes:
        """The body of the record. `vector` is written as float32, whatever its byte order and strides."""
        if result is not self._result:
            self._body = self._shared_part(result) + _own_part(result)
            self._result = result
        return self._body

    def _shared_part(self, result: Result) -> bytes:
        last = self._shared_by
        if (
            last is None
            or last.request is not result.request
            or last.source is not result.source
            or last.request_id != result.request_id
        ):
            out = BytesIO()
            schemaless_writer(out, _result_part(shared=True), _shared_fields(result))
            self._shared = out.getvalue()
            self._shared_by = result
        return self._shared


def read(kind: type[T], value: bytes, start: int, writer: Schema) -> T | Undecodable:
    """The record that begins at `start` and must fill the rest of `value`. Any exception may come of bad bytes."""
    return cast("T | Undecodable", _READERS[kind](value, start, writer))


# Writing: domain objects to the fields of their schema.


def _request_fields(request: Request) -> Fields:
    fields = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    fields["chunks"] = [
        {"chunk_id": chunk.chunk_id, "text": chunk.text, "metadata": chunk.metadata} for chunk in request.chunks
    ]
    if request.reply_to is not None:
        reply_to = request.reply_to
        fields["reply_to"] = {
            "topic": reply_to.topic,
            "partition": reply_to.partition,
            "reply_type": reply_to.reply_type,
        }
    return fields


def _echo(request: Request) -> Fields:
    """What results and usage repeat of their request."""
    return {
        "tenant_id": request.tenant_id,
        "correlation_id": request.correlation_id,
        "action": request.action,
        "collection": request.collection,
        "document_id": request.document_id,
        "task_id": request.task_id,
        "task_total": request.task_total,
        "agent_id": request.agent_id,
        "agent_owner_id": request.agent_owner_id,
        "conversation_id": request.conversation_id,
        "run_id": request.run_id,
        "source_service": request.source_service,
        "requested_at_ms": request.requested_at_ms,
        "metadata": request.metadata,
    }


def _shared_fields(result: Result) -> Fields:
    """What all results of one request have in common: the fields before first_chunk_index."""
    request = result.request
    action = ACTION_ALIASES.get(request.action)
    return _echo(request) | {
        "request_id": result.request_id,
        "input_type": request.input_type,
        "operation": OPERATION_OF.get(action) if action is not None else None,
        "reply_type": request.reply_to.reply_type if request.reply_to is not None else None,
        "source_version": result.source.version,
        "accepted_at_ms": result.source.append_ms,
        "chunk_count": request.whole_count,
    }


def _own_part(result: Result) -> bytes:
    error, vector = result.error, result.vector
    count = 0 if vector is None else len(vector)
    fields: Fields = {
        "first_chunk_index": result.first_chunk_index,
        "chunk_index": result.chunk_index,
        "length": result.length,
        "chunk_id": result.chunk_id,
        "chunk_metadata": result.chunk_metadata,
        "status": result.status,
        "error": None if error is None else _plain_fields(error),
        "vector_id": result.vector_id,
        "provider": result.provider,
        "model": result.model,
        "vector_space": result.vector_space,
        "dimensions": result.dimensions,
        "token_count": result.token_count,
        "token_source": result.token_source,
        "cache": result.cache,
        "truncated": result.truncated,
        "cost_nanos": result.cost_nanos,
        "time_taken_ms": result.time_taken_ms,
        "completed_at_ms": result.completed_at_ms,
    }
    if vector is None or count == 0:
        schema, fields["vector"] = _result_part(shared=False), ()
    else:
        raw = vector.astype("<f4", copy=False).tobytes()
        schema, fields["vector"] = _vector_layout(count), {"count": count, "items": raw, "end": 0}
    out = BytesIO()
    schemaless_writer(out, schema, fields)
    return out.getvalue()


def _usage_fields(usage: Usage) -> Fields:
    fields = _echo(usage.request)
    fields |= {
        "idempotency_key": usage.idempotency_key,
        "request_id": usage.request_id,
        "payer_id": usage.payer_id,
        "first_chunk_index": usage.request.first_chunk_index,
        "source_topic": usage.source.topic,
        "source_partition": usage.source.partition,
        "source_offset": usage.source.offset,
        "charged_at_ms": usage.charged_at_ms,
        "completed_at_ms": usage.completed_at_ms,
        "time_taken_ms": usage.time_taken_ms,
        "operation": usage.operation,
        "token_type": TOKEN_TYPE_EMBEDDING,
        "provider": usage.provider,
        "model": usage.model,
        "vector_space": usage.vector_space,
        "token_source": usage.token_source,
        "texts": usage.texts,
        "characters": usage.characters,
        "mean_characters": usage.characters / usage.texts if usage.texts else None,
        "failed_texts": usage.failed_texts,
        "cached_texts": usage.cached_texts,
        "billed": _amounts_fields(usage.billed),
        "saved": _amounts_fields(usage.saved),
        "parts": [part._asdict() for part in usage.parts],
        "price_nanos_per_million": usage.price_nanos_per_million,
        "price_version": usage.price_version,
    }
    return fields


def _amounts_fields(amounts: Amounts) -> Fields:
    return {
        "texts": amounts.texts,
        "tokens": amounts.tokens,
        "characters": amounts.characters,
        "cost_nanos": amounts.cost_nanos,
    }


def _plain_fields(message: Any) -> Fields:
    """Of a class whose fields are those of its schema."""
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def _call_fields(call: ProviderCall) -> Fields:
    return _plain_fields(call) | {"items": [item._asdict() for item in call.items]}


def _total_fields(total: UsageTotal) -> Fields:
    parts = sorted(total.partitions.items())
    return total.key._asdict() | {
        "totals": {name: sum(getattr(sums, name) for _, (_, sums) in parts) for name in UsageSums.__dataclass_fields__},
        "partitions": [
            {"partition": partition, "last_offset": last_offset, "sums": _plain_fields(sums)}
            for partition, (last_offset, sums) in parts
        ],
        "updated_at_ms": total.updated_at_ms,
    }


_FIELDS: Final[Mapping[type, Callable[[Any], Fields]]] = {
    Request: _request_fields,
    Usage: _usage_fields,
    ProviderCall: _call_fields,
    DocumentManifest: _plain_fields,
    UsageTotal: _total_fields,
    TaskProgress: _plain_fields,
}


@lru_cache(maxsize=2)
def _result_part(*, shared: bool) -> Any:
    """The fields of a result before first_chunk_index, or from there on: Avro writes a record field by field."""
    schema = json.loads(current("EmbeddingResult").text)
    fields = schema["fields"]
    split = [field["name"] for field in fields].index("first_chunk_index")
    return parse_schema(schema | {"fields": fields[:split] if shared else fields[split:]})


@lru_cache(maxsize=64)
def _vector_layout(count: int) -> Any:
    """A result's own part with the vector spelled as the bytes of a non-empty `array<float>` in one block.

    That is the item count, the items as raw little-endian float32 and a zero; fastavro then copies the items from a
    buffer instead of converting a list of floats. The bytes are the same as the plain schema's.
    """
    schema = json.loads(current("EmbeddingResult").text)
    fields = schema["fields"]
    split = [field["name"] for field in fields].index("first_chunk_index")
    layout = {
        "type": "record",
        "name": "VectorLayout",
        "fields": [
            {"name": "count", "type": "long"},
            {"name": "items", "type": {"type": "fixed", "name": "Float32Items", "size": 4 * count}},
            {"name": "end", "type": "long"},
        ],
    }
    return parse_schema(schema | {"fields": [*fields[split:-1], {"name": "vector", "type": layout}]})


# Reading: bytes to domain objects. Every reader consumes its bytes to the end.


def _read_fields(value: bytes, start: int, writer: Schema) -> Fields | Undecodable:
    """The fields as the current version of the record has them."""
    stream = BytesIO(value)
    stream.seek(start)
    now = current(writer.name)
    fields = schemaless_reader(stream, writer.parsed, None if writer is now else now.parsed)
    if stream.tell() != len(value):
        return Undecodable(DlqClass.UNDECODABLE, "trailing_bytes")
    return cast(Fields, fields)


def _reader(build: Callable[[Fields], T]) -> Callable[[bytes, int, Schema], T | Undecodable]:
    def read(value: bytes, start: int, writer: Schema) -> T | Undecodable:
        fields = _read_fields(value, start, writer)
        return fields if isinstance(fields, Undecodable) else build(fields)

    return read


def _request(fields: Fields) -> Request:
    chunks = [Chunk(chunk["chunk_id"], chunk["text"], chunk["metadata"]) for chunk in fields["chunks"]]
    fields["chunks"] = tuple(chunks)
    fields["chunk_ids"] = tuple(fields["chunk_ids"])
    fields["vector_spaces"] = tuple(fields["vector_spaces"])
    if fields["reply_to"] is not None:
        fields["reply_to"] = ReplyTo(**fields["reply_to"])
    return Request(**fields)


def _usage(fields: Fields) -> Usage:
    """Its request holds what a usage event repeats: no chunks and nothing of how the texts were to be embedded."""
    return Usage(
        request=Request(**{name: fields[name] for name in _ECHOED}, first_chunk_index=fields["first_chunk_index"]),
        source=Source(
            fields["source_topic"],
            fields["source_partition"],
            fields["source_offset"],
            fields["charged_at_ms"],
        ),
        operation=_word(Operation, fields["operation"]),
        token_source=_word(TokenSource, fields["token_source"]),
        billed=Amounts(**fields["billed"]),
        saved=Amounts(**fields["saved"]),
        parts=tuple(Part(**part) for part in fields["parts"]),
        **{name: fields[name] for name in _USAGE_PLAIN},
    )


_ECHOED: Final = tuple(_echo(Request(tenant_id="", correlation_id="", action="")))
_USAGE_PLAIN: Final = (
    *("request_id", "payer_id", "model", "provider", "vector_space", "texts", "characters", "failed_texts"),
    *("cached_texts", "price_nanos_per_million", "price_version", "charged_at_ms", "completed_at_ms"),
    "time_taken_ms",
)


def _call(fields: Fields) -> ProviderCall:
    fields["kind"] = _word(CallKind, fields["kind"])
    fields["items"] = tuple(CallItem(**item) for item in fields["items"])
    if fields["outcome"] is not None:
        fields["outcome"] = _word(CallOutcome, fields["outcome"])
    return ProviderCall(**fields)


def _total(fields: Fields) -> UsageTotal:
    return UsageTotal(
        key=BucketKey(fields["payer_id"], fields["bucket"], fields["dimension"], fields["value"]),
        partitions={
            part["partition"]: (part["last_offset"], UsageSums(**part["sums"])) for part in fields["partitions"]
        },
        updated_at_ms=fields["updated_at_ms"],
    )


def _manifest(fields: Fields) -> DocumentManifest:
    fields["chunk_ids"] = tuple(fields["chunk_ids"])
    fields["vector_spaces"] = tuple(fields["vector_spaces"])
    return DocumentManifest(**fields)


def _read_result(value: bytes, start: int, writer: Schema) -> ReceivedResult | Undecodable:
    """Reads the vector as it lies there when it is one block, as ours are; otherwise as any Avro reader does."""
    if writer is current(writer.name):
        stream = BytesIO(value)
        stream.seek(start)
        fields = cast(Fields, schemaless_reader(stream, _result_head(), None))
        count = cast(int, schemaless_reader(stream, "long", None))
        items = stream.tell()
        if count > 0 and len(value) == items + 4 * count + 1 and value[-1] == 0:
            vector = np.frombuffer(value, "<f4", count, items).astype(np.float32)
            return _received(fields, vector)
    read = _read_fields(value, start, writer)
    return read if isinstance(read, Undecodable) else _received(read, np.array(read["vector"], np.float32))


def _received(fields: Fields, vector: Vector) -> ReceivedResult:
    error = fields["error"]
    fields["error"] = None if error is None else Fault(**error | {"code": _word(ErrorCode, error["code"])})
    fields["vector"] = vector if len(vector) else None
    return ReceivedResult(**fields)


@lru_cache(maxsize=1)
def _result_head() -> Any:
    """The result's schema without its last field, the vector."""
    schema = json.loads(current("EmbeddingResult").text)
    return parse_schema(schema | {"fields": schema["fields"][:-1]})


def _word(kind: type[Word], text: str) -> Word:
    """The member of an open set, or the text itself, which a newer writer may have sent."""
    return cast(Word, kind._value2member_map_.get(text, text))


_READERS: Final[Mapping[type, Callable[[bytes, int, Schema], Any]]] = {
    Request: _reader(_request),
    ReceivedResult: _read_result,
    Usage: _reader(_usage),
    ProviderCall: _reader(_call),
    UsageTotal: _reader(_total),
    DocumentManifest: _reader(_manifest),
    TaskProgress: _reader(lambda fields: TaskProgress(**fields)),
}
