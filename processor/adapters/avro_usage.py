"""Usage events read straight from their bytes: the aggregator and the audit fold millions of them.

Only the ordinary shape of the current schema is read here; everything else, all that is malformed included, is left to
the general reader.
"""

from __future__ import annotations

from typing import Any, Final, cast

from processor.adapters.avro_bytes import (
    read_long,
    read_map,
    read_optional_long,
    read_optional_text,
    read_text,
)
from processor.domain import Amounts, Operation, Part, Request, Source, TokenSource, TokenType, Usage

MAX_AMOUNT: Final = 10**15
"""Of texts, tokens, characters or nano-dollars of one event: a million dollars. What is summed stays in 64 bits."""

YEAR_10000_MS: Final = 253_402_300_800_000

MAX_NAME_CHARS: Final = 1_024
"""Of what becomes part of a key: ours are no longer, and key and value of a total must fit into a record."""

UUID_TEXT: Final = 2 * 36
"""The length byte of a UUID in its usual spelling."""

SIX_NULLS: Final = bytes(6)

MAX_REMEMBERED, MAX_REMEMBERED_BYTES = 1_024, 512

Words = tuple[Any, ...]
Price = tuple[int | None, str | None]

_WORDS: Final[dict[bytes, Words]] = {}
_PRICES: Final[dict[bytes, Price]] = {}
_OPERATIONS: Final = Operation._value2member_map_
_TOKEN_SOURCES: Final = TokenSource._value2member_map_
_TOKEN_TYPES: Final = TokenType._value2member_map_
_new = object.__new__


def checked(usage: Usage) -> Usage:
    """ValueError for a time that is no date, or an amount that is none: other services write to the topic too."""
    billed, saved = usage.billed, usage.saved
    amounts = [usage.texts, usage.failed_texts, usage.cached_texts, billed.texts, billed.tokens, billed.characters]
    amounts += [billed.cost_nanos or 0, saved.texts, saved.tokens, saved.characters, saved.cost_nanos or 0]
    shares = [tokens for _, tokens in usage.parts]
    amounts += [*shares, sum(shares)]
    if min(amounts) < 0 or max(amounts) > MAX_AMOUNT:
        raise ValueError("no such amount")
    if not 0 <= usage.charged_at_ms < YEAR_10000_MS:
        raise ValueError("no such time")
    return usage


def check_names(usage: Usage) -> None:
    """ValueError for a name that is too long to be totalled by: the total would be a record that nobody can send."""
    request = usage.request
    names = (usage.payer_id, usage.model, usage.operation, request.agent_id, request.collection)
    if max(len(name or "") for name in (*names, request.tenant_id, request.task_id)) > MAX_NAME_CHARS:
        raise ValueError("no such name")


def read_usage(value: bytes, start: int) -> Usage | None:
    """The event that fills `value` from `start` on, written by the current schema; None: ask the general reader."""
    try:
        return _read(value, start)
    except (IndexError, ValueError):
        return None


