"""Owning a partition: the session that the broker grants a member, and the lease that hangs on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from processor.suspicion import MOVED, Suspicion
from processor.watermark import Watermark

NO_GENERATION = -1
ISOLATED_RECORDS = 100
"""So many records run alone after three unclean ends: the one that ended them may not be the first."""

NO_SUSPICION = Suspicion()
NOT_NOTED = "?"
"""What the committed metadata is, as far as this lease knows: nothing, so that it is written at least once."""


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

    def finish(self, offset: int) -> None:
        if not self._revoked:
            self.watermark.finish(offset)

    def revoke(self) -> None:
        """For good. What is unfinished is delivered again."""
        self._revoked = True

    def __repr__(self) -> str:
        return f"PartitionLease({self.topic}/{self.partition}, generation {self.generation})"
