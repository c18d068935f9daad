"""The nouns of the processor: requests, items, outcomes, usage, provider calls, and the words of their open sets.

Nothing here does I/O or reads a clock, and nothing is changed once it was handed on. Anything that holds a customer's
text or a vector leaves it out of its `repr`, so a stray log line can't leak it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

# What every record makes anew is not frozen: making a frozen instance takes three times as long (measured).


class Word(StrEnum):
    """A word of an open set: on the wire a string. It hashes as one, in C: enums do it in Python."""

    __hash__ = str.__hash__


class Action(Word):
    """What a request asks for. On the wire a string; unknown words are `invalid_request`."""

    GENERATE = "generate"
    BATCH_PROCESS = "batch_process"
    GENERATE_QUERY = "generate_query"
    VALIDATE = "validate"
    DELETE = "delete"
    DOCUMENT_MANIFEST = "document_manifest"


ACTION_ALIASES: Mapping[str, Action] = {
    **{action.value: action for action in Action},
    "embedding.generate": Action.GENERATE,
    "embedding.generate_query": Action.GENERATE_QUERY,
    "embedding.validate": Action.VALIDATE,
    "embedding.batch_process": Action.BATCH_PROCESS,
    "embedding.batch.process": Action.BATCH_PROCESS,
}

EMBEDDING_ACTIONS = frozenset({Action.GENERATE, Action.BATCH_PROCESS, Action.GENERATE_QUERY})
INTERACTIVE_ACTIONS = frozenset({Action.GENERATE, Action.GENERATE_QUERY, Action.VALIDATE})


class Operation(Word):
    """What the tokens were spent on, as usage events name it."""

    DOCUMENT = "document"
    BATCH = "batch"
    QUERY = "query"
    INTERNAL = "internal"


OPERATION_OF: Mapping[Action, Operation] = {
    Action.GENERATE: Operation.DOCUMENT,
    Action.BATCH_PROCESS: Operation.BATCH,
    Action.GENERATE_QUERY: Operation.QUERY,
}


class Status(Word):
    OK = "ok"
    ERROR = "error"
    VALID = "valid"
    INVALID = "invalid"


class CacheLevel(Word):
    """Where a vector came from. `coalesced`: another item of the same fold was embedded for it."""

    MISS = "miss"
    L1 = "l1"
    L2 = "l2"
    COALESCED = "coalesced"


class InputType(Word):
    DOCUMENT = "document"
    QUERY = "query"


class Truncate(Word):
    """What to do with a text over the model's token limit."""

    ERROR = "error"
    END = "truncate_end"
    START = "truncate_start"


class CallEstimator(Word):
    """How a provider counts the tokens of a call before it takes it: with its tokenizer, or UTF-8 bytes x 0.25."""

    TOKENS = "tokens"
    BYTES_4 = "bytes/4"


class Lane(Word):
    BULK = "bulk"
    INTERACTIVE = "interactive"


class TokenSource(Word):
    """Who counted: the provider's bill, an exact local tokenizer, or an estimate."""

    PROVIDER = "provider"
    TOKENIZER = "tokenizer"
    ESTIMATE = "estimate"


class ErrorCode(Word):
    """Why a chunk or a request has no vector. Results, headers, metrics and docs use the same words."""

    INVALID_REQUEST = "invalid_request"
    EMPTY_TEXT = "empty_text"
    TEXT_TOO_LONG = "text_too_long"
    UNKNOWN_MODEL = "unknown_model"
    MODEL_NOT_SERVED = "model_not_served"
    BAD_DIMENSIONS = "bad_dimensions"
    REPLY_NOT_ALLOWED = "reply_not_allowed"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    BUDGET_EXCEEDED = "budget_exceeded"
    WRONG_LANE = "wrong_lane"
    DOCUMENT_TOO_LARGE = "document_too_large"
    SINK_VIEW_OFF = "sink_view_off"
    PROVIDER_REJECTS = "provider_rejects"
    PROVIDER_MODEL_ERROR = "provider_model_error"


CHUNK_ERRORS = frozenset(
    {
        ErrorCode.EMPTY_TEXT,
        ErrorCode.TEXT_TOO_LONG,
        ErrorCode.DEADLINE_EXCEEDED,
        ErrorCode.BUDGET_EXCEEDED,
        ErrorCode.PROVIDER_REJECTS,
        ErrorCode.PROVIDER_MODEL_ERROR,
    }
)
"""Codes that fail one chunk; every other code fails its whole request with chunk_index -1."""


