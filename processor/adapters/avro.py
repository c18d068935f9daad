"""The wire format: domain objects to keyed Kafka messages and back, framed and in Avro.

A record's bytes are capped before they are decoded and must be consumed to the end; only our own released schemas are
decoded, whatever a record claims. Vectors are written and read at the speed of a copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from processor.accounts import BudgetKey, BudgetState, TaskProgress, UsageTotal
from processor.adapters.avro_outcomes import OutcomeWriter, encode_version, write_total
from processor.adapters.avro_records import WIRE_NAME, read, write
from processor.adapters.avro_requests import RequestReader
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
    DeadLetter,
    DlqClass,
    DocumentManifest,
    ProviderCall,
    Record,
    Request,
    Result,
    Tombstone,
    Usage,
)
from processor.ports import Destination, Undecodable
from processor.settings import Settings

T = TypeVar("T")

MAX_TENANT_BYTES = 256
MAX_CORRELATION_BYTES = 1_024
"""Of a tenant or correlation id. They are copied into keys and every result, which must stay deliverable."""

DLQ_SPARE_BYTES = 16_384
"""Room for what surrounds a dead letter's bytes: our headers and the record batch."""

LATE_SPARE_BYTES = 16_384
"""Room for the key of a usage event that is sent once more, since it is late."""

HEADER_SPARE_BYTES = 10
"""The two lengths of a header, at most: a record may be made of a hundred thousand empty ones."""


class Encoded(NamedTuple):
    """A message as Kafka takes it. Never print one: it may hold a vector."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()

    def __repr__(self) -> str:
        return f"Encoded(key={len(self.key or b'')} bytes, value={len(self.value or b'')} bytes)"


_encoded = tuple.__new__
"""Makes a named tuple in half the time of its class (measured)."""


class Codec:
    """Encodes what we send and decodes what we read. Implements `ports.RequestDecoder`.

    Without a registry values are Avro single objects; with one they are in Confluent's format and `start` must have
    been awaited before anything is encoded. Both are read always.
    """

    def __init__(self, *, registry: SchemaRegistry | None = None, max_record_bytes: int = 1_000_000) -> None:
        self._registry = registry
        self._max_record_bytes = max_record_bytes
        self._headers: dict[str, bytes] = {}
        self._outcomes = OutcomeWriter()
        self._released = released()
        self._requests = RequestReader()
        self._request_schema = current("EmbeddingRequest")
        self._request_header = self._request_schema.single_object_header
        self._request_ids: set[bytes] = set()
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
        message, key = destination.message, key_of(destination)
        if isinstance(message, Result):
            headers = [("request_id", message.request_id.encode())]
            if destination.name == "sink":
                headers.append(("source_version", encode_version(message.source)))
            return _encoded(Encoded, (key, self._outcomes.result(self._headers["EmbeddingResult"], message), headers))
        if isinstance(message, Usage):
            return _encoded(Encoded, (key, self._outcomes.usage(self._headers["TokenUsage"], message), ()))
        if isinstance(message, UsageTotal):
            return _encoded(Encoded, (key, write_total(self._headers["UsageTotal"], message), ()))
        if isinstance(message, Tombstone):
            return Encoded(key, None, [("source_version", message.source_version.encode())])
        if isinstance(message, DeadLetter):
            return self._dead_letter(message)
        if isinstance(message, BudgetKey):
            return Encoded(key, None)
        return Encoded(key, self._headers[WIRE_NAME[type(message)]] + write(message))

    def encode_request(self, request: Request) -> bytes:
        """The value of a request. UnicodeEncodeError when a text holds a lone surrogate."""
        return self._headers["EmbeddingRequest"] + write(request)

    def decode_now(self, record: Record) -> Request | Undecodable | None:
        """Step 1, see `ports.RequestDecoder`. A tenant over 256 bytes or a correlation id over 1,024 is no identity."""
        value = record.value
        if value is not None and len(value) <= self._max_record_bytes:
            header = value[:SINGLE_OBJECT_HEADER_BYTES]
            if header == self._request_header:
                request = self._requests.read(value, SINGLE_OBJECT_HEADER_BYTES)
            elif header[:CONFLUENT_HEADER_BYTES] in self._request_ids:
                request = self._requests.read(value, CONFLUENT_HEADER_BYTES)
            else:
                request = None
            if request is not None:
                return _identified(request)
        found = self.read_now(Request, value)
        return found if found is None or isinstance(found, Undecodable) else _identified(found)

    async def decode(self, record: Record) -> Request | Undecodable:
        """The same, its schema fetched if need be."""
        found = self.decode_now(record)
        if found is not None:
            return found
        request = await self.read(Request, record.value)
        return request if isinstance(request, Undecodable) else _identified(request)

    async def read(self, kind: type[T], value: bytes | None) -> T | Undecodable:
        """A value as that domain class (a result as ReceivedResult), or why it can't be read.

        Never raises for bad bytes. RegistryUnavailable when the id's schema can't be fetched: try again later.
        """
        found = self.read_now(kind, value)
        if found is not None:
            return found
        assert value is not None
        assert self._registry is not None
        return self._read(kind, value, CONFLUENT_HEADER_BYTES, await self._registry.schema(confluent_id(value)))

    def read_now(self, kind: type[T], value: bytes | None) -> T | Undecodable | None:
        """The same without waiting; None when the id's schema must be fetched first."""
        if value is None:
            return Undecodable(DlqClass.UNDECODABLE, "null_value")
        if len(value) > self._max_record_bytes - (LATE_SPARE_BYTES if kind is Usage else 0):
            return Undecodable(DlqClass.TOO_LARGE, "over_max_record_bytes")
        if value.startswith(SINGLE_OBJECT_MARK) and len(value) >= SINGLE_OBJECT_HEADER_BYTES:
            writer = self._released.get(value[len(SINGLE_OBJECT_MARK) : SINGLE_OBJECT_HEADER_BYTES])
            return self._read(kind, value, SINGLE_OBJECT_HEADER_BYTES, writer)
        if len(value) < CONFLUENT_HEADER_BYTES or value[0] != CONFLUENT_MAGIC:
            return Undecodable(DlqClass.UNDECODABLE, "no_frame")
        if self._registry is None:
            return Undecodable(DlqClass.UNKNOWN_SCHEMA, "no_registry")
        schema_id = confluent_id(value)
        if schema_id not in self._registry.known:
            return None
        writer = self._registry.known[schema_id]
        if writer is self._request_schema:
            self._request_ids.add(value[:CONFLUENT_HEADER_BYTES])
        return self._read(kind, value, CONFLUENT_HEADER_BYTES, writer)

    def _read(self, kind: type[T], value: bytes, start: int, writer: Schema | None) -> T | Undecodable:
        if writer is None:
            return Undecodable(DlqClass.UNKNOWN_SCHEMA, "unknown_schema")
        if writer.name != WIRE_NAME[kind]:
            return Undecodable(DlqClass.UNKNOWN_SCHEMA, "other_record")
        try:
            return read(kind, value, start, writer)
        except Exception:  # noqa: BLE001 - bad bytes end in any exception of the Avro library, and are one value here
            return Undecodable(DlqClass.UNDECODABLE, "malformed")

    def _dead_letter(self, letter: DeadLetter) -> Encoded:
        """Original key and bytes; by reference also when they are too large, so that a dead letter always passes."""
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
        header_bytes = sum(len(name.encode()) + len(value or b"") + HEADER_SPARE_BYTES for name, value in kept)
        room = self._max_record_bytes - DLQ_SPARE_BYTES
        if letter.by_reference or key_bytes + header_bytes + len(record.value or b"") > room:
            return Encoded(record.key if key_bytes <= room else None, None, ours)
        return Encoded(record.key, record.value, kept + ours)


