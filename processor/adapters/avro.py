"""The wire format: domain objects to keyed Kafka messages and back, framed and in Avro.

A record's bytes are capped before they are decoded and must be consumed to the end; only our own released schemas are
decoded, whatever a record claims. Vectors are written and read at the speed of a copy, see `_vector_layout`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from io import BytesIO
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
from aiokafka.partitioner import murmur2
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from processor.adapters.registry import SchemaRegistry
from processor.adapters.schemas import (
    CONFLUENT_HEADER_BYTES,
    CONFLUENT_MAGIC,
    SINGLE_OBJECT_HEADER_BYTES,
    SINGLE_OBJECT_MARK,
    Schema,
    confluent_header,
    confluent_id,
    current,
    released,
)
from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    TOKEN_TYPE_EMBEDDING,
    Amounts,
    BucketKey,
    CallItem,
    CallKind,
    CallOutcome,
    Chunk,
    DeadLetter,
    DlqClass,
    DocumentManifest,
    ErrorCode,
    Fault,
    Operation,
    Part,
    ProviderCall,
    ReceivedResult,
    Record,
    ReplyTo,
    Request,
    Result,
    Source,
    TaskProgress,
    TokenSource,
    Tombstone,
    Usage,
    UsageSums,
    UsageTotal,
    Vector,
)
from processor.ports import Destination, Outgoing, Undecodable
from processor.settings import Settings

T = TypeVar("T")
Word = TypeVar("Word", bound=StrEnum)
Fields = dict[str, Any]

MAX_IDENTITY_CHARACTERS = 1_024
"""Of a tenant or correlation id. They are copied into keys and every result, which must stay deliverable."""

DLQ_SPARE_BYTES = 16_384
"""Room for what surrounds a dead letter's bytes: our headers and the record batch."""

