"""Kafka's default partitioner: Java's murmur2, for many keys at once in numpy, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from aiokafka.partitioner import murmur2

SEED = np.uint32(0x9747B28C)
MULTIPLIER = np.uint32(0x5BD1E995)

FEW_KEYS = 8
"""Below so many a loop is faster than setting numpy up."""

LONG_KEY_BYTES = 1_024
"""Every key is padded to the longest: one longer than this would make all of them cost its length. A correlation id
may have so many, and each of its request's 2,048 results has it for a key: 10 ms, by the loop 300."""


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Java's partitioner gives to a key, of `partitions`."""
    return cast(int, (murmur2(key) & 0x7FFFFFFF) % partitions)


def partitions_of(keys: Sequence[bytes], partitions: int) -> list[int]:
    """The same for each of these keys."""
    if len(keys) < FEW_KEYS or max(map(len, keys)) > LONG_KEY_BYTES:
        return [partition_of(key, partitions) for key in keys]
    found: list[int] = ((_murmur2(keys) & np.uint32(0x7FFFFFFF)) % np.uint32(partitions)).tolist()
    return found


def _murmur2(keys: Sequence[bytes]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    lengths = np.fromiter(map(len, keys), np.uint32, len(keys))
    whole, rest = lengths >> np.uint32(2), lengths & np.uint32(3)
    words = int(whole.max()) + 1
    padded = b"".join([key.ljust(4 * words, b"\0") for key in keys])
    # One row for the n-th word of every key. The padding makes a key's last, partial word read as Java shifts it.
    raw = np.ascontiguousarray(np.frombuffer(padded, "<u4").reshape(len(keys), words).T).astype(np.uint32, copy=False)
    mixed = raw * MULTIPLIER
    mixed ^= mixed >> np.uint32(24)
    mixed *= MULTIPLIER
    hashes = SEED ^ lengths
    for n in range(words - 1):
        hashes = np.where(n < whole, (hashes * MULTIPLIER) ^ mixed[n], hashes)
    last = raw[whole, np.arange(len(keys))]
    hashes = np.where(rest > 0, (hashes ^ last) * MULTIPLIER, hashes)
    hashes ^= hashes >> np.uint32(13)
    hashes *= MULTIPLIER
    hashes ^= hashes >> np.uint32(15)
    return hashes
