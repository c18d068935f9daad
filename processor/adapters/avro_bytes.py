"""The pieces of Avro's binary encoding, read by index. For readers that leave whatever is unusual to a general one.

Each gives a value and where it ends, which may be past the end of the bytes: IndexError is raised by whatever is read
next there. ValueError on what is malformed, and on valid spellings that ordinary writers don't use.
"""

from __future__ import annotations


def read_long(value: bytes, at: int) -> tuple[int, int]:
    """The integer that begins there and where it ends. IndexError past the end, ValueError over 64 bits."""
    bits = value[at]
    if bits > 127:
        at += 1
        byte = value[at]
        bits += (byte - 1) << 7
        if byte < 128:
            return (bits >> 1) ^ -(bits & 1), at + 1
        bits &= 0x3FFF
        for shift in range(14, 70, 7):
            at += 1
            byte = value[at]
            bits |= (byte & 127) << shift
            if byte < 128:
                break
        if byte > 127 or bits >> 64:
            raise ValueError("a long integer")
    return (bits >> 1) ^ -(bits & 1), at + 1


def read_optional_long(value: bytes, at: int) -> tuple[int | None, int]:
    branch = value[at]
    if branch == 2:
        return read_long(value, at + 1)
    if branch:
        raise ValueError("an unusual branch")
    return None, at + 1


def read_text(value: bytes, at: int) -> tuple[str, int]:
    """The string that begins there and where it would end. UnicodeDecodeError (a ValueError) when it isn't UTF-8."""
    length = value[at]
    if length > 127 or length & 1:
        length, at = read_long(value, at)
        if length < 0:
            raise ValueError("a negative length")
        end = at + length
        return value[at:end].decode(), end
    end = at + 1 + (length >> 1)
    return value[at + 1 : end].decode(), end


def read_optional_text(value: bytes, at: int) -> tuple[str | None, int]:
    branch = value[at]
    if branch == 2:
        return read_text(value, at + 1)
    if branch:
        raise ValueError("an unusual branch")
    return None, at + 1


def read_bool(value: bytes, at: int) -> tuple[bool, int]:
    byte = value[at]
    if byte > 1:
        raise ValueError("an unusual bool")
    return byte == 1, at + 1


def read_map(value: bytes, at: int) -> tuple[dict[str, str], int]:
    """The map that begins there and where it ends. ValueError unless it is empty or one plain block."""
    entries: dict[str, str] = {}
    if not value[at]:
        return entries, at + 1
    count, at = read_long(value, at)
    if count < 1:
        raise ValueError("an unusual block")
    for _ in range(count):
        key, at = read_text(value, at)
        entries[key], at = read_text(value, at)
    if value[at]:
        raise ValueError("another block")
    return entries, at + 1
