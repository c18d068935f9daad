"""READ FIRST: the eight steps of a record, top down. Each step is one call; the module it comes from has the detail.

A step that raises leaves its records unacknowledged, so they are delivered again: no step is skipped on error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from processor.batching import Batcher
from processor.cache import CacheKeys, look_up, remember
from processor.decode import EMPTY_TEXT, Checker, counts_as_usage, echoable, too_long
from processor.domain import (
    Action,
    CacheLevel,
    Chunk,
    DeadLetter,
    DlqClass,
    DocumentManifest,
    EmbeddingFunction,
    ErrorCode,
    Fault,
    Item,
    Record,
    Request,
    Result,
    Status,
)
from processor.embed import Deployment, Route, embed
from processor.emit import Emitter
from processor.errors import RegistryUnavailable
from processor.identity import request_id
from processor.limits import Permit
from processor.measuring import measure
from processor.ordering import DocumentOrder
from processor.packing import Packer
from processor.ports import (
    Budgets,
    Catalogue,
    Clock,
    Destination,
    Events,
    Lease,
    Outbox,
    RequestDecoder,
    Run,
    TokenCounter,
    Undecodable,
    VectorCache,
)
from processor.results import Tombstones, chunk_result, messages, plain_result, request_result, settle
from processor.spending import Spending
from processor.usage import charge, cost_of
from processor.work import Call, Fold, Instant, Job, Known, Outcome, Parcel, Plan, Policy, Ticket, Window, Work

LETHAL = Undecodable(DlqClass.LETHAL, "ended_its_processes")
BYTES_IN_WORK = 4_000
"""What a text, an outcome or a tombstone takes beside its record's bytes and its vector until it is acknowledged;
measured: 4,400 with the usage event of its request, 5,000 with the sink view."""
TEXTS_A_TURN = 256
"""Of one request: to hash and queue them takes a millisecond."""
MEASURED_TEXTS = 128
"""Of a window with several tenants: so many are measured and wait for a call before the rest of it is measured."""
BY_REFERENCE = frozenset({DlqClass.TOO_LARGE, DlqClass.LETHAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What the steps need from the outside; without `budgets` none is enforced."""

    decoder: RequestDecoder
    catalogue: Catalogue
    cache: VectorCache
    counter: TokenCounter
    outbox: Outbox
    clock: Clock
    events: Events = field(default_factory=Events)
    budgets: Budgets | None = None


