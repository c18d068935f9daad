"""Generated data of any Avro schema, and whether one schema reads what another wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

from fastavro import parse_schema, schemaless_reader, schemaless_writer
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from processor.accounts import UsageSums, UsageTotal
from processor.domain import ACTION_ALIASES, OPERATION_OF, Amounts, Request, Result, Usage

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)

PRIMITIVES: dict[str, st.SearchStrategy[Any]] = {
    "null": st.none(),
    "boolean": st.booleans(),
    "int": st.integers(-(2**31), 2**31 - 1),
    "long": LONG,
    "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False),
    "string": TEXT,
    "bytes": st.binary(max_size=12),
}


def values_of(schema: Any, named: dict[str, Any] | None = None) -> st.SearchStrategy[Any]:
    """Values that a writer of the schema (as it is in its file) could send; no namespaces inside, no recursion."""
    named = {} if named is None else named
    if isinstance(schema, list):
        return st.one_of([values_of(branch, named) for branch in schema])
    if isinstance(schema, str):
        return PRIMITIVES[schema] if schema in PRIMITIVES else values_of(named[schema], named)
    kind = schema["type"]
    if kind in {"record", "enum"}:
        named[schema["name"]] = schema
    if kind == "record":
        return st.fixed_dictionaries({f["name"]: values_of(f["type"], named) for f in schema["fields"]})
    if kind == "array":
        return st.lists(values_of(schema["items"], named), max_size=3)
    if kind == "map":
        return st.dictionaries(TEXT, values_of(schema["values"], named), max_size=3)
    if kind == "enum":
        return st.sampled_from(schema["symbols"])
    return PRIMITIVES[kind]


def encode(schema: Any, value: Any) -> bytes:
    out = BytesIO()
    schemaless_writer(out, parse_schema(schema), value)
    return out.getvalue()


def zigzag(number: int) -> bytes:
    """A long as Avro writes it."""
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


def flipped(value: bytes, place: int, bit: int) -> bytes:
    return value[:place] + bytes([value[place] ^ (1 << bit)]) + value[place + 1 :]


def left_when_damaged(read: Callable[[bytes], Any], value: bytes, start: int, data: st.DataObject) -> None:
    """Read the record with one bit flipped, with bytes put in or taken out; cut or continued it must be left alone."""
    place = data.draw(st.integers(start, len(value) - 1))
    more = data.draw(st.binary(min_size=1, max_size=4))
    read(flipped(value, place, data.draw(st.integers(0, 7))))
    read(value[:place] + more + value[place:])
    read(value[:place] + value[place + 1 :])
    assert read(value[:place]) is None
    assert read(value + more) is None


def left_when_cut(read: Callable[[bytes], Any], value: bytes, start: int) -> None:
    """The record is taken; cut at any byte it is left alone; then it is read with each bit flipped."""
    assert read(value) is not None
    for place in range(start, len(value)):
        assert read(value[:place]) is None
        for bit in range(8):
            read(flipped(value, place, bit))


def decode(body: bytes, writer: Any, reader: Any = None) -> Any:
    return schemaless_reader(BytesIO(body), parse_schema(writer), None if reader is None else parse_schema(reader))


def unreadable(writer: Any, reader: Any, *, examples: int = 40) -> Any:
    """A value of the writer's schema that the reader's can't take or would change; None when there seems to be none.

    Fields that both know must keep their value, by name.
    """
    writer_parsed, reader_parsed = parse_schema(writer), parse_schema(reader)
    common = {field["name"] for field in writer["fields"]} & {field["name"] for field in reader["fields"]}

    def breaks(value: Any) -> bool:
        body = encode(writer_parsed, value)
        try:
            read = decode(body, writer_parsed, reader_parsed)
        except Exception:  # noqa: BLE001 - whatever it raises, the reader can't read it
            return True
        meant = decode(body, writer_parsed)
        return any(read[name] != meant[name] for name in common)

    try:
        return find(
            values_of(writer),
            breaks,
            settings=settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate]),
        )
    except NoSuchExample:
        return None


def pinned(schema_text: str, fingerprint: bytes) -> dict[str, str]:
    """What `schemas/released.json` holds of a version: anything but a doc changes it."""

    def without_docs(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: without_docs(value) for key, value in node.items() if key != "doc"}
        return [without_docs(item) for item in node] if isinstance(node, list) else node

    plain = json.dumps(without_docs(json.loads(schema_text)), separators=(",", ":"), ensure_ascii=False)
    return {"fingerprint": fingerprint.hex(), "sha256_without_docs": hashlib.sha256(plain.encode()).hexdigest()}


def result_fields(result: Result) -> dict[str, Any]:
    """The fields of its EmbeddingResult, for fastavro to write; the vector as a list."""
    request, error, vector = result.request, result.error, result.vector
    action, reply_to = ACTION_ALIASES.get(request.action), request.reply_to
    own: tuple[str, ...] = (
        "request_id",
        "first_chunk_index",
        "chunk_index",
        "length",
        "chunk_id",
        "chunk_metadata",
        "status",
    )
    own += ("vector_id", "provider", "model", "vector_space", "dimensions", "token_count", "token_source", "cache")
    own += ("cut_tokens", "cost_nanos", "time_taken_ms", "completed_at_ms")
    return {
        **_echo(request),
        **{name: getattr(result, name) for name in own},
        "truncated": result.cut_tokens > 0,
        "input_type": request.input_type,
        "operation": None if action is None else OPERATION_OF.get(action),
        "reply_type": None if reply_to is None else reply_to.reply_type,
        "source_version": result.source.version,
        "accepted_at_ms": result.source.append_ms,
        "chunk_count": request.whole_count,
        "error": None if error is None else {name: getattr(error, name) for name in error.__dataclass_fields__},
        "vector": [] if vector is None else vector.tolist(),
    }


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The fields of its TokenUsage, for fastavro to write."""
    own: tuple[str, ...] = (
        "idempotency_key",
        "request_id",
        "payer_id",
        "charged_at_ms",
        "completed_at_ms",
        "time_taken_ms",
    )
    own += ("operation", "provider", "model", "vector_space", "token_source", "texts", "characters", "failed_texts")
    own += ("token_type", "cached_texts", "price_nanos_per_million", "price_version")
    return {
        **_echo(usage.request),
        **{name: getattr(usage, name) for name in own},
        "first_chunk_index": usage.request.first_chunk_index,
        "source_topic": usage.source.topic,
        "source_partition": usage.source.partition,
        "source_offset": usage.source.offset,
        "mean_characters": usage.characters / usage.texts if usage.texts else None,
        "billed": _amounts(usage.billed),
        "saved": _amounts(usage.saved),
        "parts": [part._asdict() for part in usage.parts],
    }


def _echo(request: Request) -> dict[str, Any]:
    names: tuple[str, ...] = (
        "tenant_id",
        "correlation_id",
        "action",
        "collection",
        "document_id",
        "task_id",
        "task_total",
        "agent_id",
    )
    names += ("agent_owner_id", "conversation_id", "run_id", "source_service", "requested_at_ms", "metadata")
    return {name: getattr(request, name) for name in names}


def total_fields(total: UsageTotal) -> dict[str, Any]:
    """The fields of its record, for fastavro to write."""
    parts = sorted(total.partitions.items())
    names = UsageSums.__dataclass_fields__
    return total.key._asdict() | {
        "totals": {name: sum(getattr(sums, name) for _, (_, sums) in parts) for name in names},
        "partitions": [
            {
                "partition": partition,
                "last_offset": last_offset,
                "sums": {name: getattr(sums, name) for name in names},
            }
            for partition, (last_offset, sums) in parts
        ],
        "updated_at_ms": total.updated_at_ms,
    }


def _amounts(amounts: Amounts) -> dict[str, Any]:
    return {name: getattr(amounts, name) for name in amounts.__dataclass_fields__}