class DlqClass(Word):
    UNDECODABLE = "undecodable"
    UNKNOWN_SCHEMA = "unknown_schema"
    TOO_LARGE = "too_large"
    NO_IDENTITY = "no_identity"
    LETHAL = "lethal"


WHOLE_REQUEST = -1
"""The chunk_index of an error that stands for all chunks of its request."""


class TokenType(Word):
    """What kind of tokens a usage event counts: ours are `embedding`, others' who share the topic input or output."""

    EMBEDDING = "embedding"
    INPUT = "input"
    OUTPUT = "output"


class Source(NamedTuple):
    """Where a record stands in the log. Tuples compare by (topic, partition, offset)."""

    topic: str
    partition: int
    offset: int
    append_ms: int

    @property
    def version(self) -> str:
        """`source_version`: append_ms(13)-partition(5)-offset(19), zero-padded, compares as text."""
        return f"{self.append_ms:013d}-{self.partition:05d}-{self.offset:019d}"


class Record(NamedTuple):
    """One fetched Kafka record. `value` may be a customer's text: never print a Record."""

    source: Source
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()

    def __repr__(self) -> str:
        return f"Record({self.source!r}, value={len(self.value or b'')} bytes)"


@dataclass(slots=True)
class Chunk:
    chunk_id: str
    text: str = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class ReplyTo:
    topic: str
    partition: int
    reply_type: str | None = None


@dataclass(slots=True, kw_only=True)
class Request:
    """An `EmbeddingRequest` as sent; `action` keeps the sender's spelling (see `ACTION_ALIASES`).

    `chunk_count` is that of the whole document when the client split it, else None (= the length of this request).
    `sender` is the same object in requests that agree in every field but correlation and document id, times, split and
    chunks: a cheap key for what is remembered of them. None: nobody compared them; `replace` gives None.
    """

    tenant_id: str
    correlation_id: str
    action: str
    model: str | None = None
    dimensions: int | None = None
    input_type: str | None = None
    use_cache: bool = True
    truncate: str | None = None
    collection: str | None = None
    document_id: str | None = None
    task_id: str | None = None
    task_total: int | None = None
    agent_id: str | None = None
    agent_owner_id: str | None = None
    conversation_id: str | None = None
    reply_to: ReplyTo | None = None
    deadline_ms: int | None = None
    source_service: str = ""
    requested_at_ms: int = 0
    run_id: str | None = None
    vector_spaces: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    first_chunk_index: int = 0
    chunk_count: int | None = None
    chunks: Sequence[Chunk] = field(default=(), repr=False)
    chunk_ids: Sequence[str] = field(default=(), repr=False)
    sender: object | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def payer_id(self) -> str:
        """Who pays: the owner of a shared agent, else the tenant. A function of the request alone."""
        return self.agent_owner_id or self.tenant_id

    @property
    def length(self) -> int:
        """How many chunks (or ids of a delete) this request holds."""
        return len(self.chunks) or len(self.chunk_ids)

    @property
    def whole_count(self) -> int:
        return self.chunk_count if self.chunk_count is not None else self.length


class Item(NamedTuple):
    """The identity of one chunk in intents, cache entries and results. `index` counts from the whole's first chunk."""

    request_id: str
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here