def _identified(request: Request) -> Request | Undecodable:
    if not request.tenant_id:
        return Undecodable(DlqClass.NO_IDENTITY, "no_tenant_id")
    if not request.correlation_id:
        return Undecodable(DlqClass.NO_IDENTITY, "no_correlation_id")
    if _too_long(request.tenant_id, MAX_TENANT_BYTES) or _too_long(request.correlation_id, MAX_CORRELATION_BYTES):
        return Undecodable(DlqClass.NO_IDENTITY, "identity_too_long")
    return request


def _too_long(text: str, max_bytes: int) -> bool:
    return 4 * len(text) > max_bytes and len(text.encode()) > max_bytes


def key_of(destination: Destination) -> bytes | None:
    """The key of a message: one id as UTF-8 text, several as a JSON array of strings and nulls without blanks."""
    name, message = destination.name, destination.message
    if name == "replies":
        return None
    if name == "sink" and isinstance(message, Result):
        return (message.vector_id or "").encode()
    return _KEY_OF[type(message)](message)


_KEY_OF: Final[Mapping[type, Callable[[Any], bytes | None]]] = {
    Result: lambda result: result.request.correlation_id.encode(),
    Usage: lambda usage: usage.payer_id.encode(),
    ProviderCall: lambda call: call.attempt_id.encode(),
    Tombstone: lambda tombstone: tombstone.vector_id.encode(),
    UsageTotal: lambda total: _composite_key(*total.key),
    TaskProgress: lambda progress: _composite_key(progress.tenant_id, progress.task_id),
    BudgetState: lambda state: _composite_key(*state.key),
    BudgetKey: lambda key: _composite_key(*key),
    DocumentManifest: lambda manifest: _composite_key(manifest.tenant_id, manifest.collection, manifest.document_id),
    DeadLetter: lambda letter: letter.record.key,
}


def request_key(request: Request) -> bytes | None:
    """The key the client gives a request: its document, so that one document's requests keep their order.

    None without a document: nothing has to be kept in order then, and any partition will do.
    """
    if request.document_id is None:
        return None
    return _composite_key(request.tenant_id, request.collection, request.document_id)


def _composite_key(*parts: str | None) -> bytes:
    return _as_json(parts).encode()


_as_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Made once: `json.dumps` makes an encoder for each call."""


def encode_request(request: Request) -> bytes:
    """The value of a request as an Avro single object."""
    return _SINGLE_OBJECT.encode_request(request)


_SINGLE_OBJECT: Final = Codec()
