"""What the steps pass along: a job is an accepted request, a work one of its chunks, a fold the works of equal texts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from processor.domain import (
    Action,
    CacheLevel,
    EmbeddingFunction,
    Entry,
    Fault,
    Item,
    Lane,
    Operation,
    Request,
    Source,
    Truncate,
)
from processor.ports import Lease


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
    max_concurrent_calls: int = 4
    retry_initial_s: float = 0.5
    retry_max_s: float = 30.0
    poison_attempts: int = 5
    confirm_after_s: float = 120.0
    cache_secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a valid request asks for, resolved against the catalogue. `function` is None for what embeds nothing."""

    action: Action
    operation: Operation | None
    function: EmbeddingFunction | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one chunk ended: an entry (billed or saved) or a fault."""

    level: CacheLevel = CacheLevel.MISS
    entry: Entry | None = None
    billed: bool = False
    fault: Fault | None = None


@dataclass(slots=True, eq=False)
class Job:
    """An accepted request in work. `unsent` and `unacked` count its works; at 0 unacked its offset is finished."""

    request: Request
    request_id: str
    source: Source
    lease: Lease
    plan: Plan | None
    size_bytes: int
    started: float
    works: list[Work] = field(default_factory=list, repr=False)
    unsent: int = 0
    unacked: int = 0
    dropped: bool = False

    @property
    def live(self) -> bool:
        """Whether this worker may still produce for it."""
        return not self.dropped and self.lease.held()

    @property
    def document_key(self) -> tuple[str, str | None, str] | None:
        request = self.request
        if request.document_id is None:
            return None
        return (request.tenant_id, request.collection, request.document_id)


@dataclass(slots=True, eq=False)
class Work:
    """One chunk in work. `position` counts within the request, `item.index` within the whole document."""

    job: Job
    position: int
    item: Item
    outcome: Outcome | None = None

    @property
    def text(self) -> str:
        return self.job.request.chunks[self.position].text

    @property
    def chunk_id(self) -> str:
        return self.job.request.chunks[self.position].chunk_id

    @property
    def order(self) -> tuple[str, int, int, int]:
        """The first by (topic, partition, offset, index) leads a fold (U2)."""
        source = self.job.source
        return (source.topic, source.partition, source.offset, self.item.index)


@dataclass(slots=True, eq=False)
class Fold:
    """Works of one cache key: embedded once. Works may join until it is settled; the leader is fixed by the intent."""

    key: bytes = field(repr=False)
    function: EmbeddingFunction
    works: list[Work]
    waiting_since: float
    size_tokens: int
    level: CacheLevel = CacheLevel.MISS
    entry: Entry | None = None
    fault: Fault | None = None

    @property
    def text(self) -> str:
        return self.works[0].text

    def live_works(self) -> list[Work]:
        return [work for work in self.works if work.outcome is None and work.job.live]

    def leader(self) -> Work | None:
        """The first live work, or None when every request that wanted this text is gone."""
        return min(self.live_works(), key=lambda work: work.order, default=None)


@dataclass(slots=True, eq=False)
class Window:
    """Folds of one embedding function that go through steps 3 to 8 together.

    `receipts` are the acknowledgements of the ledger's receipts, awaited before anything is acknowledged.
    """

    function: EmbeddingFunction
    folds: list[Fold]
    receipts: list[Awaitable[None]] = field(default_factory=list)


Fail = Callable[[BaseException], None]
"""Ends the process: broken infrastructure or a bug."""


def distinct_leases(works: Sequence[Work]) -> list[Lease]:
    return list({id(work.job.lease): work.job.lease for work in works}.values())
