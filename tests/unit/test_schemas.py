"""The schema files: documented, pinned once released, and FULL_TRANSITIVE."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import pytest

from processor.adapters.avro_records import WIRE_NAME
from processor.adapters.schemas import canonical_fingerprint, current, released, schema_directory
from processor.domain import (
    CacheLevel,
    CallKind,
    CallOutcome,
    ErrorCode,
    Operation,
    Status,
    TokenSource,
    Truncate,
)
from tests.support.avro_data import decode, encode, pinned, unreadable

RECORDS = sorted(set(WIRE_NAME.values()))
VERSIONS = sorted(released().values(), key=lambda schema: (schema.name, schema.version))
NAMES = [f"{schema.name}.v{schema.version}" for schema in VERSIONS]


def file_of(name: str) -> Any:
    return json.loads(current(name).text)


def fields_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Every field, those of nested records too."""
    if isinstance(schema, list):
        for branch in schema:
            yield from fields_of(branch)
    elif isinstance(schema, dict):
        for field in schema.get("fields", ()):
            yield field
            yield from fields_of(field["type"])
        for nested in ("items", "values"):
            yield from fields_of(schema.get(nested))


def doc_of(record: str, name: str) -> str:
    return " ".join(field["doc"] for field in fields_of(file_of(record)) if field["name"] == name)


@pytest.mark.parametrize("schema", VERSIONS, ids=NAMES)
def test_every_field_says_what_it_means(schema: Any) -> None:
    """Each record and each field has a doc that ends as a sentence does."""
    document = json.loads(schema.text)
    docs = [document.get("doc", ""), *(field.get("doc", "") for field in fields_of(document))]
    assert all(doc.endswith(".") for doc in docs)


@pytest.mark.parametrize("schema", VERSIONS, ids=NAMES)
def test_a_file_is_named_after_its_record(schema: Any) -> None:
    """The record's own name carries no version, so that versions read one another."""
    assert (json.loads(schema.text)["namespace"], json.loads(schema.text)["name"]) == ("embedding", schema.name)


@pytest.mark.parametrize("record", RECORDS)
def test_optional_fields_have_their_null_as_default(record: str) -> None:
    """A nullable field begins with null and defaults to it, so that it may go or come later."""
    nullable = [field for field in fields_of(file_of(record)) if isinstance(field["type"], list)]
    assert all(field["type"][0] == "null" and field["default"] is None for field in nullable)


@pytest.mark.parametrize(
    "record,field,words",
    [
        ("EmbeddingResult", "status", Status),
        ("EmbeddingResult", "cache", CacheLevel),
        ("EmbeddingResult", "token_source", TokenSource),
        ("EmbeddingResult", "operation", Operation),
        ("EmbeddingResult", "code", ErrorCode),
        ("EmbeddingRequest", "truncate", Truncate),
        ("TokenUsage", "operation", Operation),
        ("TokenUsage", "token_source", TokenSource),
        ("ProviderCall", "kind", CallKind),
        ("ProviderCall", "outcome", CallOutcome),
    ],
)
def test_the_words_of_an_open_set_are_documented(record: str, field: str, words: type[StrEnum]) -> None:
    """The doc of a field that holds words of ours names each of them."""
    doc = doc_of(record, field)
    assert [word for word in words if word.value not in doc] == []


def test_released_versions_never_change() -> None:
    """Anything but a doc of a released schema that changes, or a version that vanishes, is found."""
    pins = json.loads((schema_directory() / "released.json").read_text(encoding="utf-8"))
    assert {name: pinned(s.text, s.fingerprint) for name, s in zip(NAMES, VERSIONS, strict=True)} == pins


def test_a_changed_default_is_found_by_the_pin() -> None:
    """The control: the fingerprint alone would not see it."""
    schema = current("EmbeddingRequest")
    changed = schema.text.replace('"use_cache", "type": "boolean", "default": true', '"use_cache", "type": "boolean"')
    assert changed != schema.text
    assert canonical_fingerprint(json.loads(changed)) == schema.fingerprint
    assert pinned(changed, schema.fingerprint) != pinned(schema.text, schema.fingerprint)


def test_fingerprints_are_those_of_the_specification() -> None:
    """CRC-64-AVRO of the schemas "int" and "null" as in the specification's own test data, little-endian."""
    assert canonical_fingerprint("int") == (0x7275D51A3F395C8F).to_bytes(8, "little")
    assert canonical_fingerprint("null") == (0x63DD24E7CC258F8A).to_bytes(8, "little")


