"""Results, usage events and totals written straight as bytes, several times as fast as through a general Avro writer.

The bytes are those of the current schemas, field by field in their order: what a general writer makes of the same
fields. What the records of one sender repeat is remembered in stretches, and a vector is copied once, as it lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from struct import Struct
from typing import Any, Final

import numpy as np

from processor.accounts import UsageSums, UsageTotal
from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    Fault,
    Part,
    Request,
    Result,
    Source,
    Usage,
)

MAX_REMEMBERED = 8_192
MAX_REMEMBERED_BYTES = 256
"""Of one memory of this module: how many pieces, and the longest that is kept."""

MAX_SENDERS = 1_024
"""Of how many senders something is remembered, see `Request.sender`."""

NULL: Final = b"\x00"
EMPTY: Final = b"\x00"
FALSE: Final = b"\x00"
TRUE: Final = b"\x01"
SOME: Final = b"\x02"
"""The branch of a nullable field that is not null; likewise the count of an array with one item."""

FLOAT32: Final = np.dtype("<f4")
"""How vectors lie on the wire. Native on any machine of today."""


class Memory(dict[Any, bytes]):
    """The bytes of what is written again and again, by value. Emptied when it is full."""

    __slots__ = ("_encode",)

    def __init__(self, encode: Callable[[Any], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, value: Any) -> bytes:
        encoded = self._encode(value)
        if len(encoded) <= MAX_REMEMBERED_BYTES:
            if len(self) >= MAX_REMEMBERED:
                self.clear()
            self[value] = encoded
        return encoded


def encode_unsigned(bits: int) -> bytes:
    """Seven bits a byte, the least first, each but the last with its high bit set."""
    encoded = bytearray()
    while bits > 127:
        encoded.append(bits & 127 | 128)
        bits >>= 7
    encoded.append(bits)
    return bytes(encoded)


LOW_BITS: Final = tuple(bytes((bits & 127 | 128, bits >> 7 | 128)) for bits in range(1 << 14))
HIGH_BITS: Final = Memory(encode_unsigned)


def encode_long(number: int) -> bytes:
    """A long of Avro. OverflowError beyond 64 bits. Fast for offsets and times, whose high bits seldom change."""
    bits = number << 1 if number >= 0 else ~(number << 1)
    if bits < 1 << 14:
        return encode_unsigned(bits)
    if bits >> 64:
        raise OverflowError("an integer over 64 bits")
    return LOW_BITS[bits & 0x3FFF] + HIGH_BITS[bits >> 14]


LONGS: Final = Memory(encode_long)
OPTIONAL_LONGS: Final = Memory(lambda number: NULL if number is None else SOME + encode_long(number))


def encode_text(text: str) -> bytes:
    """UnicodeEncodeError when it holds a lone surrogate."""
    encoded = text.encode()
    return LONGS[len(encoded)] + encoded


def encode_optional_text(text: str | None) -> bytes:
    if text is None:
        return NULL
    encoded = text.encode()
    return SOME + LONGS[len(encoded)] + encoded


TEXTS: Final = Memory(encode_text)
OPTIONAL_TEXTS: Final = Memory(encode_optional_text)
"""For words of closed sets, names of models and the like; what is different in each record would only push them out."""


def encode_map(entries: Mapping[str, str]) -> bytes:
    if not entries:
        return EMPTY
    parts = [LONGS[len(entries)]]
    for key, value in entries.items():
        parts += (TEXTS[key], encode_text(value))
    parts.append(EMPTY)
    return b"".join(parts)


def encode_error(error: Fault) -> bytes:
    texts = encode_text(error.code) + encode_text(error.field) + encode_text(error.message)
    return SOME + texts + (TRUE if error.retryable else FALSE)


def encode_parts(parts: Sequence[Part]) -> bytes:
    encoded = [encode_text(attempt_id) + LONGS[tokens] for attempt_id, tokens in parts]
    return b"".join((LONGS[len(encoded)], *encoded, EMPTY)) if encoded else EMPTY


def encode_version(source: Source) -> bytes:
    """`Source.version`, in less than half of its time."""
    return b"%013d-%05d-%019d" % (source.append_ms, source.partition, source.offset)


_optional_double = Struct("<cd").pack


class Echo:
    """What results and usage events repeat of a request.

    Remembers what a sender seldom changes, and the whole of the last request, whose records are written together.
    """

    def __init__(self) -> None:
        self._senders: dict[object, tuple[bytes, bytes, bytes, bytes, bytes]] = {}
        self._request: Request | None = None
        self._last = b"", b""

    def of(self, request: Request) -> tuple[bytes, bytes]:
        """The fields tenant_id to metadata, in the order of both schemas; and input_type to reply_type of a result."""
        if request is self._request:
            return self._last
        stretches = self._senders.get(request.sender) or self._new(request)
        tenant_id, action, task, metadata, words = stretches
        correlation_id = request.correlation_id.encode()
        echo = b"".join(
            (
                tenant_id,
                LONGS[len(correlation_id)],
                correlation_id,
                action,
                encode_optional_text(request.document_id),
                task,
                LONGS[request.requested_at_ms],
                metadata,
            )
        )
        self._request, self._last = request, (echo, words)
        return self._last

    def _new(self, request: Request) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """tenant_id; action to collection; task_id to source_service; metadata; input_type to reply_type."""
        action, reply_to = ACTION_ALIASES.get(request.action), request.reply_to
        stretches = (
            encode_text(request.tenant_id),
            encode_text(request.action) + encode_optional_text(request.collection),
            b"".join(
                (
                    encode_optional_text(request.task_id),
                    OPTIONAL_LONGS[request.task_total],
                    encode_optional_text(request.agent_id),
                    encode_optional_text(request.agent_owner_id),
                    encode_optional_text(request.conversation_id),
                    encode_optional_text(request.run_id),
                    encode_text(request.source_service),
                )
            ),
            encode_map(request.metadata),
            b"".join(
                (
                    encode_optional_text(request.input_type),
                    encode_optional_text(None if action is None else OPERATION_OF.get(action)),
                    encode_optional_text(None if reply_to is None else reply_to.reply_type),
                )
            ),
        )
        if request.sender is not None:
            if len(self._senders) >= MAX_SENDERS:
                self._senders.clear()
            self._senders[request.sender] = stretches
        return stretches


class OutcomeWriter:
    """Writes results and usage events behind a header, the frame of their schema.

    Remembers the last result, which is sent several times, and what its neighbours of the same request share.
    """

    def __init__(self) -> None:
        self._echo = Echo()
        self._result: Result | None = None
        self._value = b""
        self._shared_by: Result | None = None
        self._shared = b""

    def result(self, header: bytes, result: Result) -> bytes:
        """The value of the record. `vector` is written as float32, whatever its byte order and strides."""
        if result is self._result:
            return self._value
        last = self._shared_by
        if (
            last is None
            or last.request is not result.request
            or last.source is not result.source
            or last.request_id != result.request_id
        ):
            self._shared = self._shared_part(header, result)
            self._shared_by = result
        vector_id, vector, error = result.vector_id, result.vector, result.error
        items: Any  # what `join` takes: bytes, or an array whose items lie one after the other
        if vector is None or not len(vector):
            count, items, end = EMPTY, b"", b""
        elif vector.dtype is FLOAT32 and vector.strides == (4,):
            count, items, end = LONGS[len(vector)], vector, EMPTY
        else:
            count, items, end = LONGS[len(vector)], vector.astype(FLOAT32).tobytes(), EMPTY
        chunk_id = result.chunk_id.encode()
        self._value = b"".join(
            (
                self._shared,
                LONGS[result.first_chunk_index],
                LONGS[result.chunk_index],
                LONGS[result.length],
                LONGS[len(chunk_id)],
                chunk_id,
                encode_map(result.chunk_metadata) if result.chunk_metadata else EMPTY,
                TEXTS[result.status],
                NULL if error is None else encode_error(error),
                encode_optional_text(vector_id),
                TEXTS[result.provider],
                TEXTS[result.model],
                TEXTS[result.vector_space],
                LONGS[result.dimensions],
                LONGS[result.token_count],
                TEXTS[result.token_source],
                TEXTS[result.cache],
                TRUE if result.cut_tokens else FALSE,
                LONGS[result.cut_tokens],
                OPTIONAL_LONGS[result.cost_nanos],
                LONGS[result.time_taken_ms],
                LONGS[result.completed_at_ms],
                count,
                items,
                end,
            )
        )
        self._result = result
        return self._value

    def _shared_part(self, header: bytes, result: Result) -> bytes:
        """The fields before first_chunk_index, which all results of one request have in common."""
        request, source = result.request, result.source
        echo, words = self._echo.of(request)
        request_id = result.request_id.encode()
        version = encode_version(source)
        return b"".join(
            (
                header,
                LONGS[len(request_id)],
                request_id,
                echo,
                words,
                LONGS[len(version)],
                version,
                LONGS[source.append_ms],
                LONGS[request.whole_count],
            )
        )

    def usage(self, header: bytes, usage: Usage) -> bytes:
        """The value of the record; `mean_characters` is null without texts."""
        request, source, billed, saved = usage.request, usage.source, usage.billed, usage.saved
        echo, _ = self._echo.of(request)
        request_id = encode_text(usage.request_id)
        return b"".join(
            (
                header,
                request_id if usage.event_key is None else encode_text(usage.event_key),
                request_id,
                TEXTS[usage.payer_id],
                echo,
                LONGS[request.first_chunk_index],
                TEXTS[source.topic],
                LONGS[source.partition],
                encode_long(source.offset),
                LONGS[usage.charged_at_ms],
                LONGS[usage.completed_at_ms],
                LONGS[usage.time_taken_ms],
                TEXTS[usage.operation],
                TEXTS[usage.token_type],
                TEXTS[usage.provider],
                TEXTS[usage.model],
                TEXTS[usage.vector_space],
                TEXTS[usage.token_source],
                LONGS[usage.texts],
                LONGS[usage.characters],
                _optional_double(SOME, usage.characters / usage.texts) if usage.texts else NULL,
                LONGS[usage.failed_texts],
                LONGS[usage.cached_texts],
                LONGS[billed.texts],
                LONGS[billed.tokens],
                LONGS[billed.characters],
                OPTIONAL_LONGS[billed.cost_nanos],
                LONGS[saved.texts],
                LONGS[saved.tokens],
                LONGS[saved.characters],
                OPTIONAL_LONGS[saved.cost_nanos],
                encode_parts(usage.parts) if usage.parts else EMPTY,
                OPTIONAL_LONGS[usage.price_nanos_per_million],
                OPTIONAL_TEXTS[usage.price_version],
            )
        )


def write_total(header: bytes, total: UsageTotal) -> bytes:
    """The value of the record: the sums of all partitions, and of each. OverflowError beyond 64 bits."""
    parts = sorted(total.partitions.items())
    each = [_sum_values(sums) for _, (_, sums) in parts]
    encoded = [b"".join(map(encode_long, values)) for values in each]
    pieces = [header, *map(encode_text, total.key)]
    if len(parts) == 1:
        pieces += (encoded[0], SOME)
    else:
        pieces += (*map(encode_long, map(sum, zip(_NO_SUMS, *each, strict=True))), encode_long(len(parts)))
    for (partition, (last_offset, _)), sums in zip(parts, encoded, strict=True):
        pieces += (LONGS[partition], encode_long(last_offset), sums)
    pieces += (EMPTY if parts else b"", encode_long(total.updated_at_ms))
    return b"".join(pieces)


_SUM_NAMES: Final = [field.name for field in fields(UsageSums)]
_NO_SUMS: Final = (0,) * len(_SUM_NAMES)
_sum_values: Callable[[UsageSums], tuple[int, ...]] = attrgetter(*_SUM_NAMES)