def _read(value: bytes, at: int) -> Usage | None:
    usage: Any = _new(Usage)  # filled slot by slot, see RequestReader
    request: Any = _new(Request)
    usage.event_key = None
    if value[at] == UUID_TEXT and value[at : at + 37] == value[at + 37 : at + 74]:
        usage.request_id, at = value[at + 1 : at + 37].decode(), at + 74
    else:
        event_key, at = read_text(value, at)
        usage.request_id, at = read_text(value, at)
        if event_key != usage.request_id:
            usage.event_key = event_key
    usage.payer_id, at = read_text(value, at)
    request.tenant_id, at = read_text(value, at)
    request.correlation_id, at = read_text(value, at)
    request.action, at = read_text(value, at)
    request.collection, at = read_optional_text(value, at)
    request.document_id, at = read_optional_text(value, at)
    if value[at : at + 6] == SIX_NULLS:
        request.task_id = request.task_total = request.agent_id = None
        request.agent_owner_id = request.conversation_id = request.run_id = None
        at += 6
    else:
        request.task_id, at = read_optional_text(value, at)
        request.task_total, at = read_optional_long(value, at)
        request.agent_id, at = read_optional_text(value, at)
        request.agent_owner_id, at = read_optional_text(value, at)
        request.conversation_id, at = read_optional_text(value, at)
        request.run_id, at = read_optional_text(value, at)
    request.source_service, at = read_text(value, at)
    request.requested_at_ms, at = read_long(value, at)
    request.metadata, at = read_map(value, at)
    request.first_chunk_index, at = read_long(value, at)
    request.model = request.dimensions = request.input_type = request.truncate = None
    request.reply_to = request.deadline_ms = request.chunk_count = request.sender = None
    request.use_cache = True
    request.vector_spaces = request.chunks = request.chunk_ids = ()
    usage.request = request
    topic, at = read_text(value, at)
    partition, at = read_long(value, at)
    offset, at = read_long(value, at)
    usage.charged_at_ms, at = read_long(value, at)
    usage.source = Source(topic, partition, offset, usage.charged_at_ms)
    usage.completed_at_ms, at = read_long(value, at)
    usage.time_taken_ms, at = read_long(value, at)
    words, at = _words(value, at)
    usage.operation, usage.token_type, usage.provider, usage.model, usage.vector_space, usage.token_source = words
    usage.texts, at = read_long(value, at)
    usage.characters, at = read_long(value, at)
    at = _past_optional_double(value, at)  # the mean of the two
    usage.failed_texts, at = read_long(value, at)
    usage.cached_texts, at = read_long(value, at)
    usage.billed, at = _amounts(value, at)
    usage.saved, at = _amounts(value, at)
    usage.parts, at = _parts(value, at)
    usage.price_nanos_per_million, usage.price_version = _PRICES.get(value[at:]) or _price(value, at)
    if len(value) > MAX_NAME_CHARS:
        check_names(usage)
    return checked(cast(Usage, usage))


def _words(value: bytes, at: int) -> tuple[Words, int]:
    """operation, token_type, provider, model, vector_space, token_source: few are different, so they are remembered."""
    end = at
    for _ in range(6):
        length = value[end]
        if length > 127 or length & 1:
            return _new_words(value, at)
        end += 1 + (length >> 1)
    stretch = value[at:end]
    words = _WORDS.get(stretch)
    if words is None:
        words, _ = _new_words(value, at)
        _remember(_WORDS, stretch, words)
    return words, end


def _new_words(value: bytes, at: int) -> tuple[Words, int]:
    operation, at = read_text(value, at)
    token_type, at = read_text(value, at)
    provider, at = read_text(value, at)
    model, at = read_text(value, at)
    vector_space, at = read_text(value, at)
    token_source, at = read_text(value, at)
    words = (
        _OPERATIONS.get(operation, operation),
        _TOKEN_TYPES.get(token_type, token_type),
        provider,
        model,
        vector_space,
        _TOKEN_SOURCES.get(token_source, token_source),
    )
    return words, at


def _price(value: bytes, at: int) -> Price:
    """What the record ends with. ValueError unless it does end there."""
    nanos_per_million, end = read_optional_long(value, at)
    version, end = read_optional_text(value, end)
    if end != len(value):
        raise ValueError("cut, or trailing bytes")
    _remember(_PRICES, value[at:], (nanos_per_million, version))
    return nanos_per_million, version


def _remember(known: dict[bytes, Any], stretch: bytes, values: Any) -> None:
    if len(stretch) <= MAX_REMEMBERED_BYTES:
        if len(known) >= MAX_REMEMBERED:
            known.clear()
        known[stretch] = values


def _past_optional_double(value: bytes, at: int) -> int:
    branch = value[at]
    if branch not in (0, 2):
        raise ValueError("an unusual branch")
    return at + 9 if branch else at + 1


def _amounts(value: bytes, at: int) -> tuple[Amounts, int]:
    texts, at = read_long(value, at)
    tokens, at = read_long(value, at)
    characters, at = read_long(value, at)
    cost_nanos, at = read_optional_long(value, at)
    return Amounts(texts, tokens, characters, cost_nanos), at


def _parts(value: bytes, at: int) -> tuple[tuple[Part, ...], int]:
    if not value[at]:
        return (), at + 1
    count, at = read_long(value, at)
    if count < 1:
        raise ValueError("an unusual block")
    parts = []
    for _ in range(count):
        attempt_id, at = read_text(value, at)
        tokens, at = read_long(value, at)
        parts.append(Part(attempt_id, tokens))
    if value[at]:
        raise ValueError("another block")
    return tuple(parts), at + 1