def test_no_two_versions_share_a_fingerprint() -> None:
    """A fingerprint names one version of one record."""
    assert len(released()) == len(list(schema_directory().glob("*.avsc")))
    assert {schema.name for schema in VERSIONS} == set(RECORDS)


@pytest.mark.parametrize("record", RECORDS)
def test_every_version_reads_every_other(record: str) -> None:
    """FULL_TRANSITIVE: what any released version wrote, any other reads with equal values."""
    versions = [json.loads(schema.text) for schema in VERSIONS if schema.name == record]
    assert [unreadable(writer, reader) for writer in versions for reader in versions] == [None] * len(versions) ** 2


def add_optional(schema: Any) -> None:
    schema["fields"].append({"name": "region", "type": ["null", "string"], "default": None})


def remove_optional(schema: Any) -> None:
    schema["fields"] = [field for field in schema["fields"] if field["name"] != optional_of(schema)]


def reorder(schema: Any) -> None:
    first, second, *rest = schema["fields"]
    schema["fields"] = [second, first, *rest]


def add_required(schema: Any) -> None:
    schema["fields"].append({"name": "region", "type": "string"})


def remove_required(schema: Any) -> None:
    schema["fields"] = [field for field in schema["fields"] if field["name"] != required_of(schema)]


def rename(schema: Any) -> None:
    next(field for field in schema["fields"] if field["name"] == required_of(schema))["name"] = "other"


def change_type(schema: Any) -> None:
    next(field for field in schema["fields"] if field["name"] == required_of(schema))["type"] = "long"


def widen(schema: Any) -> None:
    next(field for field in schema["fields"] if field["name"] == required_of(schema))["type"] = ["null", "string"]


def make_enum(schema: Any) -> None:
    field = next(field for field in schema["fields"] if field["name"] == required_of(schema))
    field["type"] = {"type": "enum", "name": "Word", "symbols": ["ok", "error"]}


def optional_of(schema: Any) -> str | None:
    return next((field["name"] for field in schema["fields"] if "default" in field), None)


def required_of(schema: Any) -> str:
    return next(str(f["name"]) for f in schema["fields"] if f["type"] == "string" and "default" not in f)


def compatible(record: str, change: Callable[[Any], None]) -> bool:
    """Whether the record and its changed copy read each other."""
    one = file_of(record)
    other = copy.deepcopy(one)
    change(other)
    return unreadable(one, other) is None and unreadable(other, one) is None


@pytest.mark.parametrize("change", [add_optional, remove_optional, reorder])
@pytest.mark.parametrize("record", ["EmbeddingRequest", "ProviderCall", "TokenUsage"])
def test_changes_that_are_allowed_pass(record: str, change: Callable[[Any], None]) -> None:
    """The control: a field with a default may come and go, and order means nothing."""
    assert compatible(record, change)


@pytest.mark.parametrize("change", [add_required, remove_required, rename, change_type, widen, make_enum])
@pytest.mark.parametrize("record", ["EmbeddingRequest", "ProviderCall", "TokenUsage"])
def test_changes_that_break_a_reader_are_found(record: str, change: Callable[[Any], None]) -> None:
    """The check fails on each kind of change that FULL_TRANSITIVE forbids."""
    assert not compatible(record, change)


@pytest.mark.parametrize("record", RECORDS)
def test_the_example_is_valid_and_whole(record: str) -> None:
    """Each example names exactly the fields of its schema and survives the wire."""
    example = json.loads((schema_directory() / "examples" / f"{record}.json").read_text(encoding="utf-8"))
    schema = file_of(record)
    assert list(example) == [field["name"] for field in schema["fields"]]
    assert decode(encode(schema, example), schema) == example


def test_the_usage_example_obeys_its_own_rules() -> None:
    """An example that did not add up would teach the wrong thing."""
    usage = json.loads((schema_directory() / "examples" / "TokenUsage.json").read_text(encoding="utf-8"))
    assert sum(part["tokens"] for part in usage["parts"]) == usage["billed"]["tokens"]
    assert usage["billed"]["characters"] + usage["saved"]["characters"] == usage["characters"]
    assert math.isclose(usage["mean_characters"], usage["characters"] / usage["texts"])
    assert usage["billed"]["cost_nanos"] * 1_000_000 == usage["billed"]["tokens"] * usage["price_nanos_per_million"]
