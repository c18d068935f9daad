"""Our Avro schemas: the files of schemas/, the allow-list of what may be decoded, and the framing of a record.

`<Name>.v<N>.avsc` is one released version and never changes; the highest N is the one we write and read as. Records
are framed as Avro single objects (C3 01 and a fingerprint) or, with a registry, in Confluent's format (00 and an id).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastavro import parse_schema
from fastavro.schema import fingerprint, to_parsing_canonical_form

CONFLUENT_MAGIC = 0x00
CONFLUENT_HEADER_BYTES = 5
SINGLE_OBJECT_MARK = b"\xc3\x01"
SINGLE_OBJECT_HEADER_BYTES = 10

MAX_SCHEMA_CHARACTERS = 65_536
"""Of a registry's schema. Ours are below 16,000; a bound on depth, since the parser recurses in C without a limit."""


def schema_directory() -> Path:
    """The copy inside an installed package, or `schemas/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_schemas"
    return installed if installed.is_dir() else package.parent / "schemas"


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """One released version of one record. `fingerprint`: CRC-64-AVRO of the canonical form as it is on the wire."""

    name: str
    version: int
    text: str = field(repr=False)
    parsed: Any = field(repr=False)
    fingerprint: bytes

    @property
    def single_object_header(self) -> bytes:
        return SINGLE_OBJECT_MARK + self.fingerprint


def canonical_fingerprint(schema: Any) -> bytes:
    """CRC-64-AVRO of a schema's parsing canonical form, 8 bytes little-endian, as single-object encoding has it."""
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


@cache
def released() -> Mapping[bytes, Schema]:
    """Every released version of every record by fingerprint: the only schemas that are ever decoded."""
    schemas = (_load(path) for path in sorted(schema_directory().glob("*.avsc")))
    return {schema.fingerprint: schema for schema in schemas}


@cache
def current(name: str) -> Schema:
    """The version of the record that we write and read as."""
    return max((s for s in released().values() if s.name == name), key=lambda schema: schema.version)


def allowed(schema_text: str) -> Schema | None:
    """Our schema with the same canonical form as this one from a registry; None when it isn't one of ours.

    Never raises: a registry holds whatever somebody put there.
    """
    if len(schema_text) > MAX_SCHEMA_CHARACTERS:
        return None
    try:
        foreign = canonical_fingerprint(json.loads(schema_text))
    except Exception:  # noqa: BLE001 - any defect of a foreign schema means that it isn't ours
        return None
    return released().get(foreign)


def confluent_header(schema_id: int) -> bytes:
    return struct.pack(">bI", CONFLUENT_MAGIC, schema_id)


def confluent_id(value: bytes) -> int:
    """The schema id of a record that begins with Confluent's magic byte and is at least 5 bytes long."""
    return int.from_bytes(value[1:CONFLUENT_HEADER_BYTES], "big")


def _load(path: Path) -> Schema:
    name, version, _ = path.name.split(".")
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    return Schema(name, int(version.removeprefix("v")), text, parse_schema(document), canonical_fingerprint(document))
