"""What an engine drives: takes runs, feeds the pipeline, starts windows and calls, and lets go of what is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any

from processor.domain import Lane
from processor.embed import Route
from processor.pipeline import Pipeline, Ports
from processor.ports import Lease, Run
from processor.work import DocumentKey, Fail, Job, Parcel, Policy, Ticket

BYTES_A_TURN = 1_000_000
"""Of records and of what they become: a few hundred texts, which take a few milliseconds to admit."""

LARGE_RECORD_BYTES = 250_000
"""To decode as much takes a millisecond, to check it and take its texts apart two: others come in between."""

LOOK_UPS = 4
"""Windows that are looked up at the same time."""

FILL_WAIT_S = 1.0
"""While more is known to be in the log or on its way, a call waits so long at most for what would fill it."""

ROOM_WAIT_CALLS, ROOM_WAIT_S = 2.0, 10.0
"""While calls are in flight, it waits for so many typical call times, and no longer than this: their end makes room in
the read-ahead, which may be full now or a moment later."""


class Worker:
    """The `RunHandler` of a worker. `fail` ends the process: a task of ours that breaks must never be passed over.

    Read-ahead is bounded in bytes of records admitted and not yet finished, and of what they become meanwhile.
    """

    def __init__(self, ports: Ports, policy: Policy, route: Route, *, read_ahead_bytes: int, fail: Fail) -> None:
        self._work = asyncio.Event()
        self.pipeline = Pipeline(ports, policy, route, self._forget, self._work.set)
        self.route = route
        self._clock = ports.clock
        self._read_ahead_bytes = read_ahead_bytes
        self._fail = fail
        self._interactive = policy.lane is Lane.INTERACTIVE
        self._slots = LOOK_UPS
        self._tickets: set[Ticket] = set()
        self._closing: set[Lease] = set()
        self._held_bytes = 0
        self._behind: dict[tuple[str, int], int] = {}
        self._admitting = False
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        for deployment in route.deployments:
            deployment.gate.changed = self._work.set

    def start(self, *beside: Coroutine[Any, Any, None]) -> None:
        """Start look-ups and calls, and what runs as long as this worker does; call within the running loop."""
        for work in (self._dispatch(), *beside):
            self._spawn(work)

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
        return len(self.pipeline.batcher) + len(self.pipeline.packer)

    async def on_run(self, run: Run) -> None:
        """Steps 1 and 2 for each record of a fetched run; waits while the read-ahead is full.

        Everybody else gets a turn every `BYTES_A_TURN`: a run can hold a thousand records, and one of them thousands
        of texts.
        """
        if not self._is_over(run.lease):  # else nobody would ever say that nothing comes any more
            # One more offset may be no record but the end of a transaction, after which nothing comes.
            self._behind[run.lease.topic, run.lease.partition] = max(0, run.behind - 1)
        self._admitting = True
        try:
            await self._admit(run)
        finally:
            self._admitting = False
            self._work.set()

    async def _admit(self, run: Run) -> None:
        known: list[Parcel] = []
        turn_bytes = 0
        for record in run.records:
            while self._is_full() and not self._is_over(run.lease):
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
            elif len(record.value or b"") >= LARGE_RECORD_BYTES:
                await self._give_turn(known)
                if self._is_over(run.lease):
                    break
            ticket = self.pipeline.admit(record, decoded, run.lease, known)
            self._tickets.add(ticket)
            self._held_bytes += ticket.size_bytes
            while isinstance(ticket, Job) and ticket.unplaced:
                await self._give_turn(known)
                self.pipeline.place(ticket, known)
            turn_bytes += ticket.size_bytes
            if turn_bytes >= BYTES_A_TURN:
                turn_bytes = 0
                await self._give_turn(known)
        self._hand_on(known)

    async def _give_turn(self, known: list[Parcel]) -> None:
        self._hand_on(known)
        await asyncio.sleep(0)

    def _is_full(self) -> bool:
        return self._held_bytes >= self._read_ahead_bytes

    def _hand_on(self, known: list[Parcel]) -> None:
        """Deliver what is known already, which empties the list, and let the dispatcher see what was queued."""
        if known:
            self._spawn(self.pipeline.deliver(known.copy()))
            known.clear()
        self._work.set()

    async def on_revoke(self, leases: Sequence[Lease], budget_s: float) -> None:
        """Let calls in flight end within the budget, then drop what is left of these leases."""
        self._closing = {lease for lease in self._closing if not lease.revoked} | set(leases)
        for lease in leases:
            self._behind.pop((lease.topic, lease.partition), None)
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
        if ended := self.pipeline.let_go():
            self._spawn(self.pipeline.give_up(ended))
        self._work.set()

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
        """Start look-ups and calls as they fall due, while there is room for them."""
        while True:
            self._work.clear()
            now = self._clock.monotonic()
            self._start_look_ups(now)
            due_at = [await self._start_calls()]
            if self._slots > 0:
                due_at.append(self.pipeline.batcher.due_at())
            await self._work_or(min((at for at in due_at if at is not None), default=None))

    def _start_look_ups(self, now: float) -> None:
        """Under backlog a window never waits for more: it is full. Nor does its end while others wait for a call."""
        rest = len(self.pipeline.packer) > 0 and not self._is_more_coming()
        while self._slots > 0 and (window := self.pipeline.batcher.take(now, flush=rest)) is not None:
            self._slots -= 1
            self._spawn(self.pipeline.look_up(window, self._release_slot))

    async def _start_calls(self) -> float | None:
        """Make calls of what waits while a deployment takes them. When to look again; None: when something changes."""
        packer, route = self.pipeline.packer, self.route
        while True:
            now, patience_s, most = self._clock.monotonic(), self._patience_s(), route.max_call_tokens
            tokens = packer.next_tokens(now, patience_s, most)
            if tokens is None:
                return packer.due_at(now, patience_s)
            on = route.choose(tokens)
            if on is None:
                return route.ready_at(tokens)
            call, ended = packer.take(now, self._clock.now_ms(), patience_s, most)
            if ended:
                self._spawn(self.pipeline.give_up(ended))
            if call is not None and (at := on.retry_at(call, now)) > now:
                call.not_before = at  # what was not tried yet goes first
                packer.retry(call)
            elif call is not None:
                self._spawn(self.pipeline.carry(call, on, on.begin(call)))
            await asyncio.sleep(0)

    def _patience_s(self) -> float:
        """How long a call that is not full may wait for more: only while more is to come."""
        if self._interactive:
            return 0.0
        in_flight, coming = self.route.in_flight > 0, self._is_more_coming()
        if self._admitting and self._is_full() and not in_flight:
            return 0.0  # nothing else makes room for more
        if in_flight and coming:
            return max(FILL_WAIT_S, min(ROOM_WAIT_CALLS * self.route.call_seconds, ROOM_WAIT_S))
        return FILL_WAIT_S if coming or self._slots < LOOK_UPS else 0.0

    def _is_more_coming(self) -> bool:
        return self._admitting or any(self._behind.values())

    async def _work_or(self, due_at: float | None) -> None:
        if due_at is None:
            await self._work.wait()
            return
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
        self._work.set()
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