@dataclass(frozen=True, slots=True)
class VectorSpace:
    """Vectors of one space may be compared with one another; those of two spaces never."""

    weights: str
    revision: str
    dimensions: int
    normalised: bool

    def __str__(self) -> str:
        return f"{self.weights}@{self.revision}/{self.dimensions}/{'l2' if self.normalised else 'raw'}"


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars per 1,000,000 tokens from `effective_ms` on; `version` names the price list it came from."""

    nanos_per_million: int
    effective_ms: int
    version: str


MAX_MANIFEST_VECTORS = 200_000
"""Chunk ids times vector spaces of a manifest: the aggregator derives an id for each, in two seconds and 60 MB."""

MAX_PRICE = 10**12
"""A thousand dollars per 1,000,000 tokens, in nano-dollars: what a call or a request costs stays far within 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model of the catalogue.

    `dimensions` are the allowed ones, the default first; with `shortenable` any from 1 to the default.
    `answers_as` are the model names a response may carry; None: the server echoes any name. `tokenizer` names an
    exact counter ("cl100k_base", "wordpiece:<path>"), None: an estimate. `call_estimator` is what the provider itself
    holds against `max_tokens_per_call`; `max_bytes_per_call` bounds the UTF-8 bytes of all texts of one call.
    `shortened_here`: the provider gives vectors of the default size, and they are cut and renormalised on our side.
    """

    name: str
    weights: str
    revision: str = "1"
    dimensions: tuple[int, ...]
    shortenable: bool = False
    shortened_here: bool = False
    normalised: bool = True
    max_input_tokens: int = 8192
    max_inputs_per_call: int = 2048
    max_tokens_per_call: int = 300_000
    max_bytes_per_call: int = 8_000_000
    call_estimator: CallEstimator = CallEstimator.TOKENS
    tokenizer: str | None = None
    prefixes: Mapping[InputType, str] = field(default_factory=dict)
    answers_as: frozenset[str] | None = None
    prices: tuple[Price, ...] = ()

    def allows(self, dimensions: int) -> bool:
        return dimensions in self.dimensions or (self.shortenable and 1 <= dimensions <= self.dimensions[0])

    def describe_dimensions(self) -> str:
        """The allowed dimensions in words, for an error message."""
        if self.shortenable:
            return f"1 to {self.dimensions[0]} dimensions"
        return f"{', '.join(map(str, self.dimensions))} dimensions"

    def space(self, dimensions: int) -> VectorSpace:
        return VectorSpace(self.weights, self.revision, dimensions, self.normalised)

    def price_at(self, at_ms: int) -> Price | None:
        """The price in force at that time; None when unpriced (never 0)."""
        found = None
        for price in self.prices:
            if price.effective_ms <= at_ms and (found is None or price.effective_ms > found.effective_ms):
                found = price
        return found


@dataclass(frozen=True, slots=True)
class EmbeddingFunction:
    """What turns a text into a vector: equal functions and texts give equal vectors. Part of cache and queue keys.

    `name` is all of it but the model's limits and prices, `space_name` that of its vector space.
    """

    model: ModelSpec = field(compare=False)
    space: VectorSpace = field(compare=False)
    input_type: InputType = field(compare=False)
    prefix: str = field(compare=False)
    truncate: Truncate = field(compare=False)
    space_name: str = field(init=False, compare=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "space_name", str(self.space))
        object.__setattr__(self, "name", f"{self.space}|{self.input_type}|{self.prefix}|{self.truncate}")

    @property
    def dimensions(self) -> int:
        return self.space.dimensions

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Entry:
    """A vector that somebody paid for: the leader item's share of the bill of one attempt (U3)."""

    vector: Vector = field(repr=False)
    tokens: int
    leader: Item
    attempt_id: str
    token_source: TokenSource
    cut_tokens: int = 0

    def bills(self, item: Item) -> bool:
        """U3: the item that finds its own entry is billed its tokens, any other one is saved them."""
        return item == self.leader


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a chunk or request has no vector. `message` names the field and the fix, never the text."""

    code: ErrorCode
    field: str
    message: str
    retryable: bool = False


@dataclass(slots=True, kw_only=True)
class Result:
    """One `EmbeddingResult`: one chunk's outcome, or with chunk_index -1 the whole request's.

    `vector` is float32 of shape (dimensions,) or None. `length` is 1 for a chunk, the number of chunks for -1.
    `cost_nanos` is informative and None when unpriced. `request` carries what is echoed.
    """

    request: Request
    source: Source
    request_id: str
    chunk_index: int
    first_chunk_index: int
    length: int
    chunk_id: str
    chunk_metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    status: Status
    vector: Vector | None = field(default=None, repr=False)
    vector_id: str | None = None
    provider: str = ""
    model: str = ""
    vector_space: str = ""
    dimensions: int = 0
    token_count: int = 0
    token_source: TokenSource = TokenSource.ESTIMATE
    cache: CacheLevel = CacheLevel.MISS
    cut_tokens: int = 0
    cost_nanos: int | None = None
    time_taken_ms: int = 0
    completed_at_ms: int = 0
    error: Fault | None = None


@dataclass(slots=True, kw_only=True)
class ReceivedResult:
    """An `EmbeddingResult` as a consumer reads it. Words of open sets stay plain text, so that newer ones pass.

    `vector` is float32 of shape (dimensions,), or None when there is none. With chunk_index -1 it stands for the
    chunks first_chunk_index .. first_chunk_index + length - 1.
    """

    request_id: str
    tenant_id: str
    correlation_id: str
    action: str
    collection: str | None
    document_id: str | None
    task_id: str | None
    task_total: int | None
    agent_id: str | None
    agent_owner_id: str | None
    conversation_id: str | None
    run_id: str | None
    source_service: str
    requested_at_ms: int
    metadata: Mapping[str, str] = field(repr=False)
    input_type: str | None
    operation: str | None
    reply_type: str | None
    source_version: str
    accepted_at_ms: int
    chunk_count: int
    first_chunk_index: int
    chunk_index: int
    length: int
    chunk_id: str
    chunk_metadata: Mapping[str, str] = field(repr=False)
    status: str
    error: Fault | None
    vector_id: str | None
    provider: str
    model: str
    vector_space: str
    dimensions: int
    token_count: int
    token_source: str
    cache: str
    truncated: bool
    cut_tokens: int
    cost_nanos: int | None
    time_taken_ms: int
    completed_at_ms: int
    vector: Vector | None = field(repr=False)

    def stands_for(self, index: int) -> bool:
        """Whether this is an outcome of the chunk with that index (Law 1)."""
        if self.chunk_index == WHOLE_REQUEST:
            return self.first_chunk_index <= index < self.first_chunk_index + self.length
        return self.chunk_index == index


@dataclass(slots=True)
class Amounts:
    """Texts, tokens, characters and their price. `cost_nanos` None: unpriced."""

    texts: int = 0
    tokens: int = 0
    characters: int = 0
    cost_nanos: int | None = None


class Part(NamedTuple):
    """How many billed tokens of a usage event come from one attempt."""

    attempt_id: str
    tokens: int


@dataclass(slots=True, kw_only=True)
class Usage:
    """One `TokenUsage` event: the charge of one request (U4). Its idempotency key is the request id.

    Invariant: sum of `parts` tokens == `billed.tokens`. `charged_at_ms` is the append time of the source record.
    `event_key` is a key that is not the request id: that of a refusal, which bills nothing and has failed texts, or of
    another service's event, as of a request's input and output.
    """

    request: Request
    source: Source
    request_id: str
    payer_id: str
    operation: Operation
    model: str
    provider: str
    vector_space: str
    billed: Amounts
    saved: Amounts
    texts: int
    characters: int
    failed_texts: int
    cached_texts: int
    parts: Sequence[Part]
    token_source: TokenSource
    token_type: TokenType = TokenType.EMBEDDING
    price_nanos_per_million: int | None
    price_version: str | None
    charged_at_ms: int
    completed_at_ms: int
    time_taken_ms: int
    event_key: str | None = None

    @property
    def idempotency_key(self) -> str:
        return self.request_id if self.event_key is None else self.event_key

    @property
    def is_refusal(self) -> bool:
        """Not the charge of its request: that one may come, if it is sent again."""
        return self.event_key is not None and self.token_type == TokenType.EMBEDDING and not self.billed.texts


class CallItem(NamedTuple):
    """A leader item of a provider call, with who pays and the local token count its share is split by."""

    request_id: str
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    payer_id: str
    local_tokens: int


class CallKind(Word):
    INTENT = "intent"
    RECEIPT = "receipt"


class CallOutcome(Word):
    """Of a receipt. `invalid`: a paid response that failed verification; `failed`: an answered HTTP error, billed 0."""

    OK = "ok"
    INVALID = "invalid"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderCall:
    """A ledger record of one attempt (= one HTTP request): the intent before it, or the receipt after it (U1)."""

    kind: CallKind
    attempt_id: str
    at_ms: int
    worker_id: str
    provider: str
    model: str
    vector_space: str
    items: Sequence[CallItem] = ()
    estimated_tokens: int = 0
    confirm_by_ms: int | None = None
    outcome: CallOutcome | None = None
    billed_tokens: int | None = None
    http_status: int | None = None
    time_taken_ms: int = 0
    price_nanos_per_million: int | None = None
    price_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentManifest:
    """The whole list of a document's chunk ids in the spaces meant; empty deletes the document."""

    tenant_id: str
    collection: str | None
    document_id: str
    chunk_ids: Sequence[str] = field(repr=False)
    vector_spaces: Sequence[str]
    source_version: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record for the DLQ: the original key and bytes, untouched. `by_reference`: too large or lethal, value null."""

    record: Record
    reason: DlqClass
    code: str
    at_ms: int
    by_reference: bool = False


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Deletes one vector id from the sink view."""

    vector_id: str
    source_version: str
