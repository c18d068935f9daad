"""`usage explain`: the life and price of one request, read from the topics. Ids, counts and money; never a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from processor.adapters.avro import Codec
from processor.adapters.avro_usage import YEAR_10000_MS
from processor.adapters.reader import KafkaReader
from processor.adapters.topics import topics
from processor.aggregate import DAY_MS
from processor.audit import FirstCopies
from processor.cli.console import money
from processor.domain import (
    ACTION_ALIASES,
    EMBEDDING_ACTIONS,
    CallKind,
    ProviderCall,
    ReceivedResult,
    Record,
    Request,
    Source,
    Usage,
)
from processor.identity import request_id
from processor.ports import RecordReader, TopicReader, Undecodable
from processor.settings import Settings

SOURCES = ("requests", "queries")
SCANNED = (*SOURCES, "results", "usage", "calls", "dlq")
LAST_MS = YEAR_10000_MS - 1_000
DLQ_HEADERS = ("error_class", "error_code", "source_topic", "source_partition", "source_offset", "failed_at_ms")


@dataclass(slots=True, kw_only=True)
class Charge:
    """A first copy of the usage event. `copies` counts those after it; `in_totals`: the aggregator has folded it.

    `totalled`: its token type is; those of other services may not be.
    """

    source: Source
    usage: Usage
    late: bool
    totalled: bool
    in_totals: bool
    copies: int = 0

    def fields(self) -> dict[str, Any]:
        usage = self.usage
        return {
            **_place(self.source),
            "payer_id": usage.payer_id,
            "operation": usage.operation,
            "model": usage.model,
            "provider": usage.provider,
            "token_source": usage.token_source,
            "texts": usage.texts,
            "failed_texts": usage.failed_texts,
            "cached_texts": usage.cached_texts,
            "billed": asdict(usage.billed),
            "saved": asdict(usage.saved),
            "price_nanos_per_million": usage.price_nanos_per_million,
            "price_version": usage.price_version,
            "charged_at_ms": usage.charged_at_ms,
            "parts": [part._asdict() for part in usage.parts],
            "refusal": usage.is_refusal,
            "token_type": usage.token_type,
            "totalled": self.totalled,
            "late": self.late,
            "in_totals": self.in_totals,
            "copies": self.copies,
        }


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A call that was made for texts of this request: `items` of them, of `local_tokens`. No `outcome`: no receipt."""

    attempt_id: str
    provider: str
    worker_id: str
    at_ms: int
    items: int = 0
    local_tokens: int = 0
    estimated_tokens: int = 0
    outcome: str | None = None
    billed_tokens: int | None = None
    http_status: int | None = None
    time_taken_ms: int = 0
    charged_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Life:
    """What the topics hold of one request. `outcomes`: first copies by status, and cache level or error code."""

    request_id: str
    tenant_id: str
    correlation_id: str
    action: str = ""
    chunks: int = 0
    records: list[Source] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    result_copies: int = 0
    charges: list[Charge] = field(default_factory=list)
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "tenant_id": self.tenant_id,
            "correlation_id": self.correlation_id,
            "action": self.action,
            "chunks": self.chunks,
            "records": [_place(source) for source in self.records],
            "outcomes": [
                {"status": status, "of": of, "chunks": count} for (status, of), count in sorted(self.outcomes.items())
            ],
            "result_copies": self.result_copies,
            "charges": [charge.fields() for charge in self.charges],
            "attempts": [asdict(attempt) for attempt in self.attempts.values()],
        }


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter of one of the records, or whose bytes hold the correlation id."""

    source: Source
    headers: Mapping[str, str]

    def fields(self) -> dict[str, Any]:
        return {"dead_letter": _place(self.source), **self.headers}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One life for each request id of that correlation id."""

    lives: list[Life]
    dead_letters: list[DeadLetter]

    def __bool__(self) -> bool:
        return bool(self.lives or self.dead_letters)


async def explain(
    settings: Settings, correlation_id: str, *, tenant_id: str | None = None, since_ms: int | None = None
) -> Explanation:
    """Scan the topics for it, from records appended at `since_ms` on. Raises BrokerUnavailable or TopicsError."""
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    begins: dict[str, Mapping[int, int]] = {}
    if since_ms is not None:
        for name in SCANNED:
            begins[name] = await reader.offsets_at(settings.topic(topics()[name].name), since_ms)
    codec = Codec.from_settings(settings)
    try:
        return await Scan(settings, reader, codec, correlation_id, tenant_id, begins).run()
    finally:
        await codec.close()


