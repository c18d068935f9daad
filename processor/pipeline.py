"""READ FIRST: the eight steps of a record, top down. Each step is one call; the module it comes from has the detail.

A step that raises leaves its records unacknowledged, so they are delivered again: no step is skipped on error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from processor.batching import Batcher, pack
from processor.cache import cache_key, hash_key, look_up, remember
from processor.decode import EMPTY_TEXT, check, counts_as_usage, echoable, too_long
from processor.domain import (
    Action,
    DeadLetter,
    DlqClass,
    DocumentManifest,
    Fault,
    Item,
    Record,
    Request,
    Status,
)
from processor.embed import Route, embed
from processor.emit import Emitter
from processor.errors import RegistryUnavailable
from processor.identity import request_id
from processor.ordering import DocumentOrder
from processor.ports import (
    Catalogue,
    Clock,
    Destination,
    Events,
    Outbox,
    RequestDecoder,
    Run,
    TokenCounter,
    Undecodable,
    VectorCache,
)
from processor.results import chunk_result, messages, plain_result, request_result, settle, tombstones
from processor.usage import charge, cost_at
from processor.work import Fold, Job, Outcome, Parcel, Plan, Policy, Ticket, Window, Work

LETHAL = Undecodable(DlqClass.LETHAL, "ended_its_processes")
BYTES_IN_WORK = 1_000
"""What a text, an outcome or a tombstone takes beside its record's bytes while it is worked on; measured: 945."""
BY_REFERENCE = frozenset({DlqClass.TOO_LARGE, DlqClass.LETHAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What the steps need from the outside."""

    decoder: RequestDecoder
    catalogue: Catalogue
    cache: VectorCache
    counter: TokenCounter
    outbox: Outbox
    clock: Clock
    events: Events = field(default_factory=Events)


class Pipeline:
    """Carries records to where their offsets may be committed.

    `finished` is called once per record, when all its outcomes are acknowledged by the broker. `paused` says what
    decoding waits for.
    """

    def __init__(self, ports: Ports, policy: Policy, route: Route, finished: Callable[[Ticket], None]) -> None:
        self.ports = ports
        self.policy = policy
        self.route = route
        self.batcher = Batcher(policy)
        self.order = DocumentOrder()
        self.paused: str | None = None
        self._finished = finished
        self._cache_secret = hash_key(policy.cache_secret)
        self._emitter = Emitter(ports.outbox, self.order, ports.clock, self._charge)

    async def admit(self, record: Record, run: Run, opened: Callable[[Ticket], None]) -> list[Parcel]:
        """Steps 1 and 2: queue what is to be embedded; returns the parcels whose outcome is known already.

        `opened` is told of the record's ticket before anything can finish it; one that it drops goes no further.
        """
        ticket, parcels = await self._decode(record, run)  # 1. bad input becomes a value
        ticket.size_bytes += BYTES_IN_WORK * _in_work(ticket, parcels)
        opened(ticket)
        if not ticket.live:
            return []
        self._group(ticket, parcels)  # 2. equal texts are embedded once
        return parcels

    async def process(self, window: Window, release: Callable[[], None]) -> None:
        """Steps 3 to 8: carry a window of one embedding function to where its offsets may be committed.

        `release` frees the window's slot before its outcomes wait for their turn.
        """
        ports = self.ports
        started = ports.clock.monotonic()
        misses: list[Fold] = []
        try:
            misses = await look_up(window.folds, ports.cache)  # 3. a cache that is gone is gone without
            calls = pack(misses, ports.counter, ports.clock.now_ms())  # 4. few, full calls
            receipts = await embed(calls, self.route)  # 5. intent first, receipt after
            await remember(misses, ports.cache)  # 6. so a replay finds the payer
        finally:
            release()
        await self.deliver(self._settle(window), receipts)  # 7 and 8
        self._observe(window, misses, len(calls), ports.clock.monotonic() - started)

    async def deliver(self, parcels: Sequence[Parcel], receipts: Sequence[Awaitable[None]] = ()) -> None:
        """Steps 7 and 8."""
        async for sent in self._emitter.emit(parcels, receipts):  # 7. every delivery awaited
            self._acknowledge(sent)  # 8. in offset order: the lease keeps the watermark

    # Step 1

    async def _decode(self, record: Record, run: Run) -> tuple[Ticket, list[Parcel]]:
        """A job to queue, or a ticket with the parcels of what is known already. A lethal record is not looked at."""
        decoded = LETHAL if run.lethal else await self._read(record)
        size_bytes = len(record.value or b"")
        clock = self.ports.clock
        if isinstance(decoded, Undecodable):
            ticket = Ticket(run.lease, record.source, size_bytes, clock.monotonic())
            return ticket, [self._dead_letter(ticket, record, decoded)]
        job = Job(
            run.lease,
            record.source,
            size_bytes,
            clock.monotonic(),
            request=decoded,
            request_id=request_id(decoded),
        )
        plan = check(decoded, size_bytes, policy=self.policy, catalogue=self.ports.catalogue)
        if isinstance(plan, Fault):
            self.ports.events.count("refused_requests", 1, {"code": plan.code})
            job.request = echoable(decoded, self.policy)
            return job, [self._whole(job, plan)]
        job.plan = plan
        return job, self._plain_action(job, plan, decoded)

    async def _read(self, record: Record) -> Request | Undecodable:
        """A registry out of reach is waited for: ending the process for it would count against the record."""
        backoff_s = self.policy.retry_initial_s
        try:
            while True:
                try:
                    return await self.ports.decoder.decode(record)
                except RegistryUnavailable:
                    self.paused = "schema_registry"
                await self.ports.clock.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, self.policy.retry_max_s)
        finally:
            self.paused = None

    def _dead_letter(self, ticket: Ticket, record: Record, why: Undecodable) -> Parcel:
        self.ports.events.count("dead_letters", 1, {"class": why.reason})
        letter = DeadLetter(
            record=record,
            reason=why.reason,
            code=why.code,
            at_ms=self.ports.clock.now_ms(),
            by_reference=why.reason in BY_REFERENCE,
        )
        return Parcel(ticket, lambda: [Destination("dlq", letter)])

    def _plain_action(self, job: Job, plan: Plan, request: Request) -> list[Parcel]:
        """The parcels of actions without embedding, which go from step 2 to step 7."""
        match plan.action:
            case Action.VALIDATE:
                return self._validate(job, plan)
            case Action.DELETE:
                return self._delete(job)
            case Action.DOCUMENT_MANIFEST:
                manifest = DocumentManifest(
                    tenant_id=request.tenant_id,
                    collection=request.collection,
                    document_id=request.document_id or "",
                    chunk_ids=request.chunk_ids,
                    vector_spaces=request.vector_spaces,
                    source_version=job.source.version,
                    request_id=job.request_id,
                )
                stored = self._whole(job, None)
                return [replace(stored, before=[Destination("documents", manifest)], document=job.document_key)]
            case _:
                return []

    # Step 2

    def _group(self, ticket: Ticket, parcels: list[Parcel]) -> None:
        """Enter the record into its document's order and queue its texts; empty ones fail right here."""
        if not isinstance(ticket, Job) or ticket.plan is None:
            return
        job, plan, request = ticket, ticket.plan, ticket.request
        if job.document_key is not None and plan.action is not Action.VALIDATE:
            ids = [chunk.chunk_id for chunk in request.chunks]
            ids = list(request.chunk_ids) if plan.action is Action.DELETE else ids
            self.order.enter(job.lease, job.source.offset, job.document_key, ids)
        if plan.operation is None or plan.function is None:
            return
        job.works = [
            Work(job, position, Item(job.request_id, request.first_chunk_index + position))
            for position in range(len(request.chunks))
        ]
        job.unsent = job.unacked = len(job.works)
        now = self.ports.clock.monotonic()
        for work in job.works:
            if not work.text.strip():
                work.outcome = Outcome(fault=EMPTY_TEXT)
                parcels.append(self._parcel(work))
            else:
                self._queue(work, now)

    def _queue(self, work: Work, now: float) -> None:
        """Put a work into the fold of its cache key."""
        job = work.job
        assert job.plan is not None
        assert job.plan.function is not None
        function = job.plan.function
        own = None if job.request.use_cache else work.item
        key = cache_key(self._cache_secret, job.request.tenant_id, function, work.text, own)
        self.batcher.add(work, key, function, now)

    # Between 6 and 7

    def _settle(self, window: Window) -> list[Parcel]:
        """Outcomes for the window's works; from here on an equal text starts anew and finds the cache."""
        parcels: list[Parcel] = []
        now = self.ports.clock.monotonic()
        for fold in window.folds:
            self.batcher.settled(fold)
            if not settle(fold):
                for work in fold.live_works():
                    self._queue(work, now)
            parcels += [self._parcel(work) for work in fold.works if work.outcome is not None]
        return parcels

    def _observe(self, window: Window, misses: Sequence[Fold], calls: int, took_s: float) -> None:
        """One rich line a window, and its texts by cache level and outcome."""
        tally: dict[tuple[str, str], int] = {}
        for fold in window.folds:
            for work in fold.works:
                if (outcome := work.outcome) is not None:
                    label = (outcome.level.value, outcome.fault.code.value if outcome.fault else "ok")
                    tally[label] = tally.get(label, 0) + 1
        for (level, code), texts in tally.items():
            self.ports.events.count("texts", texts, {"cache": level, "outcome": code})
        self.ports.events.observe("window_seconds", took_s, {})
        self.ports.events.observe("window_texts", sum(tally.values()), {})
        self.ports.events.window(
            {
                "space": str(window.function.space),
                "texts": sum(tally.values()),
                "folds": len(window.folds),
                "misses": len(misses),
                "calls": calls,
                "errors": sum(texts for (_, code), texts in tally.items() if code != "ok"),
                "billed_tokens": sum(fold.entry.tokens for fold in misses if fold.entry is not None),
                "took_ms": round(took_s * 1000),
            }
        )

    def _parcel(self, work: Work) -> Parcel:
        job = work.job

        def outcome() -> list[Destination]:
            result = chunk_result(work, provider=self.route.provider.name, clock=self.ports.clock)
            return list(messages(result, self.policy))

        return Parcel(job, outcome, document=job.document_key, chunk_id=work.chunk_id)

    def _whole(self, job: Job, fault: Fault | None) -> Parcel:
        result = request_result(job, fault, clock=self.ports.clock)
        return Parcel(job, lambda: list(messages(result, self.policy)))

    def _delete(self, job: Job) -> list[Parcel]:
        request = job.request
        job.unsent = job.unacked = len(request.chunk_ids)
        return [
            Parcel(
                job,
                lambda index=index, chunk_id=chunk_id: list(  # type: ignore[misc]
                    messages(plain_result(job, index, chunk_id, Status.OK, clock=self.ports.clock), self.policy)
                ),
                before=list(tombstones(job, chunk_id)),
                document=job.document_key,
                chunk_id=chunk_id,
            )
            for index, chunk_id in enumerate(request.chunk_ids)
        ]

    def _validate(self, job: Job, plan: Plan) -> list[Parcel]:
        """What would happen to each chunk: valid or not, tokens and cost as estimates. Nothing is embedded."""
        request, function = job.request, plan.function
        assert function is not None
        model = function.model
        job.unsent = job.unacked = len(request.chunks)
        counts = self.ports.counter.count([function.prefix + chunk.text for chunk in request.chunks], model)
        parcels = []
        for index, (chunk, tokens) in enumerate(zip(request.chunks, counts.counts, strict=True)):
            fault = too_long(tokens, function) if chunk.text.strip() else EMPTY_TEXT
            kept = min(tokens, model.max_input_tokens)
            result = replace(
                plain_result(job, index, chunk.chunk_id, Status.VALID, clock=self.ports.clock),
                status=Status.INVALID if fault else Status.VALID,
                error=fault,
                chunk_metadata=chunk.metadata,
                provider=self.route.provider.name,
                model=model.name,
                vector_space=str(function.space),
                token_count=kept,
                token_source=counts.source,
                truncated=fault is None and tokens > kept,
                cost_nanos=cost_at(kept, model, job.source.append_ms),
            )
            parcels.append(Parcel(job, lambda result=result: list(messages(result, self.policy))))  # type: ignore[misc]
        return parcels

    # Steps 7 and 8

    def _charge(self, job: Job) -> Destination | None:
        """The usage of a request whose last outcome goes out now (U4); None for what is not embedded."""
        if not counts_as_usage(job.request):
            return None
        usage = charge(job, provider=self.route.provider.name, clock=self.ports.clock)
        return Destination("usage", usage)

    def _acknowledge(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            self.order.leave(parcel)
            ticket = parcel.ticket
            ticket.unacked -= 1
            if ticket.unacked == 0:
                ticket.lease.finish(ticket.source.offset)
                self._finished(ticket)


def _in_work(ticket: Ticket, parcels: Sequence[Parcel]) -> int:
    """How many texts, outcomes and tombstones a record becomes: many, for one of tiny chunks."""
    texts = len(ticket.request.chunks) if isinstance(ticket, Job) and ticket.plan is not None else 0
    return texts + sum(1 + len(parcel.before) for parcel in parcels)