class Pipeline:
    """Carries records to where their offsets may be committed.

    `finished` is told of records when all their outcomes are acknowledged by the broker, `queued` when texts may wait
    for a window or a call that did not before. `paused` says what decoding waits for.
    """

    def __init__(
        self,
        ports: Ports,
        policy: Policy,
        route: Route,
        finished: Callable[[Sequence[Ticket]], None],
        queued: Callable[[], None] = lambda: None,
    ) -> None:
        self.ports = ports
        self.policy = policy
        self.route = route
        self.batcher = Batcher(policy)
        self.spending = None if ports.budgets is None else Spending(ports.budgets, ports.clock)
        self.packer = Packer(policy, self.spending)
        self.order = DocumentOrder()
        self.paused: str | None = None
        self._finished = finished
        self._queued = queued
        self._checker = Checker(policy, ports.catalogue)
        self._keys = CacheKeys.of(policy)
        self._found_at_once = 0
        self._emitter = Emitter(ports.outbox, self.order, ports.clock, self._write)

    def decode(self, record: Record, run: Run) -> Request | Undecodable | None:
        """Step 1, first half; None when the record's schema must be fetched first, by `fetch`."""
        return LETHAL if run.lethal else self.ports.decoder.decode_now(record)

    async def fetch(self, record: Record) -> Request | Undecodable:
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

    def admit(self, record: Record, decoded: Request | Undecodable, lease: Lease, known: list[Parcel]) -> Ticket:
        """Steps 1 and 2: queue what is to be embedded; outcomes that are known already are added to `known`.

        Of a large request only the first texts: `place` queues the rest. Nothing can finish the record's ticket before
        all are placed and the event loop has had its next turn.
        """
        outcomes: list[Parcel] = []
        ticket = self._check(record, decoded, lease, outcomes)  # 1. bad input becomes a value
        ticket.size_bytes += _bytes_in_work(ticket, outcomes)
        self._group(ticket, outcomes)  # 2. equal texts are embedded once
        known += outcomes
        return ticket

    def place(self, job: Job, known: list[Parcel]) -> None:
        """Step 2 for the next works of a job that has `unplaced` ones."""
        assert job.plan is not None
        assert job.plan.function is not None
        begin, job.placed = job.placed, job.placed + TEXTS_A_TURN
        for work in job.works[begin : job.placed]:
            if not work.chunk.text or work.chunk.text.isspace():
                work.outcome = Outcome(fault=EMPTY_TEXT)
                known.append(work)
            else:
                self._place(work, job.plan.function, job.started, known)

    async def look_up(self, window: Window, release: Callable[[], None]) -> None:
        """Steps 3 and 4 for a window: hits go out, and misses wait for a call that is worth its while.

        `release` frees the window's slot before its outcomes wait for their turn.
        """
        ports, started = self.ports, self.ports.clock.monotonic()
        known: list[Parcel] = []
        try:
            misses = await look_up(window.folds, ports.cache, self._keys)  # 3. a cache that is gone is gone without
            # First of all: who has paid for some of it gets all, and a call may be made while the misses are measured.
            known += self._settle([fold for fold in window.folds if fold.entry is not None])
            for some in _portions(misses):
                await measure(some, ports.counter, ports.clock)  # 4. counted exactly, and cut if need be
                known += self._settle([fold for fold in some if fold.fault is not None])  # a call tells of the others
                self.packer.add([fold for fold in some if fold.fault is None], started, ports.clock.now_ms())
        finally:
            release()
        self._observe_window(window, ports.clock.monotonic() - started)
        await self.deliver(known)  # 7 and 8

    async def carry(self, call: Call, on: Deployment, permit: Permit) -> None:
        """Steps 5 to 8 for a call: once its outcomes are acknowledged, their offsets may be committed."""
        started = self.ports.clock.monotonic()
        done, receipts = await embed(call, on, permit, self.route, self.packer)  # 5. intent first, receipt after
        await remember(done, self.ports.cache)  # 6. so a replay finds the payer
        parcels = self._settle(done)
        self._observe_call(call, on, done, self.ports.clock.monotonic() - started)
        await self.deliver(parcels, receipts)  # 7 and 8

    async def give_up(self, folds: Sequence[Fold]) -> None:
        """Steps 7 and 8 for texts that no call is made of: past their deadline or budget, or wanted by nobody."""
        await self.deliver(self._settle(folds))

    async def deliver(self, parcels: Sequence[Parcel], receipts: Sequence[Awaitable[None]] = ()) -> None:
        """Steps 7 and 8."""
        self._count(parcels)
        async for sent in self._emitter.emit(parcels, receipts):  # 7. every delivery awaited
            self._acknowledge(sent)  # 8. in offset order: the lease keeps the watermark

    def let_go(self) -> list[Fold]:
        """Forget works that were dropped: while a provider is out each rebalance would leave as many again.

        The folds that wait for no call any more: give them up. One may hold the outcome of a work past its deadline.
        """
        self.batcher.let_go()
        if self.spending is not None:
            self.spending.let_go()
        return self.packer.let_go()

    # Step 1

    def _check(self, record: Record, decoded: Request | Undecodable, lease: Lease, known: list[Parcel]) -> Ticket:
        """A job to queue, or a ticket whose outcomes are known already."""
        size_bytes = len(record.value or b"")
        started = self.ports.clock.monotonic()
        if isinstance(decoded, Undecodable):
            ticket = Ticket(lease, record.source, size_bytes, started)
            known.append(self._dead_letter(ticket, record, decoded))
            return ticket
        job = Job(lease, record.source, size_bytes, started, request=decoded, request_id=request_id(decoded))
        plan = self._checker.check(decoded, size_bytes)
        if isinstance(plan, Fault):
            self.ports.events.count("refused_requests", 1, {"code": plan.code})
            job.request = echoable(decoded, self.policy)
            known.append(self._whole(job, plan))
        else:
            job.plan = plan
            if plan.function is not None:
                job.price = plan.function.model.price_at(record.source.append_ms)
            if plan.operation is None:
                known += self._plain_action(job, plan, decoded)
        return job

    def _dead_letter(self, ticket: Ticket, record: Record, why: Undecodable) -> Parcel:
        self.ports.events.count("dead_letters", 1, {"class": why.reason})
        letter = DeadLetter(
            record=record,
            reason=why.reason,
            code=why.code,
            at_ms=self.ports.clock.now_ms(),
            by_reference=why.reason in BY_REFERENCE,
        )
        return Known(ticket, outcome=lambda _: Destination("dlq", letter))

    def _plain_action(self, job: Job, plan: Plan, request: Request) -> list[Known]:
        """The parcels of actions without embedding, which go from step 2 to step 7."""
        match plan.action:
            case Action.VALIDATE:
                return self._validate(job, plan)
            case Action.DELETE:
                return self._delete(job)
            case _:
                manifest = DocumentManifest(
                    tenant_id=request.tenant_id,
                    collection=request.collection,
                    document_id=request.document_id or "",
                    chunk_ids=request.chunk_ids,
                    vector_spaces=request.vector_spaces,
                    source_version=job.source.version,
                    request_id=job.request_id,
                )
                return [self._whole(job, None, before=[Destination("documents", manifest)])]

    # Step 2

    def _group(self, ticket: Ticket, known: list[Parcel]) -> None:
        """Enter the record into its document's order and place its texts; empty ones fail right here."""
        if not isinstance(ticket, Job) or ticket.plan is None:
            return
        job, plan, request = ticket, ticket.plan, ticket.request
        document = job.document_key
        if plan.operation is None or plan.function is None:
            if document is not None and plan.action is not Action.VALIDATE:
                self.order.enter(document, known)
            return
        identity, first = job.request_id, request.first_chunk_index
        works = job.works = [
            Work(job, chunk_id=chunk.chunk_id, chunk=chunk, item=Item(identity, first + position))
            for position, chunk in enumerate(request.chunks)
        ]
        job.unsent = job.unacked = len(works)
        if document is not None:
            self.order.enter(document, works)
        self.place(job, known)

    def _place(self, work: Work, function: EmbeddingFunction, now: float, known: list[Parcel]) -> None:
        """What this process remembers needs no window; else the work goes into the fold of its cache key."""
        request = work.job.request
        own = None if request.use_cache else work.item
        key = self._keys.present(request.tenant_id, function, work.chunk.text, own)
        found = self.ports.cache.peek(key, function.dimensions)
        if found is None:
            self.batcher.add(work, key, function, now)
        else:
            work.answer(found.entry, found.level, found.level)
            known.append(work)
            self._found_at_once += 1

    # Between 6 and 7

    def _settle(self, folds: Sequence[Fold]) -> list[Parcel]:
        """Outcomes for the works of these; from here on an equal text starts anew and finds the cache."""
        parcels: list[Parcel] = []
        for fold in folds:
            self.batcher.settled(fold)
            if settle(fold):
                parcels += fold.works
                continue
            now = self.ports.clock.monotonic()
            for work in fold.works:
                if work.outcome is not None:
                    parcels.append(work)
                elif work.ticket.live:
                    self._place(work, fold.function, now, parcels)
        self._queued()  # before these wait for their turn: it may be a text queued just now that they wait for
        return parcels

    def _count(self, parcels: Sequence[Parcel]) -> None:
        """Texts by cache level and outcome; and the look-ups that ended as records were admitted, which is all hits."""
        if self._found_at_once:
            self.ports.events.count("cache_lookups", self._found_at_once, {"level": "l1", "result": "hit"})
            self._found_at_once = 0
        tally: dict[tuple[CacheLevel, ErrorCode | None], int] = {}
        for parcel in parcels:
            if isinstance(parcel, Work) and (outcome := parcel.outcome) is not None:
                label = (outcome.level, None if outcome.fault is None else outcome.fault.code)
                tally[label] = tally.get(label, 0) + 1
        for (level, code), texts in tally.items():
            self.ports.events.count("texts", texts, {"cache": level.value, "outcome": code.value if code else "ok"})

    def _observe_window(self, window: Window, took_s: float) -> None:
        self.ports.events.observe("window_seconds", took_s, {})
        self.ports.events.observe("window_texts", sum(len(fold.works) for fold in window.folds), {})

    def _observe_call(self, call: Call, on: Deployment, done: Sequence[Fold], took_s: float) -> None:
        """One rich line a call."""
        self.ports.events.observe("call_texts", len(call.folds), {})
        self.ports.events.call(
            {
                "deployment": on.name,
                "space": call.function.space_name,
                "texts": len(call.folds),
                "tokens": call.tokens,
                "works": sum(len(fold.works) for fold in done),
                "errors": sum(len(fold.works) for fold in done if fold.entry is None),
                "billed_tokens": sum(fold.entry.tokens for fold in done if fold.entry is not None),
                "attempt": call.attempts + 1,
                "took_ms": round(took_s * 1000),
            }
        )

    def _whole(self, job: Job, fault: Fault | None, before: Sequence[Destination] = ()) -> Known:
        """The one outcome of a whole request: refused, or a manifest, which waits for its document."""
        return Known(job, outcome=lambda now: request_result(job, fault, now), before=before)

    def _delete(self, job: Job) -> list[Known]:
        ids = job.request.chunk_ids
        job.unsent = job.unacked = len(ids)

        def deleted(index: int, chunk_id: str) -> Callable[[Instant], Result]:
            return lambda now: plain_result(job, index, chunk_id, Status.OK, now)

        return [
            Known(job, chunk_id=chunk_id, outcome=deleted(index, chunk_id), before=Tombstones(job, chunk_id))
            for index, chunk_id in enumerate(ids)
        ]

    def _validate(self, job: Job, plan: Plan) -> list[Known]:
        """What would happen to each chunk: valid or not, tokens and cost as estimates. Nothing is embedded."""
        request, function = job.request, plan.function
        assert function is not None
        job.unsent = job.unacked = len(request.chunks)

        def validity(index: int, chunk: Chunk) -> Callable[[Instant], Result]:
            return lambda now: self._validity(job, function, index, chunk, now)

        return [Known(job, outcome=validity(index, chunk)) for index, chunk in enumerate(request.chunks)]

    def _validity(self, job: Job, function: EmbeddingFunction, index: int, chunk: Chunk, now: Instant) -> Result:
        model = function.model
        counts, source = self.ports.counter.count([function.prefix + chunk.text], model)
        fault = too_long(counts[0], function) if chunk.text.strip() else EMPTY_TEXT
        kept = min(counts[0], model.max_input_tokens)
        return replace(
            plain_result(job, index, chunk.chunk_id, Status.VALID, now),
            status=Status.INVALID if fault else Status.VALID,
            error=fault,
            chunk_metadata=chunk.metadata,
            provider=self.route.provider_name,
            model=model.name,
            vector_space=function.space_name,
            token_count=kept,
            token_source=source,
            cut_tokens=0 if fault else counts[0] - kept,
            cost_nanos=cost_of(kept, job),
        )

    # Steps 7 and 8

    def _write(self, parcels: Sequence[Parcel]) -> list[list[Destination]]:
        """The messages of each outcome; a request's usage follows its last one (U4)."""
        policy, provider, now = self.policy, self.route.provider_name, Instant.of(self.ports.clock)
        written = []
        for parcel in parcels:
            sent: list[Destination] = []
            if isinstance(parcel, Work):
                sent = messages(chunk_result(parcel, provider, now), policy)
            elif isinstance(parcel, Known):
                outcome = parcel.outcome(now)
                sent = messages(outcome, policy) if isinstance(outcome, Result) else [outcome]
            ticket = parcel.ticket
            ticket.unsent -= 1
            if ticket.unsent == 0 and isinstance(ticket, Job) and counts_as_usage(ticket.request):
                usage = charge(ticket, provider, now)
                if self.spending is not None:
                    self.spending.charged(ticket, usage.billed)
                sent.append(Destination("usage", usage))
            written.append(sent)
        return written

    def _acknowledge(self, parcels: Sequence[Parcel]) -> None:
        self.order.leave(parcels)
        finished = []
        for parcel in parcels:
            ticket = parcel.ticket
            ticket.unacked -= 1
            if ticket.unacked == 0:
                ticket.lease.finish(ticket.source.offset)
                ticket.close()
                finished.append(ticket)
        if self.spending is not None:
            self.spending.finished(ticket for ticket in finished if isinstance(ticket, Job))
        self._finished(finished)


def _portions(misses: list[Fold]) -> list[list[Fold]]:
    """The misses of one tenant together, those of several in pieces: a small one's need not wait for a large one's."""
    tenants = {fold.tenant_id for fold in misses}
    size = MEASURED_TEXTS if len(tenants) > 1 else len(misses)
    return [misses[start : start + size] for start in range(0, len(misses), size or 1)]


def _bytes_in_work(ticket: Ticket, known: Sequence[Parcel]) -> int:
    """What a record becomes: texts, vectors on their way out, outcomes, tombstones. Many, for one of tiny chunks."""
    size_bytes = 0
    if isinstance(ticket, Job) and ticket.plan is not None:
        size_bytes = len(ticket.request.chunks) * (BYTES_IN_WORK + ticket.plan.vector_bytes)
    if known:
        size_bytes += BYTES_IN_WORK * sum(1 + len(parcel.before) for parcel in known if isinstance(parcel, Known))
    return size_bytes