class Scan:
    """One pass over each topic from these offsets on; what can't be of this request is not decoded."""

    def __init__(
        self,
        settings: Settings,
        reader: TopicReader,
        decoder: RecordReader,
        correlation_id: str,
        tenant_id: str | None,
        begins: Mapping[str, Mapping[int, int]],
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._decoder = decoder
        self._correlation_id = correlation_id
        self._mark = correlation_id.encode()
        self._tenant_id = tenant_id
        self._begins = begins
        self._lives: dict[str, Life] = {}

    async def run(self) -> Explanation:
        for name in SOURCES:
            await self._requests(name)
        await self._results()
        await self._usage()
        await self._calls()
        dead_letters = [letter async for letter in self._dead_letters()]
        return Explanation([self._lives[name] for name in sorted(self._lives)], dead_letters)

    async def _requests(self, name: str) -> None:
        async for record in self._records(name):
            if record.value is None or self._mark not in record.value:
                continue
            request = await self._decoder.read(Request, record.value)
            if not isinstance(request, Undecodable) and self._wanted(request.correlation_id, request.tenant_id):
                life = self._life(request_id(request), request.tenant_id)
                life.action, life.chunks = request.action, request.length
                life.records.append(record.source)

    async def _results(self) -> None:
        seen: set[tuple[str, int, int]] = set()
        async for record in self._records("results"):
            if record.key != self._mark:
                continue
            result = await self._decoder.read(ReceivedResult, record.value)
            if isinstance(result, Undecodable) or not self._wanted(result.correlation_id, result.tenant_id):
                continue
            life = self._life(result.request_id, result.tenant_id)
            life.action = life.action or result.action
            outcome = (result.request_id, result.chunk_index, result.first_chunk_index)
            if outcome in seen:
                life.result_copies += 1
                continue
            seen.add(outcome)
            of = result.error.code if result.error is not None else result.cache
            life.outcomes[str(result.status), str(of)] += result.length

    async def _usage(self) -> None:
        horizon_ms = self._settings.horizon_days * DAY_MS
        committed = await self._reader.committed(self._topic("usage"))
        first = FirstCopies(horizon_ms)
        newest: dict[str, Charge] = {}
        async for record in self._records("usage"):
            if record.value is None or self._mark not in record.value:
                continue
            usage = await self._decoder.read(Usage, record.value)
            if isinstance(usage, Undecodable):
                continue
            if not self._wanted(usage.request.correlation_id, usage.request.tenant_id):
                continue
            life, source = self._life(usage.request_id, usage.request.tenant_id), record.source
            life.action = life.action or usage.request.action
            life.chunks = life.chunks or usage.texts
            key = usage.idempotency_key
            if not first.take(source.partition, key, source.append_ms):
                newest[key].copies += 1
                continue
            late = source.append_ms - usage.charged_at_ms > horizon_ms
            folded = source.offset < committed.get(source.partition, 0)
            totalled = bool({usage.token_type, "*"} & set(self._settings.usage_token_types))
            in_totals = folded and totalled and not late
            newest[key] = Charge(source=source, usage=usage, late=late, totalled=totalled, in_totals=in_totals)
            life.charges.append(newest[key])

    async def _calls(self) -> None:
        """Attempts of charges, and those whose intents list items of a request: they may be charged to nobody."""
        charged = [
            (life, part) for life in self._lives.values() for charge in life.charges for part in charge.usage.parts
        ]
        marks = [name.encode() for name in self._lives]
        known = {part.attempt_id for _, part in charged}
        async for record in self._records("calls"):
            name = (record.key or b"").decode(errors="replace")
            if record.value is None or (name not in known and not any(mark in record.value for mark in marks)):
                continue
            call = await self._decoder.read(ProviderCall, record.value)
            if isinstance(call, Undecodable):
                continue
            known.add(call.attempt_id)
            for life in self._lives.values():
                of_life = [item for item in call.items if item.request_id == life.request_id]
                if of_life:
                    self._take_intent(life, call, len(of_life), sum(item.local_tokens for item in of_life))
                attempt = life.attempts.get(call.attempt_id)
                if call.kind is CallKind.RECEIPT and attempt is not None and attempt.outcome is None:
                    attempt.outcome, attempt.billed_tokens = str(call.outcome), call.billed_tokens
                    attempt.http_status, attempt.time_taken_ms = call.http_status, call.time_taken_ms
        for life, part in charged:
            if part.attempt_id in life.attempts:
                life.attempts[part.attempt_id].charged_tokens += part.tokens

    def _take_intent(self, life: Life, call: ProviderCall, items: int, local_tokens: int) -> None:
        life.attempts.setdefault(
            call.attempt_id,
            Attempt(
                attempt_id=call.attempt_id,
                provider=call.provider,
                worker_id=call.worker_id,
                at_ms=call.at_ms,
                items=items,
                local_tokens=local_tokens,
                estimated_tokens=call.estimated_tokens,
            ),
        )

    async def _dead_letters(self) -> AsyncIterator[DeadLetter]:
        places = {source[:3] for life in self._lives.values() for source in life.records}
        async for record in self._records("dlq"):
            headers = {name: value.decode(errors="replace") for name, value in record.headers if name in DLQ_HEADERS}
            partition, offset = headers.get("source_partition", ""), headers.get("source_offset", "")
            place = (headers.get("source_topic"), partition, offset)
            named = place in {(topic, str(partition), str(offset)) for topic, partition, offset in places}
            if named or (self._tenant_id is None and self._mark in (record.value or b"")):
                yield DeadLetter(record.source, headers)

    # --- shared -------------------------------------------------------------------------------------------

    def _wanted(self, correlation_id: str, tenant_id: str) -> bool:
        return correlation_id == self._correlation_id and self._tenant_id in (None, tenant_id)

    def _life(self, name: str, tenant_id: str) -> Life:
        if name not in self._lives:
            self._lives[name] = Life(request_id=name, tenant_id=tenant_id, correlation_id=self._correlation_id)
        return self._lives[name]

    def _topic(self, name: str) -> str:
        return self._settings.topic(topics()[name].name)

    async def _records(self, name: str) -> AsyncIterator[Record]:
        async with aclosing(self._reader.read(self._topic(name), self._begins.get(name))) as fetched:
            async for records in fetched:
                for record in records:
                    yield record


def _place(source: Source) -> dict[str, Any]:
    return dict(source._asdict())


def sentences(explanation: Explanation) -> Iterator[str]:
    """All of it for people."""
    for life in explanation.lives:
        yield f"request {life.request_id} of {life.tenant_id}: {life.action}, {life.chunks} chunks"
        for source in life.records:
            yield f"  sent        {_where(source)}"
        for (status, of), count in sorted(life.outcomes.items()):
            yield f"  outcome     {count} {status} ({of})"
        if life.result_copies:
            yield f"              and {life.result_copies} copies of results"
        for charge in life.charges:
            yield from _charge_sentences(charge)
        if not life.charges:
            embeds = ACTION_ALIASES.get(life.action) in EMBEDDING_ACTIONS
            yield f"  charge      none{' yet' if embeds else ': the action embeds nothing'}"
        for attempt in life.attempts.values():
            yield f"  attempt     {_attempt_sentence(attempt)}"
    for letter in explanation.dead_letters:
        headers = letter.headers
        what = f"{headers.get('error_class', '?')} ({headers.get('error_code', '?')})"
        of = ":".join(headers.get(f"source_{name}", "?") for name in ("topic", "partition", "offset"))
        yield f"dead letter   {what} of {of}, at {_where(letter.source)}"


def _charge_sentences(charge: Charge) -> Iterator[str]:
    usage = charge.usage
    price = usage.price_nanos_per_million
    priced = "unpriced" if price is None else f"{money(price)} per 1,000,000, price list {usage.price_version}"
    state = "late: in no total" if charge.late else "in the totals" if charge.in_totals else "not in the totals yet"
    if not charge.totalled:
        state = f"in no total: {usage.token_type} tokens are another service's"
    kind = "refusal" if usage.is_refusal else "charge"
    yield f"  {kind:<12}{_where(charge.source)}, {state}; {charge.copies} copies after it"
    yield (
        f"    billed    {usage.billed.tokens:,} tokens of {usage.billed.texts} texts, {_cost(usage.billed.cost_nanos)} "
        f"({priced}) to {usage.payer_id}, as {usage.operation} of {usage.model or 'no model'}"
    )
    yield (
        f"    saved     {usage.saved.tokens:,} tokens of {usage.saved.texts} texts, {_cost(usage.saved.cost_nanos)}; "
        f"{usage.failed_texts} texts failed"
    )
    for part in usage.parts:
        yield f"    part      {part.tokens:,} tokens of attempt {part.attempt_id}"


def _attempt_sentence(attempt: Attempt) -> str:
    if attempt.outcome is None:
        end = f"no receipt: billed 0 to {attempt.estimated_tokens:,}"
    else:
        status = "" if attempt.http_status is None else f", HTTP {attempt.http_status}"
        end = f"{attempt.outcome}{status}, billed {attempt.billed_tokens or 0:,} in {attempt.time_taken_ms:,} ms"
    return (
        f"{attempt.attempt_id} at {_time(attempt.at_ms)} by {attempt.provider}: {attempt.items} texts of this request, "
        f"{attempt.charged_tokens:,} tokens charged to it; the whole call: {end}"
    )


def _cost(nanos: int | None) -> str:
    return "unpriced" if nanos is None else money(nanos)


def _where(source: Source) -> str:
    return f"{source.topic}:{source.partition}:{source.offset} at {_time(source.append_ms)}"


def _time(ms: int) -> str:
    """A dead letter has the time that its writer said, which may be none of a calendar."""
    at = datetime.fromtimestamp(min(max(ms, 0), LAST_MS) / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
