"""What the steps need from the outside, each port small and named for the need. Adapters implement them.

One contract suite per port (tests/contract) runs over every adapter and over the fakes that the unit tests use.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from processor.accounts import (
    Attempt,
    BucketKey,
    BudgetKey,
    BudgetState,
    Cursor,
    DocumentKey,
    DocumentVectors,
    Ledger,
    Seen,
    TaskKey,
    TaskProgress,
    UsageSums,
    UsageTotal,
)
from processor.domain import (
    CacheLevel,
    DeadLetter,
    DlqClass,
    DocumentManifest,
    EmbeddingFunction,
    Entry,
    ModelSpec,
    ProviderCall,
    Record,
    Request,
    Result,
    TokenSource,
    Tombstone,
    Usage,
    Vector,
)
from processor.errors import RateLimits

T = TypeVar("T")


class Clock(Protocol):
    """Time is passed in; no step reads it elsewhere."""

    def now_ms(self) -> int:
        """UTC milliseconds since 1970, for records."""
        ...

    def monotonic(self) -> float:
        """Seconds, for durations and leases."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class Undecodable(NamedTuple):
    """Why bytes are no request. `code` is a word of ours for the DLQ header."""

    reason: DlqClass
    code: str


class RequestDecoder(Protocol):
    """Step 1, first half. Never raises for bad bytes. Bytes are capped first and consumed to the end."""

    def decode_now(self, record: Record) -> Request | Undecodable | None:
        """The request, or why the record is for the DLQ; None when its schema must be fetched first, by `decode`."""
        ...

    async def decode(self, record: Record) -> Request | Undecodable:
        """The same, whatever it takes. RegistryUnavailable for an unknown schema id: it is asked again."""
        ...


class Lease(Protocol):
    """Owning one partition for one generation of the group. Replaced, never revived, on a rebalance."""

    topic: str
    partition: int
    generation: int

    @property
    def revoked(self) -> bool:
        """True for good once the partition was given up: drop its work, its records are delivered again."""
        ...

    def held(self) -> bool:
        """Whether this worker may send now: not revoked, and the session can't have run out since the last
        acknowledged heartbeat was sent. False without `revoked` may pass (a heartbeat is late): wait, don't drop.
        """
        ...

    def finish(self, offset: int) -> None:
        """Step 8: the record's outcomes are acknowledged by the broker. Does nothing on a revoked lease.

        The committed offset is the lowest unfinished one: contiguous over expected offsets, whatever the order of
        the calls.
        """
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """A fetched run of records of one partition, in offset order. `lethal`: its one record ends processes, bury it.

    `behind`: how many more records of the partition were in the log, as far as the broker has said.
    """

    lease: Lease
    records: Sequence[Record]
    lethal: bool = False
    behind: int = 0


