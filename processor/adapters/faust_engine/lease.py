"""Owning a partition: the session that the broker grants a member, and the lease that hangs on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import structlog
from aiokafka import TopicPartition

from processor.domain import Record, Source
from processor.errors import StoreError
from processor.ports import Run, RunHandler
from processor.settings import Settings
from processor.suspicion import MOVED, Suspicion
from processor.watermark import Watermark

NO_GENERATION = -1
ISOLATED_RECORDS = 100
"""So many records run alone after three unclean ends: the one that ended them may not be the first."""

NO_SUSPICION = Suspicion()
NOT_NOTED = "?"
"""What the committed metadata is, as far as this lease knows: nothing, so that it is written at least once."""

log = structlog.stdlib.get_logger(__name__)


class Session:
    """How long the broker surely counts this process as a member, by our own clock.

    Written by the consumer's thread, read by the main one: each field is one assignment. The session runs from the
    moment a heartbeat (or the join) that the broker acknowledged was *sent*: a process that was frozen in between
    finds it over, whatever lies in its sockets.
    """

    def __init__(self, *, timeout_s: float, margin_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._lasts_s = timeout_s - margin_s
        self._monotonic = monotonic
        self._revoke_by = inf
        self._acknowledged_at = -inf
        self.generation: Callable[[], int] = lambda: NO_GENERATION

    def acknowledged(self, sent_at: float) -> None:
        """The broker answered a heartbeat or join that was sent at this monotonic time."""
        self._acknowledged_at = sent_at

    def revoking(self, within_s: float) -> None:
        """A rebalance began. The broker waits for us, but not for ever: leases end by then, whatever hangs."""
        self._revoke_by = self._monotonic() + within_s

    def joined(self) -> None:
        """The rebalance is over."""
        self._revoke_by = inf

    def lasts(self, generation: int) -> bool:
        """Whether this process surely is a member of that generation now."""
        now = self._monotonic()
        return now < self._acknowledged_at + self._lasts_s and now < self._revoke_by and self.generation() == generation

    @property
    def heartbeat_age_s(self) -> float | None:
        """Seconds since the last acknowledged heartbeat was sent; None before the first."""
        age = self._monotonic() - self._acknowledged_at
        return None if age == inf else age


class PartitionLease:
    """`ports.Lease`: one partition for one generation. Used from the main loop alone."""

    def __init__(
        self,
        topic: str,
        partition: int,
        generation: int,
        session: Session,
        start: int,
        committed: int,
        suspicion: Suspicion = NO_SUSPICION,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.generation = generation
        self.watermark = Watermark(start)
        self.committed = committed
        self._start = start
        self.suspicion = suspicion
        self.noted = NOT_NOTED
        self.alone_left = ISOLATED_RECORDS
        self.sought_to: int | None = None
        self._revoked = False
        self._session = session

    @property
    def revoked(self) -> bool:
        return self._revoked

    def held(self) -> bool:
        return not self._revoked and self._session.lasts(self.generation)

    def note(self) -> str:
        """What the commit's metadata says of the first unfinished record. A moved offset clears what was counted."""
        if not self.suspicion.isolated and self.watermark.first_unfinished != self._start:
            self.suspicion = Suspicion(MOVED)
        return str(self.suspicion)

    def hand_out(self, fetched: Sequence[Any], *, end: int | None = None, lethal: bool = False) -> Run:
        """The run that aiokafka's records are; the watermark knows it from now on. `end` of the log, where known."""
        records = [
            Record(Source(each.topic, each.partition, each.offset, each.timestamp), each.key, each.value, each.headers)
            for each in fetched
        ]
        self.watermark.hand_out(record.source.offset for record in records)
        # Where records run alone, none comes before this one is done: nothing to wait for.
        behind = 0 if end is None or self.suspicion.isolated else max(0, end - self.watermark.next_offset)
        return Run(self, records, lethal, behind)

    def finish(self, offset: int) -> None:
        if not self._revoked:
            self.watermark.finish(offset)

    def revoke(self) -> None:
        """For good. What is unfinished is delivered again."""
        self._revoked = True

    def __repr__(self) -> str:
        return f"PartitionLease({self.topic}/{self.partition}, generation {self.generation})"


class Start(NamedTuple):
    """Where a partition is read from, what is committed of it (or the same, if that is lower or nonsense), and what is
    suspected of the record there."""

    offset: int
    committed: int
    suspicion: Suspicion


def starts_of(
    partitions: Sequence[TopicPartition],
    own: Mapping[tuple[str, int], int],
    committed: Mapping[TopicPartition, Any],
    first: Mapping[TopicPartition, int],
    end: Mapping[TopicPartition, int],
    *,
    trusts_ends: bool,
) -> dict[TopicPartition, Start]:
    """Each partition is read from the handler's own position, else the committed one, else its beginning.

    `trusts_ends`: the embedded broker, known by its want of idempotent producers, says an end short of its last batch.
    Raises StoreError for an own position beyond the end.
    """
    starts = {}
    for partition in partitions:
        name = f"{partition.topic}/{partition.partition}"
        stored = own.get((partition.topic, partition.partition))
        known = committed.get(partition)
        start = stored if stored is not None else known.offset if known is not None else first[partition]
        if start > end[partition] and trusts_ends:
            if stored is not None:
                raise StoreError(
                    f"{name}: the store's next offset {start} lies beyond the log's end {end[partition]}: "
                    "the topic was made again, rebuild the store"
                )
            log.error("log is shorter than committed: read from its beginning", partition=name, committed=start)
            start = first[partition]
        if start < first[partition]:
            log.error(
                "records were deleted unread: retention is too short",
                partition=name,
                from_offset=start,
                to_offset=first[partition],
            )
            start = first[partition]
        metadata = known.metadata if known is not None and known.offset == start else None
        # A store that is made again reads from the beginning: what is committed must not step back meanwhile.
        done = known.offset if known is not None and start < known.offset <= end[partition] else start
        starts[partition] = Start(start, done, Suspicion.parse(metadata).taken_over())
    return starts


async def give_up(
    leases: Mapping[TopicPartition, PartitionLease],
    handler: RunHandler,
    settings: Settings,
    crash: Callable[[BaseException], None],
) -> None:
    """Let the handler finish what it can in its time, then revoke the leases, whatever became of it.

    What the handler raises is told to `crash` and raised again.
    """
    try:
        async with asyncio.timeout(settings.revoke_budget_s + settings.lease_margin_s):
            await handler.on_revoke(list(leases.values()), settings.revoke_budget_s)
    except TimeoutError:
        log.error("handler overran its time for giving partitions up", budget_s=settings.revoke_budget_s)
    except Exception as error:
        crash(error)
        raise
    finally:
        for lease in leases.values():
            lease.revoke()


def due(
    leases: Mapping[TopicPartition, PartitionLease], *, isolates: bool, clean: bool
) -> dict[TopicPartition, tuple[int, str]]:
    """Offset and metadata to commit: of watermarks that rose, and of what is suspected where they stand. A clean end
    clears that."""
    moved = {}
    for partition, lease in leases.items():
        offset = lease.watermark.first_unfinished
        metadata = "" if clean or not isolates else lease.note()
        noted = offset < lease.committed or not isolates or metadata == lease.noted
        if offset > lease.committed or not noted:
            moved[partition] = (offset, metadata)
    return moved


def uncommitted(leases: Mapping[TopicPartition, PartitionLease]) -> int:
    """Offsets finished since the last commit, all partitions together."""
    return sum(max(0, lease.watermark.first_unfinished - lease.committed) for lease in leases.values())
