"""The fast reader of usage events: what it takes is what the general reader finds, and it takes what is ordinary."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters import avro_records
from processor.adapters.avro import LATE_SPARE_BYTES, Codec
from processor.adapters.avro_usage import MAX_AMOUNT, MAX_NAME_CHARS, YEAR_10000_MS, read_usage
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.domain import Amounts, DlqClass, Part, Usage
from processor.ports import Destination, Undecodable
from tests.support.avro_data import encode, left_when_cut, left_when_damaged, values_of
from tests.support.builders import a_request, a_usage
from tests.support.codec import read, value_of

SCHEMA = current("TokenUsage")
START = SINGLE_OBJECT_HEADER_BYTES
AMOUNT = st.integers(0, MAX_AMOUNT)
ANY = values_of(json.loads(SCHEMA.text))


def a_charge(fields: dict[str, Any], data: st.DataObject) -> bytes:
    """The record of these fields once its amounts and time are such."""
    draw = data.draw
    amounts = st.fixed_dictionaries(
        {"texts": AMOUNT, "tokens": AMOUNT, "characters": AMOUNT, "cost_nanos": st.none() | AMOUNT}
    )
    sound = {
        "billed": draw(amounts),
        "saved": draw(amounts),
        "texts": draw(AMOUNT),
        "failed_texts": draw(AMOUNT),
        "cached_texts": draw(AMOUNT),
        "parts": [part | {"tokens": draw(AMOUNT) // len(fields["parts"])} for part in fields["parts"]],
        "charged_at_ms": draw(st.integers(0, YEAR_10000_MS - 1)),
    }
    return written(fields | sound)


def written(fields: dict[str, Any]) -> bytes:
    return SCHEMA.single_object_header + encode(SCHEMA.parsed, fields)


def generally(value: bytes) -> Usage | None:
    """What fastavro reads, or None."""
    try:
        fields = avro_records._read_fields(value, START, SCHEMA)
        return None if isinstance(fields, Undecodable) else avro_records._usage(fields)
    except Exception:  # noqa: BLE001 - bad bytes end in any
        return None


def fast_or_left(value: bytes) -> Usage | None:
    """What the fast reader says, after the check that it left the record alone or agrees with fastavro."""
    found = read_usage(value, START)
    assert found is None or found == generally(value)
    return found


@settings(max_examples=150, deadline=None)
@given(ANY, st.data())
def test_any_charge_is_read_as_fastavro_reads_it(fields: dict[str, Any], data: st.DataObject) -> None:
    """Whatever else the fields hold, a charge of sound amounts that an ordinary writer wrote is taken and equal."""
    assert fast_or_left(a_charge(fields, data)) is not None


@settings(max_examples=150, deadline=None)
@given(ANY)
def test_any_event_is_equal_or_left(fields: dict[str, Any]) -> None:
    """Amounts and times of any size: never anything that the general reader does not read the same."""
    fast_or_left(written(fields))


@settings(max_examples=150, deadline=None)
@given(ANY, st.data())
def test_damaged_charges_are_equal_or_left(fields: dict[str, Any], data: st.DataObject) -> None:
    """Flipped bits, cut ends, bytes put in or left over: never anything that fastavro does not read the same."""
    left_when_damaged(fast_or_left, a_charge(fields, data), START, data)


def test_every_end_of_a_charge() -> None:
    """A charge that is cut anywhere is left alone, and with any bit flipped it is equal or left."""
    request = a_request(metadata={"language": "en"}, task_id="t", task_total=300, agent_id="a", run_id="r")
    left_when_cut(fast_or_left, value_of("usage", a_usage(request, parts=(Part("a", 1), Part("b", 2)))), START)


@pytest.mark.parametrize(
    "overrides",
    [
        {"charged_at_ms": -1},
        {"charged_at_ms": YEAR_10000_MS},
        {"billed": Amounts(1, -1, 5, 60)},
        {"billed": Amounts(1, 3, 5, MAX_AMOUNT + 1)},
        {"saved": Amounts(0, 0, -1, None)},
        {"failed_texts": -1},
        {"texts": MAX_AMOUNT + 1},
        {"parts": (Part("attempt-1", MAX_AMOUNT), Part("attempt-2", 1))},
        {"cached_texts": MAX_AMOUNT + 1},
        {"parts": (Part("attempt-1", 4), Part("attempt-2", -1))},
    ],
    ids=str,
)
def test_no_time_and_no_amount_are_no_usage(overrides: dict[str, Any]) -> None:
    """What no calendar or sum can hold is undecodable for every reader; its neighbour within the bounds is read."""
    assert read(Usage, value_of("usage", a_usage(**overrides))) == Undecodable(DlqClass.UNDECODABLE, "malformed")
    sound = a_usage(
        charged_at_ms=YEAR_10000_MS - 1,
        billed=Amounts(0, MAX_AMOUNT, 0, MAX_AMOUNT),
        saved=Amounts(0, 0, 0, None),
        parts=(Part("attempt-1", MAX_AMOUNT),),
    )
    assert read(Usage, value_of("usage", sound)).billed == sound.billed


@pytest.mark.parametrize("name", ["payer_id", "model", "operation", "agent_id", "collection", "tenant_id", "task_id"])
def test_no_name_makes_a_total_too_large(name: str) -> None:
    """A name is in key and value of a total or of a task's progress: too long, its event is undecodable for all."""

    def named(length: int) -> Usage:
        overrides: dict[str, Any] = {name: "\x01" * length}
        if name in ("payer_id", "model", "operation"):
            return a_usage(**overrides)
        return a_usage(a_request(**overrides), payer_id="p")

    for usage in (named(MAX_NAME_CHARS + 1), replace(named(MAX_NAME_CHARS + 1), event_key="another")):
        assert read(Usage, value_of("usage", usage)) == Undecodable(DlqClass.UNDECODABLE, "malformed")
        assert generally(value_of("usage", usage)) is None
    assert read(Usage, value_of("usage", named(MAX_NAME_CHARS))).request_id == named(MAX_NAME_CHARS).request_id


def test_what_is_read_can_be_sent_again_as_late() -> None:
    """The largest event that is read, under the longest payer as the key, fits into a record."""
    codec = Codec(max_record_bytes=100_000)

    def filled(count: int) -> Usage:
        return a_usage(a_request(metadata={"filling": "x" * count}), payer_id="\N{GRINNING FACE}" * MAX_NAME_CHARS)

    spare = 100_000 - LATE_SPARE_BYTES - len(value_of("usage", filled(20_000)))
    for more, said in ((spare, Usage), (spare + 1, Undecodable)):
        value = value_of("usage", filled(20_000 + more))
        assert type(codec.read_now(Usage, value)) is said
        sent = codec.encode(Destination("late", filled(20_000 + more)))
        assert DefaultRecordBatchBuilder.estimate_size_in_bytes(sent.key, sent.value, []) <= 100_000
