"""What an engine drives: takes runs, feeds the pipeline, dispatches windows, and lets go of what is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any

from processor.embed import Route
from processor.pipeline import Pipeline, Ports
from processor.ports import Lease, Run
from processor.work import DocumentKey, Fail, Job, Parcel, Policy, Ticket

BYTES_A_TURN = 1_000_000
"""Of records and of what they become: a few hundred texts, which take a few milliseconds to admit."""


class Worker:
    """The `RunHandler` of a worker. `fail` ends the process: a task of ours that breaks must never be passed over.

    Read-ahead is bounded in bytes of records admitted and not yet finished, and of what they become meanwhile.
    """

    def __init__(self, ports: Ports, policy: Policy, route: Route, *, read_ahead_bytes: int, fail: Fail) -> None:
        self.pipeline = Pipeline(ports, policy, route, self._forget)
        self.route = route
        self._clock = ports.clock
        self._read_ahead_bytes = read_ahead_bytes
        self._fail = fail
        self._slots = policy.max_concurrent_calls * 2
        self._tickets: set[Ticket] = set()
        self._closing: set[Lease] = set()
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._work = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start dispatching windows; call within the running loop."""
        self._spawn(self._dispatch())

    async def stop(self) -> None:
        """End every task; what was not finished is delivered again to somebody else."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def held_bytes(self) -> int:
        """Bytes of records admitted and not yet finished, and of what they have become."""
        return self._held_bytes

    @property
    def queued_texts(self) -> int:
        return len(self.pipeline.batcher)

    async def on_run(self, run: Run) -> None:
        """Steps 1 and 2 for each record of a fetched run; waits while the read-ahead is full.

        Everybody else gets a turn every `BYTES_A_TURN`: a run can hold a thousand records, and one of them thousands
        of texts.
        """
        known: list[Parcel] = []
        turn_bytes = 0
        for record in run.records:
            while self._held_bytes >= self._read_ahead_bytes and not self._is_over(run.lease):
                self._hand_on(known)
                self._room.clear()
                await self._room.wait()
            if self._is_over(run.lease):
                break
            decoded = self.pipeline.decode(record, run)
            if decoded is None:  # a registry may be out of reach for long: what was admitted doesn't wait for it
                self._hand_on(known)
                decoded = await self.pipeline.fetch(record)
                if self._is_over(run.lease):  # revoked meanwhile: nobody would ever let go of it
                    break
            ticket = self.pipeline.admit(record, decoded, run.lease, known)
            self._tickets.add(ticket)
            self._held_bytes += ticket.size_bytes
            turn_bytes += ticket.size_bytes
            if turn_bytes >= BYTES_A_TURN:
                self._hand_on(known)
                turn_bytes = 0
                await asyncio.sleep(0)
        self._hand_on(known)

    def _hand_on(self, known: list[Parcel]) -> None:
        """Deliver what is known already, which empties the list, and let the dispatcher see what was queued."""
        if known:
            self._spawn(self.pipeline.deliver(known.copy()))
            known.clear()
        self._work.set()

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        """Let windows in flight end within the budget, then drop what is left of these leases."""
        self._closing = {lease for lease in self._closing if not lease.revoked} | set(leases)
        self._room.set()
        tickets = [ticket for ticket in self._tickets if ticket.lease in self._closing]
        self._drop(_stuck(tickets))
        deadline = self._clock.monotonic() + budget_s
        try:
            while self._tickets.intersection(tickets) and self._clock.monotonic() < deadline:
                await self._clock.sleep(0.02)
        finally:  # cancelled when a loop that stood still overran the budget: nobody else lets go of these
            self._drop(self._tickets.intersection(tickets))
            self.pipeline.order.abandon(leases)

    def _drop(self, tickets: Iterable[Ticket]) -> None:
        """Nothing of these is sent any more; their records are delivered again to whoever owns them next."""
        dropped = list(tickets)
        for ticket in dropped:
            ticket.dropped = True
            ticket.close()
        self._forget(dropped)
        self.pipeline.batcher.let_go()

    def _is_over(self, lease: Lease) -> bool:
        return lease.revoked or lease in self._closing

    def waiting(self) -> bool:
        """Also while the broker is waited for: one that takes no results is no record's fault."""
        ports = self.pipeline.ports
        return self.route.paused is not None or self.pipeline.paused is not None or ports.outbox.sending > 0

    async def positions(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:  # noqa: ARG002
        """Committed offsets are the truth for a worker."""
        return {}

    def _forget(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._held_bytes -= ticket.size_bytes
        self._room.set()

    async def _dispatch(self) -> None:
        """Close windows as they fall due while slots are free; under backlog it never waits for more."""
        batcher = self.pipeline.batcher
        while True:
            window = batcher.take(self._clock.monotonic()) if self._slots > 0 else None
            if window is not None:
                self._slots -= 1
                self._spawn(self.pipeline.process(window, self._release_slot))
                continue
            self._work.clear()
            due_at = batcher.due_at() if self._slots > 0 else None
            if due_at is None:
                await self._work.wait()
                continue
            timer = asyncio.ensure_future(self._clock.sleep(max(0.0, due_at - self._clock.monotonic())))
            wake = asyncio.ensure_future(self._work.wait())
            try:
                await asyncio.wait({timer, wake}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
                wake.cancel()

    def _release_slot(self) -> None:
        self._slots += 1
        self._work.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)


def _stuck(tickets: Iterable[Ticket]) -> list[Job]:
    """Jobs that no budget helps: with a text still queued, or with none at all and behind such a one of the document.

    A manifest or delete would wait for a record that is dropped; it is delivered again after that one.
    """
    stuck: list[Job] = []
    documents: set[tuple[Lease, DocumentKey]] = set()
    for job in sorted((ticket for ticket in tickets if isinstance(ticket, Job)), key=lambda job: job.source.offset):
        document = None if job.document_key is None else (job.lease, job.document_key)
        if not job.in_flight or (not job.works and document in documents):
            stuck.append(job)
            if document is not None:
                documents.add(document)
    return stuck
