"""What a record becomes while it is worked on. Nothing here does I/O.

    Ticket  one source record, whatever it holds; Job: one that is a request
    Work    one chunk of a job                    Fold: works of one cache key, embedded once
    Window  folds that are looked up together     Call: misses that go to the provider together
    Parcel  one outcome on its way out: a Work, or one that was Known without

A worker makes one or more of each for every record, so none of them is frozen: that costs four times the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from processor.domain import (
    Action,
    CacheLevel,
    Chunk,
    EmbeddingFunction,
    Entry,
    Fault,
    Item,
    Lane,
    Operation,
    Price,
    Request,
    Result,
    Source,
    TokenSource,
    Truncate,
)
from processor.ports import Clock, Destination, Lease

FLOAT_BYTES = 4

DocumentKey = tuple[str, str | None, str]
"""Tenant, collection, document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The knobs of the steps, as numbers with units. `reply_partitions`: allowed reply topics and their sizes."""

    lane: Lane = Lane.BULK
    worker_id: str = "worker"
    sink_view: bool = True
    reply_partitions: Mapping[str, int] = field(default_factory=dict)
    truncate: Truncate = Truncate.ERROR
    max_request_bytes: int = 900_000
    max_chunks: int = 2048
    max_metadata_bytes: int = 8192
    window_max_texts: int = 512
    window_max_tokens: int = 200_000
    window_max_wait_s: float = 0.05
    tenant_weights: Mapping[str, int] = field(default_factory=dict)
    retry_initial_s: float = 0.5
    retry_max_s: float = 30.0
    poison_attempts: int = 5
    confirm_after_s: float = 120.0
    cache_secret: bytes = field(default=b"", repr=False)
    cache_secret_former: bytes | None = field(default=None, repr=False)
    cache_shared: bool = False


@dataclass(slots=True, eq=False)
class Plan:
    """What a valid request asks for, resolved against the catalogue. `function` is None for what embeds nothing."""

    action: Action
    operation: Operation | None
    function: EmbeddingFunction | None
    vector_bytes: int = 0

    def __post_init__(self) -> None:
        if self.function is not None:
            self.vector_bytes = FLOAT_BYTES * self.function.dimensions


@dataclass(slots=True, eq=False)
class Outcome:
    """How a chunk ended: an entry (billed or saved) or a fault."""

    level: CacheLevel = CacheLevel.MISS
    entry: Entry | None = None
    billed: bool = False
    fault: Fault | None = None


class Instant(NamedTuple):
    """One look at the clock, for all that is written together: UTC milliseconds, and seconds for durations."""

    ms: int
    monotonic_s: float

    @classmethod
    def of(cls, clock: Clock) -> Instant:
        return cls(clock.now_ms(), clock.monotonic())


@dataclass(slots=True, eq=False)
class Ticket:
    """The accounting of one source record. At 0 `unsent` its usage goes out, at 0 `unacked` its offset is finished.

    `size_bytes` is what it takes of the read-ahead: its value, and what that becomes while it is worked on.
    """

    lease: Lease
    source: Source
    size_bytes: int
    started: float
    unsent: int = 1
    unacked: int = 1
    dropped: bool = False

    @property
    def live(self) -> bool:
        """Whether its outcome is still this worker's to give."""
        return not (self.dropped or self.lease.revoked)

    def taken_ms(self, now: Instant) -> int:
        return int((now.monotonic_s - self.started) * 1000)

    def close(self) -> None:
        """All is done. What it refers to lets go of it: a circle would stay in memory until it is looked for."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Ticket):
    """An accepted request in work. `plan` is None when the request was refused as a whole.

    `price` is that of its model when the record was appended, None when there was none. `placed` of its works are
    queued, or have their outcome. Deadline and budget decide once, so that nobody has half a request and pays for that:
    it has `begun` once a text of it is in a call, or was paid for before; or `refused` says why none is paid for.
    """

    request: Request
    request_id: str
    plan: Plan | None = None
    price: Price | None = None
    works: list[Work] = field(default_factory=list, repr=False)
    placed: int = 0
    begun: bool = False
    refused: Fault | None = None

    def close(self) -> None:
        for work in self.works:
            work.fold = None
        self.works = []

    @property
    def unplaced(self) -> bool:
        """Whether some of its works are not queued yet; one that is over has none any more."""
        return self.placed < len(self.works)

    @property
    def in_flight(self) -> bool:
        """Whether all that it still waits for is under way already."""
        return all(work.outcome or (work.fold and work.fold.in_flight) for work in self.works)

    @property
    def document_key(self) -> DocumentKey | None:
        request = self.request
        if request.document_id is None:
            return None
        return (request.tenant_id, request.collection, request.document_id)


@dataclass(slots=True, eq=False)
class Parcel:
    """One outcome on its way out.

    With a `document` it waits for the earlier offsets of its chunk, or without a chunk id of the whole document:
    `after` is the parcel of the same chunk before it. `left`: the broker has acknowledged it.
    """

    ticket: Ticket
    document: OpenDocument | None = field(default=None, repr=False)
    chunk_id: str | None = None
    after: Parcel | None = field(default=None, repr=False)
    left: bool = False


@dataclass(slots=True, eq=False)
class OpenDocument:
    """A document with outcomes outstanding: how many each offset owes, in that order, and each chunk's last parcel."""

    key: tuple[Lease, DocumentKey]
    owed: dict[int, int] = field(default_factory=dict)
    last: dict[str, Parcel] = field(default_factory=dict, repr=False)


