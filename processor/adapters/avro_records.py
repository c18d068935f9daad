"""Domain objects to the bodies of their Avro records and back, without framing.

What is hot is read and written elsewhere: requests in `avro_requests`, results and usage events in `avro_outcomes`,
`avro_results` and `avro_usage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from io import BytesIO
from typing import Any, Final, TypeVar, cast

import numpy as np
from fastavro import schemaless_reader, schemaless_writer

from processor.accounts import (
    BucketKey,
    Budget,
    BudgetKey,
    BudgetState,
    PublishedTotal,
    TaskProgress,
    UsageSums,
    UsageTotal,
)
from processor.adapters.avro_results import read_result
from processor.adapters.avro_usage import YEAR_10000_MS, check_names, checked, read_usage
from processor.adapters.schemas import Schema, current
from processor.domain import (
    MAX_MANIFEST_VECTORS,
    MAX_PRICE,
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
    TokenType,
    Usage,
)
from processor.ports import Undecodable

MAX_CALL_TOKENS: Final = 2**31 - 1
"""Of one provider call: two million dollars at the greatest price."""

T = TypeVar("T")
Word = TypeVar("Word", bound=StrEnum)
Fields = dict[str, Any]

WIRE_NAME: Final[Mapping[type, str]] = {
    Request: "EmbeddingRequest",
    Result: "EmbeddingResult",
    ReceivedResult: "EmbeddingResult",
    Usage: "TokenUsage",
    UsageTotal: "UsageTotal",
    PublishedTotal: "UsageTotal",
    ProviderCall: "ProviderCall",
    DocumentManifest: "DocumentManifest",
    TaskProgress: "TaskProgress",
    BudgetState: "BudgetState",
}
"""The schema of each domain class."""


def write(message: Any) -> bytes:
    """The body of any message but a result, usage event or total, for which see `avro_outcomes`."""
    kind = type(message)
    out = BytesIO()
    schemaless_writer(out, current(WIRE_NAME[kind]).parsed, _FIELDS[kind](message))
    return out.getvalue()


def read(kind: type[T], value: bytes, start: int, writer: Schema) -> T | Undecodable:
    """The record that begins at `start` and must fill the rest of `value`. Any exception may come of bad bytes."""
    return cast("T | Undecodable", _READERS[kind](value, start, writer))


# Writing: domain objects to the fields of their schema.


def _request_fields(request: Request) -> Fields:
    fields = _plain_fields(request)
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


def _plain_fields(message: Any) -> Fields:
    """Of a class whose fields are those of its schema."""
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def _call_fields(call: ProviderCall) -> Fields:
    return _plain_fields(call) | {"items": [item._asdict() for item in call.items]}


def _budget_fields(state: BudgetState) -> Fields:
    fields = _plain_fields(state)
    del fields["key"], fields["budget"]
    return fields | state.key._asdict() | _plain_fields(state.budget)


_FIELDS: Final[Mapping[type, Callable[[Any], Fields]]] = {
    Request: _request_fields,
    ProviderCall: _call_fields,
    DocumentManifest: _plain_fields,
    TaskProgress: _plain_fields,
    BudgetState: _budget_fields,
}


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


def _fast_reader(
    fast: Callable[[bytes, int], T | None], build: Callable[[Fields], T]
) -> Callable[[bytes, int, Schema], T | Undecodable]:
    """In the fast way when it is a plain one of the current schema; otherwise as any Avro reader does."""
    general = _reader(build)

    def read(value: bytes, start: int, writer: Schema) -> T | Undecodable:
        found = fast(value, start) if writer is current(writer.name) else None
        return general(value, start, writer) if found is None else found

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
    usage = Usage(
        request=Request(**{name: fields[name] for name in _ECHOED}, first_chunk_index=fields["first_chunk_index"]),
        source=Source(
            fields["source_topic"],
            fields["source_partition"],
            fields["source_offset"],
            fields["charged_at_ms"],
        ),
        operation=_word(Operation, fields["operation"]),
        token_source=_word(TokenSource, fields["token_source"]),
        token_type=_word(TokenType, fields["token_type"]),
        billed=Amounts(**fields["billed"]),
        saved=Amounts(**fields["saved"]),
        parts=tuple(Part(**part) for part in fields["parts"]),
        event_key=None if fields["idempotency_key"] == fields["request_id"] else fields["idempotency_key"],
        **{name: fields[name] for name in _USAGE_PLAIN},
    )
    check_names(usage)
    return checked(usage)


_ECHOED: Final = (
    *("tenant_id", "correlation_id", "action", "collection", "document_id", "task_id", "task_total", "agent_id"),
    *("agent_owner_id", "conversation_id", "run_id", "source_service", "requested_at_ms", "metadata"),
)
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
    call = ProviderCall(**fields)
    _check_call(call)
    return call


def _check_call(call: ProviderCall) -> None:
    """ValueError for what no sum of the ledger or no calendar can hold: one record would end each start.

    Tokens and price are bounded each by itself: an attempt may have them from two records.
    """
    tokens = [call.estimated_tokens, call.billed_tokens or 0, *(item.local_tokens for item in call.items)]
    price = call.price_nanos_per_million or 0
    if min(*tokens, price) < 0 or max(tokens) > MAX_CALL_TOKENS or price > MAX_PRICE:
        raise ValueError("no such amount")
    if not 0 <= call.at_ms < YEAR_10000_MS:
        raise ValueError("no such time")


def _total(fields: Fields) -> UsageTotal:
    return UsageTotal(
        key=BucketKey(fields["payer_id"], fields["bucket"], fields["dimension"], fields["value"]),
        partitions={
            part["partition"]: (part["last_offset"], UsageSums(**part["sums"])) for part in fields["partitions"]
        },
        updated_at_ms=fields["updated_at_ms"],
    )


def _published_total(fields: Fields) -> PublishedTotal:
    return PublishedTotal(_total(fields), UsageSums(**fields["totals"]))


def _budget_state(fields: Fields) -> BudgetState:
    return BudgetState(
        key=BudgetKey(fields.pop("payer_id"), fields.pop("month")),
        budget=Budget(**{name: fields.pop(name) for name in Budget.__dataclass_fields__}),
        **fields,
    )


def _manifest(fields: Fields) -> DocumentManifest:
    fields["chunk_ids"] = tuple(fields["chunk_ids"])
    fields["vector_spaces"] = tuple(fields["vector_spaces"])
    if len(fields["chunk_ids"]) * len(fields["vector_spaces"]) > MAX_MANIFEST_VECTORS:
        raise ValueError("no such document")
    return DocumentManifest(**fields)


def _received(fields: Fields) -> ReceivedResult:
    error, vector = fields["error"], np.array(fields["vector"], np.float32)
    fields["error"] = None if error is None else Fault(**error | {"code": _word(ErrorCode, error["code"])})
    fields["vector"] = vector if len(vector) else None
    return ReceivedResult(**fields)


def _word(kind: type[Word], text: str) -> Word:
    """The member of an open set, or the text itself, which a newer writer may have sent."""
    return cast(Word, kind._value2member_map_.get(text, text))


_READERS: Final[Mapping[type, Callable[[bytes, int, Schema], Any]]] = {
    Request: _reader(_request),
    ReceivedResult: _fast_reader(read_result, _received),
    Usage: _fast_reader(read_usage, _usage),
    ProviderCall: _reader(_call),
    UsageTotal: _reader(_total),
    PublishedTotal: _reader(_published_total),
    DocumentManifest: _reader(_manifest),
    TaskProgress: _reader(lambda fields: TaskProgress(**fields)),
    BudgetState: _reader(_budget_state),
}