WIRE_NAME: Mapping[type, str] = {
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


class Encoded(NamedTuple):
    """A message as Kafka takes it. Never print one: it may hold a vector."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()

    def __repr__(self) -> str:
        return f"Encoded(key={len(self.key or b'')} bytes, value={len(self.value or b'')} bytes)"


@lru_cache(maxsize=8_192)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Java's default partitioner gives to a key. Remembered: the chunks of a request share theirs."""
    return cast(int, (murmur2(key) & 0x7FFFFFFF) % partitions)


class Codec:
    """Encodes what we send and decodes what we read. Implements `ports.RequestDecoder`.

    Without a registry values are Avro single objects; with one they are in Confluent's format and `start` must have
    been awaited before anything is encoded. Both are read always.
    """

    def __init__(self, *, registry: SchemaRegistry | None = None, max_record_bytes: int = 1_000_000) -> None:
        self._registry = registry
        self._max_record_bytes = max_record_bytes
        self._headers: dict[str, bytes] = {}
        if registry is None:
            self._headers = {name: current(name).single_object_header for name in WIRE_NAME.values()}

    @classmethod
    def from_settings(cls, settings: Settings) -> Codec:
        url = settings.schema_registry_url
        registry = SchemaRegistry(url, timeout_s=settings.schema_registry_timeout_s) if url else None
        return cls(registry=registry, max_record_bytes=settings.max_record_bytes)

    async def start(self, values: Iterable[tuple[str, str]]) -> None:
        """Look up or register the schema of each (full topic name, record name); does nothing without a registry.

        Raises RegistryUnavailable. Every topic of one record has the same schema, so the last id stands for all.
        """
        if self._registry is not None:
            for topic, name in values:
                schema_id = await self._registry.register(f"{topic}-value", current(name))
                self._headers[name] = confluent_header(schema_id)

    async def close(self) -> None:
        if self._registry is not None:
            await self._registry.close()

    def encode(self, destination: Destination) -> Encoded:
        """Key, value and headers of a message, as schemas/topics.yaml describes them."""
        name, message = destination.name, destination.message
        key = key_of(destination)
        if isinstance(message, Result):
            headers = [("request_id", message.request_id.encode())]
            if name == "sink":
                headers.append(("source_version", message.source.version.encode()))
            return Encoded(key, self._write_result(message), headers)
        if isinstance(message, Tombstone):
            return Encoded(key, None, [("source_version", message.source_version.encode())])
        if isinstance(message, DeadLetter):
            return self._dead_letter(message)
        return Encoded(key, self._write(type(message), _FIELDS[type(message)](message)))

    def encode_request(self, request: Request) -> bytes:
        """The value of a request. UnicodeEncodeError when a text holds a lone surrogate."""
        return self._write(Request, _request_fields(request))

    async def decode(self, record: Record) -> Request | Undecodable:
        """Step 1, see `ports.RequestDecoder`. A tenant or correlation id over 1,024 characters is no identity."""
        request = await self.read(Request, record.value)
        if isinstance(request, Undecodable):
            return request
        if not request.tenant_id:
            return Undecodable(DlqClass.NO_IDENTITY, "no_tenant_id")
        if not request.correlation_id:
            return Undecodable(DlqClass.NO_IDENTITY, "no_correlation_id")
        if max(len(request.tenant_id), len(request.correlation_id)) > MAX_IDENTITY_CHARACTERS:
            return Undecodable(DlqClass.NO_IDENTITY, "identity_too_long")
        return request

    async def read(self, kind: type[T], value: bytes | None) -> T | Undecodable:
        """A value as that domain class (a result as ReceivedResult), or why it can't be read.

        Never raises for bad bytes. RegistryUnavailable when the id's schema can't be fetched: try again later.
        """
        if value is None:
            return Undecodable(DlqClass.UNDECODABLE, "null_value")
        if len(value) > self._max_record_bytes:
            return Undecodable(DlqClass.TOO_LARGE, "over_max_record_bytes")
        if value.startswith(SINGLE_OBJECT_MARK) and len(value) >= SINGLE_OBJECT_HEADER_BYTES:
            start = SINGLE_OBJECT_HEADER_BYTES
            writer = released().get(value[len(SINGLE_OBJECT_MARK) : start])
        elif len(value) >= CONFLUENT_HEADER_BYTES and value[0] == CONFLUENT_MAGIC:
            start = CONFLUENT_HEADER_BYTES
            if self._registry is None:
                return Undecodable(DlqClass.UNKNOWN_SCHEMA, "no_registry")
            writer = await self._registry.schema(confluent_id(value))
        else:
            return Undecodable(DlqClass.UNDECODABLE, "no_frame")
        if writer is None:
            return Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")
        if writer.name != WIRE_NAME[kind]:
            return Undecodable(DlqClass.UNKNOWN_SCHEMA, "other_record")
        try:
            return cast("T | Undecodable", _READERS[kind](value, start, writer))
        except Exception:  # noqa: BLE001 - bad bytes end in any exception of the Avro library, and are one value here
            return Undecodable(DlqClass.UNDECODABLE, "malformed")

    def _write(self, kind: type, fields: Fields) -> bytes:
        name = WIRE_NAME[kind]
        out = BytesIO()
        out.write(self._headers[name])
        schemaless_writer(out, current(name).parsed, fields)
        return out.getvalue()

    def _write_result(self, result: Result) -> bytes:
        fields = _result_fields(result)
        if result.vector is None or not len(result.vector):
            return self._write(Result, fields | {"vector": ()})
        count = len(result.vector)
        fields["vector"] = {
            "count": count,
            "items": result.vector.astype("<f4", copy=False).tobytes(),
            "end": 0,
        }
        out = BytesIO()
        out.write(self._headers["EmbeddingResult"])
        schemaless_writer(out, _vector_layout(count), fields)
        return out.getvalue()

    def _dead_letter(self, letter: DeadLetter) -> Encoded:
        """Original key and bytes; by reference also when they would not pass as a record, so that this one always does."""
        record, source = letter.record, letter.record.source
        ours = [
            ("error_class", letter.reason.value.encode()),
            ("error_code", letter.code.encode()),
            ("source_topic", source.topic.encode()),
            ("source_partition", b"%d" % source.partition),
            ("source_offset", b"%d" % source.offset),
            ("failed_at_ms", b"%d" % letter.at_ms),
        ]
        names = {name for name, _ in ours}
        kept = [(name, value) for name, value in record.headers if name not in names]
        key_bytes = len(record.key or b"")
        header_bytes = sum(len(name.encode()) + len(value or b"") for name, value in kept)
        room = self._max_record_bytes - DLQ_SPARE_BYTES
        if letter.by_reference or key_bytes + header_bytes + len(record.value or b"") > room:
            return Encoded(record.key if key_bytes <= room else None, None, ours)
        return Encoded(record.key, record.value, kept + ours)


def key_of(destination: Destination) -> bytes | None:
    """The key of a message: one id as UTF-8 text, several as a JSON array of strings and nulls without blanks."""
    name, message = destination.name, destination.message
    if name == "replies":
        return None
    match message:
        case Result():
            return (
                (message.vector_id or "").encode()
                if name == "sink"
                else message.request.correlation_id.encode()
            )
        case Usage():
            return message.payer_id.encode()
        case ProviderCall():
            return message.attempt_id.encode()
        case Tombstone():
            return message.vector_id.encode()
        case UsageTotal():
            return _composite_key(*message.key)
        case TaskProgress():
            return _composite_key(message.tenant_id, message.task_id)
        case DocumentManifest():
            return _composite_key(message.tenant_id, message.collection, message.document_id)
        case DeadLetter():
            return message.record.key


def request_key(request: Request) -> bytes | None:
    """The key the client gives a request: its document, so that one document's requests keep their order.

    None without a document: nothing has to be kept in order then, and any partition will do.
    """
    if request.document_id is None:
        return None
    return _composite_key(request.tenant_id, request.collection, request.document_id)


def _composite_key(*parts: str | None) -> bytes:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()


# Writing: domain objects to the fields of their schema.


def _request_fields(request: Request) -> Fields:
    fields = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    fields["chunks"] = [
        {"chunk_id": chunk.chunk_id, "text": chunk.text, "metadata": chunk.metadata}
        for chunk in request.chunks
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


def _result_fields(result: Result) -> Fields:
    """All but the vector."""
    request, error = result.request, result.error
    action = ACTION_ALIASES.get(request.action)
    fields = _echo(request)
    fields |= {
        "request_id": result.request_id,
        "input_type": request.input_type,
        "operation": OPERATION_OF.get(action) if action is not None else None,
        "reply_type": request.reply_to.reply_type if request.reply_to is not None else None,
        "source_version": result.source.version,
        "accepted_at_ms": result.source.append_ms,
        "chunk_count": request.whole_count,
        "first_chunk_index": result.first_chunk_index,
        "chunk_index": result.chunk_index,
        "length": result.length,
        "chunk_id": result.chunk_id,
        "chunk_metadata": result.chunk_metadata,
        "status": result.status,
        "error": None
        if error is None
        else {
            "code": error.code,
            "field": error.field,
            "message": error.message,
            "retryable": error.retryable,
        },
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
    return fields


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
        "totals": {
            name: sum(getattr(sums, name) for _, (_, sums) in parts)
            for name in UsageSums.__dataclass_fields__
        },
        "partitions": [
            {"partition": partition, "last_offset": last_offset, "sums": _plain_fields(sums)}
            for partition, (last_offset, sums) in parts
        ],
        "updated_at_ms": total.updated_at_ms,
    }


_FIELDS: Final[Mapping[type[Outgoing], Callable[[Any], Fields]]] = {
    Usage: _usage_fields,
    ProviderCall: _call_fields,
    DocumentManifest: _plain_fields,
    UsageTotal: _total_fields,
    TaskProgress: _plain_fields,
}


@lru_cache(maxsize=64)
def _vector_layout(count: int) -> Any:
    """The result's schema with its vector spelled as the bytes of a non-empty `array<float>` in one block.

    That is the item count, the items as raw little-endian float32 and a zero; fastavro then copies the items from a
    buffer instead of converting a list of floats. The bytes are the same as the plain schema's.
    """
    schema = json.loads(current("EmbeddingResult").text)
    *head, vector = schema["fields"]
    items = {"type": "fixed", "name": "Float32Items", "size": 4 * count}
    layout = {
        "type": "record",
        "name": "VectorLayout",
        "fields": [
            {"name": "count", "type": "long"},
            {"name": "items", "type": items},
            {"name": "end", "type": "long"},
        ],
    }
    return parse_schema(schema | {"fields": [*head, {"name": vector["name"], "type": layout}]})


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
        request=Request(
            **{name: fields[name] for name in _ECHOED}, first_chunk_index=fields["first_chunk_index"]
        ),
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
            part["partition"]: (part["last_offset"], UsageSums(**part["sums"]))
            for part in fields["partitions"]
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


def encode_request(request: Request) -> bytes:
    """The value of a request as an Avro single object."""
    return _SINGLE_OBJECT.encode_request(request)


_SINGLE_OBJECT: Final = Codec()
