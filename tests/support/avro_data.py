"""Generated data of any Avro schema, and whether one schema reads what another wrote."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from typing import Any

from fastavro import parse_schema, schemaless_reader, schemaless_writer
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

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
