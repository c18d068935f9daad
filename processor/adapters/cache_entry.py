"""A cache entry as bytes: what Redis holds.

Little-endian: version, token source, lengths of the two ids (a byte each), CRC-32, the embedding function (the tag that
the key has of it), tokens, tokens cut off, leader's index, dimensions (4 bytes each), the vector as float32, the
leader's request id and the attempt id as UTF-8. The checksum covers the key too, and with it tenant, function and text:
a value that came under a wrong key is as bad as a broken one.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from processor.domain import Entry, Item, TokenSource
from processor.ports import FUNCTION_TAG_BYTES, SCOPE_TAG_BYTES

VERSION = 3

_HEADER = struct.Struct("<BBBBI4sIIII")
_unpack = _HEADER.unpack_from
_AFTER_CRC = 8
_FUNCTION = slice(SCOPE_TAG_BYTES, SCOPE_TAG_BYTES + FUNCTION_TAG_BYTES)
_SOURCES = (TokenSource.PROVIDER, TokenSource.TOKENIZER, TokenSource.ESTIMATE)


def encode(key: bytes, entry: Entry) -> bytes:
    """The value to store under a key. Ids have at most 255 bytes."""
    request_id, attempt_id = entry.leader.request_id.encode(), entry.attempt_id.encode()
    value = bytearray(
        _HEADER.pack(
            VERSION,
            _SOURCES.index(entry.token_source),
            len(request_id),
            len(attempt_id),
            0,
            _function(key),
            entry.tokens,
            entry.cut_tokens,
            entry.leader.index,
            entry.vector.size,
        )
    )
    value += entry.vector.astype("<f4", copy=False).tobytes()
    value += request_id + attempt_id
    struct.pack_into("<I", value, 4, _checksum(key, value))
    return bytes(value)


def decode(key: bytes, value: bytes, dimensions: int) -> Entry | None:
    """The entry, or None when the value is not one of this key, version and number of dimensions."""
    if len(value) < _HEADER.size:
        return None
    version, source, request_bytes, attempt_bytes, crc, function, tokens, cut_tokens, index, size = _unpack(value)
    ids = _HEADER.size + 4 * size
    if (
        version != VERSION
        or size != dimensions
        or function != _function(key)
        or len(value) != ids + request_bytes + attempt_bytes
        or crc != _checksum(key, value)
    ):
        return None
    try:
        return Entry(
            vector=np.frombuffer(value, "<f4", size, _HEADER.size),
            tokens=tokens,
            leader=Item(value[ids : ids + request_bytes].decode(), index),
            attempt_id=value[ids + request_bytes :].decode(),
            token_source=_SOURCES[source],
            cut_tokens=cut_tokens,
        )
    except (IndexError, UnicodeDecodeError):  # anybody can sum up a checksum
        return None


def _function(key: bytes) -> bytes:
    return key[_FUNCTION].ljust(FUNCTION_TAG_BYTES, b"\0")


def _checksum(key: bytes, value: bytes | bytearray) -> int:
    """Over the key, the first four bytes, and what follows the checksum itself."""
    return zlib.crc32(memoryview(value)[_AFTER_CRC:], zlib.crc32(value[:4], zlib.crc32(key)))