class RunHandler(Protocol):
    """What an engine drives."""

    async def on_run(self, run: Run) -> None:
        """Take a run. Waiting here is backpressure: nothing more is fetched meanwhile, and the group is not left.

        Runs come one after the other. If the lease is revoked while this waits, the call is cancelled after
        `on_revoke`. An exception is a bug or broken infrastructure: the process ends.
        """
        ...

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        """Finish what is nearly done within the budget, then drop what is left. Returns when nothing more is sent."""
        ...

    def waiting(self) -> bool:
        """Whether work stands still for a paused dependency; an end of the process is no record's fault then."""
        ...

    async def positions(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Next offsets that override the committed ones (an aggregator's own store); empty: use the committed ones."""
        ...


Outgoing = (
    Result
    | Usage
    | ProviderCall
    | DocumentManifest
    | DeadLetter
    | Tombstone
    | UsageTotal
    | TaskProgress
    | BudgetState
    | BudgetKey
)
"""A budget's key alone takes its state back: a null value."""


class Destination(NamedTuple):
    """A message and the logical topic it goes to. Names: results, replies, sink, usage, calls, documents, dlq,
    totals, progress, late, budgets. Replies carry an explicit topic and partition."""

    name: str
    message: Outgoing
    topic: str | None = None
    partition: int | None = None


class Outbox(Protocol):
    """Sends messages to Kafka, encoded and keyed as `topics.yaml` says."""

    @property
    def sending(self) -> int:
        """How many calls wait for the broker now."""
        ...

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        """Returns when the broker has acknowledged every message; empty input does nothing.

        Order is kept per destination partition, within and across calls. Each lease is checked right before each
        batch is produced: LeaseLost if one is gone, and then nothing more of this call is sent; nothing at all if it
        was gone from the beginning. What a cancelled call has not handed over yet is not sent either. DeliveryFailed
        on a delivery that is not acknowledged within the deadline or refused; the process must end then.
        """
        ...

    async def post(self, message: Destination) -> Awaitable[None]:
        """Hand one message over and get the awaitable of its acknowledgement (for receipts: awaited in step 7)."""
        ...


SCOPE_TAG_BYTES = 8
"""A cache key begins with a tag of whose it is: by it a tenant's entries are found without naming the tenant."""
FUNCTION_TAG_BYTES = 4
"""Then comes one of the embedding function; the rest is a hash of all, text included."""


class Found(NamedTuple):
    """A cache hit and the level that had it (L1 or L2)."""

    entry: Entry
    level: CacheLevel


NO_FORMER: Mapping[bytes, bytes] = MappingProxyType({})


class VectorCache(Protocol):
    """Vectors already paid for. Losing one costs money, never correctness.

    Empty input makes no round trip. The first entry stands: storing again never changes who paid, until it
    expires. What the steps get (L1, or L1 before L2) never raises: an L2 out of reach is counted and gone
    without. An adapter of a shared store alone raises CacheUnavailable.
    """

    def peek(self, key: bytes, dimensions: int) -> Found | None:
        """What this process itself remembers, without waiting for anybody."""
        ...

    async def get_many(
        self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
    ) -> Mapping[bytes, Found]:
        """Known keys only; an entry that fails its check is counted, deleted and left out.

        `former`: by key, the one of the same text under the secret before. What is there alone is found too, and kept
        under its key from then on, with its leader and attempt.
        """
        ...

    async def put_many(self, entries: Mapping[bytes, Entry]) -> None: ...


class ProviderAnswer(NamedTuple):
    """An unverified response. `vectors[j]` belongs to input `indices[j]`; float32 of shape (n, d)."""

    vectors: Sequence[Vector]
    indices: Sequence[int]
    model: str
    billed_tokens: int | None
    limits: RateLimits | None = None


class EmbeddingProvider(Protocol):
    """Something that embeds texts for money or for heat. One call is one HTTP request: no retries inside."""

    name: str

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        """Embed 1..max_inputs_per_call texts (prefixes already applied). Raises ProviderError subclasses only."""
        ...

    async def list_models(self) -> Sequence[str]:
        """For health and doctor; never embeds."""
        ...

    async def close(self) -> None: ...


class QuotaAsk(NamedTuple):
    """What a worker would like of one limit, what it takes the lane's part of it to be, and when a header said so.

    `heard_s` is how many seconds ago that was; None: nobody said it, it is configured.
    """

    wanted: float
    per_minute: float | None
    heard_s: float | None


class QuotaGrant(NamedTuple):
    """What the worker may spend, up to what it wanted, and what is known of the limit, as in `QuotaAsk`."""

    granted: float
    per_minute: float | None
    heard_s: float | None


class SharedQuota(Protocol):
    """The requests and tokens a minute that all workers of a lane share on one account of a provider.

    What was granted is spent, whatever becomes of it. Over any time no more is granted than flows in, and half a
    second's worth. A quota that is new, or was lost, begins empty. An unknown limit grants nothing.
    """

    async def lease(
        self, account: str, requests: QuotaAsk, tokens: QuotaAsk, wait_s: float
    ) -> tuple[QuotaGrant, QuotaGrant]:
        """Take a slice, for calls to come. The newest header's word stands, whichever worker heard it.

        `wait_s`: the provider asked this worker to wait so long, so nobody gets anything meanwhile. QuotaUnavailable
        when it does not answer in time; what it may have granted then is lost.
        """
        ...


class TokenCounts(NamedTuple):
    counts: Sequence[int]
    source: TokenSource
    """TOKENIZER (exact for this model) or ESTIMATE (each at least 1)."""


class TokenCounter(Protocol):
    """Local token counts; special tokens count as ordinary text. May be CPU-bound: call it for misses only."""

    def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts: ...

    def truncate(self, text: str, model: ModelSpec, limit: int, *, keep_end: bool) -> str:
        """A head (or tail with keep_end) of at most `limit` tokens, cut between tokens; a text that fits as it is."""
        ...


class Budgets(Protocol):
    """What payers may spend, and have spent: a worker's view of `usage-budgets`, in memory."""

    def state(self, payer_id: str, charged_at_ms: int) -> BudgetState | None:
        """What is known of the payer's month in which a charge of that time counts; None: it has no budget.

        Of a payer that has spent nothing yet it may be the state of `accounts.EVERYBODY_ELSE`.
        """
        ...


class Catalogue(Protocol):
    """Which models there are and which this worker serves."""

    default_model: str

    def find(self, name: str) -> ModelSpec | None:
        """Any listed model."""
        ...

    def served(self, name: str) -> bool:
        """Whether this worker's route serves it."""
        ...

    def default_dimensions(self, model: ModelSpec) -> int:
        """Dimensions of requests that name none: the operator's choice, else the model's own."""
        ...


class RecordReader(Protocol):
    """Reads the values that this project writes. Never raises for bad bytes; may raise RegistryUnavailable."""

    async def read(self, kind: type[T], value: bytes | None) -> T | Undecodable: ...


class Span(NamedTuple):
    """The retained offsets of a partition: `begin` up to, not including, `end`."""

    begin: int
    end: int


class TopicReader(Protocol):
    """Reads topics outside of any group, named in full. BrokerUnavailable if the broker does not answer."""

    async def spans(self, topic: str) -> Mapping[int, Span]:
        """Of every partition."""
        ...

    async def records_at(self, topic: str, offsets: Mapping[int, int]) -> Mapping[int, Record]:
        """Per partition the record of this offset; those not, or no longer, in the log are left out."""
        ...

    async def committed(self, topic: str) -> Mapping[int, int]:
        """The offsets that the aggregator's group has committed, for the partitions that have one."""
        ...

    def read(self, topic: str, begin: Mapping[int, int] | None = None) -> AsyncGenerator[Sequence[Record], None]:
        """All records from the beginning to what is the end at the call, each partition in offset order.

        A partition named in `begin` is read from that offset on, unless it is not in the log.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChange:
    """What a folded run changes, with the cursor that says so: kept together or not at all."""

    topic: str
    partition: int
    cursor: Cursor
    seen: Mapping[str, Seen] = field(default_factory=dict)
    totals: Sequence[UsageTotal] = ()
    tasks: Mapping[TaskKey, TaskProgress] = field(default_factory=dict)
    tasks_published: bool = True
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    ledger: Ledger | None = None
    documents: Mapping[DocumentKey, DocumentVectors] = field(default_factory=dict)


class AggregateStore(Protocol):
    """The aggregator's state: nothing but a cache of topics, made again from them when it is lost.

    Reads give known keys only; empty input gives an empty answer. Ids are any text. StoreError when it can't be
    used, with what to do.
    """

    def claim(self) -> None:
        """Take the store over: another process that had claimed it can't save any more."""
        ...

    def bind(self, topic: str, partitions: int) -> int:
        """Remember how many partitions the topic has, the first time; the remembered count."""
        ...

    def cursor(self, topic: str, partition: int) -> Cursor | None: ...

    def forget(self, topic: str, partition: int) -> None:
        """Drop the cursor: the next fold of the partition begins with its log."""
        ...

    def seen(self, partition: int, request_ids: Collection[str]) -> dict[str, Seen]: ...

    def totals(self, keys: Collection[BucketKey]) -> dict[BucketKey, dict[int, tuple[int, UsageSums]]]:
        """Per bucket: usage partition -> (last_offset, sums)."""
        ...

    def payers(self, bucket: str) -> set[str]:
        """Who has a total in this day or month. Looks at every bucket: not for each run."""
        ...

    def tasks(self, keys: Collection[TaskKey]) -> dict[TaskKey, TaskProgress]: ...

    def unpublished_tasks(self) -> dict[TaskKey, TaskProgress]:
        """Those whose last save said that they are not published."""
        ...

    def attempts(self, attempt_ids: Collection[str]) -> dict[str, Attempt]: ...

    def open_attempts(self) -> list[Attempt]:
        """Those with an intent and no receipt."""
        ...

    def ledger(self) -> Ledger: ...

    def documents(self, keys: Collection[DocumentKey]) -> dict[DocumentKey, DocumentVectors]: ...

    def stale_documents(self, partition: int) -> dict[DocumentKey, DocumentVectors]:
        """Those whose last save was for this partition and left stale vectors."""
        ...

    def save(self, change: StoreChange) -> None:
        """All of the change in one transaction. StoreTaken if another process has claimed the store."""
        ...

    def merge_totals(self, totals: Sequence[UsageTotal]) -> None:
        """Take published totals: per bucket and usage partition the higher last_offset stands."""
        ...

    def forget_totals(self, keys: Collection[BucketKey]) -> None:
        """Drop these buckets."""
        ...

    def counted(self, begins: Mapping[int, int]) -> dict[tuple[int, int], set[BucketKey]]:
        """(usage partition, last_offset) -> the buckets that it was last counted in: of each partition of the totals
        the greatest last_offset, and the least that is not below the partition's begin."""
        ...

    def prune(
        self,
        *,
        seen_before_ms: Mapping[int, int],
        before_ms: int,
        part: int,
        parts: int,
        close: Callable[[Ledger, Collection[Attempt]], Ledger],
    ) -> int:
        """Drop what was last touched earlier: `seen` keys by usage partition, and attempts and tasks.

        Looks at the `part`-th of `parts` (1 to 256) slices of the keys, so that no call takes long. `close` gives
        the ledger once the dropped attempts are no longer kept. How many keys were dropped.
        """
        ...

    def close(self) -> None: ...


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Events:
    """Observers that the composition root hangs on the steps (metrics, logs): plain numbers and words, no content.

    None may raise. By default nothing is observed.
    """

    count: Callable[[str, float, Mapping[str, str]], None] = _ignore
    observe: Callable[[str, float, Mapping[str, str]], None] = _ignore
    call: Callable[[Mapping[str, object]], None] = _ignore