@dataclass(slots=True, eq=False, kw_only=True)
class Known(Parcel):
    """An outcome that needs no embedding, and what is sent `before` it (acknowledged first)."""

    outcome: Callable[[Instant], Result | Destination] = field(repr=False)
    before: Sequence[Destination] = field(default=(), repr=False)


@dataclass(slots=True, eq=False, kw_only=True)
class Work(Parcel):
    """One chunk in work. `item.index` counts within the whole document."""

    chunk: Chunk = field(repr=False)
    item: Item
    fold: Fold | None = None
    outcome: Outcome | None = None

    @property
    def job(self) -> Job:
        return self.ticket  # type: ignore[return-value]  # a work is never made of anything else

    @property
    def order(self) -> tuple[str, int, int, int]:
        """The first by (topic, partition, offset, index) leads a fold (U2)."""
        source = self.ticket.source
        return (source.topic, source.partition, source.offset, self.item.index)

    def answer(self, entry: Entry, level: CacheLevel, follower: CacheLevel) -> None:
        """Its outcome is the entry, at `level` for who is billed for it, else as a `follower` (U3).

        Who has paid for one text, perhaps before a crash, gets the others too, whatever deadline and budget say by now.
        """
        billed = entry.bills(self.item)
        self.outcome = Outcome(level if billed else follower, entry, billed)
        if billed:
            self.job.begun = True


@dataclass(slots=True, eq=False)
class Fold:
    """Works of one cache key: embedded once. Works may join until it is settled; the leader is fixed by the intent.

    For a miss: `sent` is the text that goes out (prefix applied, cut if need be), `tokens` its local count, `estimated`
    what the provider's own estimator makes of it, `sent_bytes` its UTF-8 bytes, `cut_tokens` how many were cut off.
    `in_call` from when a call is made of it until that is over for good; `payer` is the request that leads it there.
    """

    key: bytes = field(repr=False)
    function: EmbeddingFunction
    works: list[Work]
    waiting_since: float
    size_tokens: int
    in_window: bool = False
    level: CacheLevel = CacheLevel.MISS
    entry: Entry | None = None
    fault: Fault | None = None
    sent: str = field(default="", repr=False)
    tokens: int = 0
    token_source: TokenSource = TokenSource.ESTIMATE
    estimated: int = 0
    sent_bytes: int = 0
    cut_tokens: int = 0
    in_call: bool = False
    payer: str = ""

    @property
    def text(self) -> str:
        return self.works[0].chunk.text

    @property
    def tenant_id(self) -> str:
        """Of its first work. With a shared cache scope it can have works of other tenants."""
        return self.works[0].job.request.tenant_id

    @property
    def in_flight(self) -> bool:
        """Looked up right now, or in a call: it does not wait for one."""
        return self.in_call or (self.in_window and not self.tokens)

    @property
    def wanted(self) -> bool:
        """Whether any request still waits for this text."""
        return any(work.outcome is None and work.ticket.live for work in self.works)

    def live_works(self) -> list[Work]:
        return [work for work in self.works if work.outcome is None and work.ticket.live]

    def leader(self) -> Work | None:
        """The first live work, or None when every request that wanted this text is gone."""
        return min(self.live_works(), key=lambda work: work.order, default=None)

    def begin(self) -> Work | None:
        """It goes out for its leader: that request and each copy of it have begun, no other that shares the text."""
        leader = self.leader()
        if leader is not None:
            self.payer = leader.item.request_id
            for work in self.works:
                if work.item.request_id == self.payer:
                    work.job.begun = True
        return leader


@dataclass(slots=True, eq=False)
class Window:
    """Folds of one embedding function that are looked up together."""

    function: EmbeddingFunction
    folds: list[Fold]


@dataclass(slots=True, eq=False)
class Call:
    """Folds that go to the provider together, in the order of their texts.

    A call that failed and is tried again whole keeps its `failures` (transient ones, since the route had
    `successes_seen`) and waits until `not_before` on the monotonic clock. `searching` says that a text is searched for
    which is refused, or fails again and again; `rest` is the other half then: it comes next if this one turns out well.
    `spared` are texts that the search has left behind: they join other calls once it ends.
    """

    function: EmbeddingFunction
    folds: list[Fold] = field(repr=False)
    attempts: int = 0
    failures: int = 0
    successes_seen: int = 0
    not_before: float = float("-inf")
    searching: Literal["", "refusal", "failures"] = ""
    rest: list[Fold] = field(default_factory=list, repr=False)
    spared: list[Fold] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> int:
        """By local count: what limits and bills are measured in."""
        return sum(fold.tokens for fold in self.folds)


Fail = Callable[[BaseException], None]
"""Ends the process: broken infrastructure or a bug."""
