"""Keys find their partition as Java's partitioner would place them."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import murmur2

from processor.adapters.avro import MAX_CORRELATION_BYTES
from processor.adapters.murmur2 import FEW_KEYS, LONG_KEY_BYTES, partitions_of


def by_the_book(keys: list[bytes], partitions: int) -> list[int]:
    return [(murmur2(key) & 0x7FFFFFFF) % partitions for key in keys]


@pytest.mark.parametrize("partitions", [1, 3, 8, 12, 1_000, 2**31 - 1])
def test_many_keys_land_where_each_alone_does(partitions: int) -> None:
    """Keys of every length, random bytes, mixed in one pass; modulo the largest count their whole hash is compared."""
    random_ = random.Random(partitions)
    for longest in (0, 1, 3, 4, 5, 37, LONG_KEY_BYTES):
        keys = [random_.randbytes(length) for length in range(longest + 1)]
        keys += [random_.randbytes(random_.randint(0, longest)) for _ in range(FEW_KEYS)]
        random_.shuffle(keys)
        assert partitions_of(keys, partitions) == by_the_book(keys, partitions)


def test_a_very_long_key_and_few_keys_are_no_exception() -> None:
    """The plain way gives the same partitions."""
    random_ = random.Random(7)
    keys = [random_.randbytes(LONG_KEY_BYTES + 1), *(random_.randbytes(9) for _ in range(FEW_KEYS))]
    assert partitions_of(keys, 12) == by_the_book(keys, 12)
    assert partitions_of(keys[:2], 12) == by_the_book(keys[:2], 12)
    assert partitions_of([], 12) == []


def test_the_hash_is_java_s() -> None:
    """Values that Apache Kafka's own tests give for Utils.murmur2."""
    golden = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    keys = [*golden] * FEW_KEYS
    expected = [(value & 0x7FFFFFFF) % 7_919 for value in golden.values()] * FEW_KEYS
    assert partitions_of(keys, 7_919) == expected


def test_the_longest_correlation_id_is_no_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's 2,048 results share its id: hashed one by one they would hold everybody else up."""
    key = b"c" * MAX_CORRELATION_BYTES
    (expected,) = by_the_book([key], 12)
    monkeypatch.setattr("processor.adapters.murmur2.murmur2", None)
    assert partitions_of([key] * 2_048, 12) == [expected] * 2_048
