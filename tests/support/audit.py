"""The checker: what the topics and the provider's own books say, held against the laws.

It shares no code with the processor but the codec: outcomes, charges, bills and totals are computed here again, from
the records alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np

from processor.accounts import BucketKey, UsageTotal
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.adapters.topics import topics
from processor.domain import CallKind, CallOutcome, ProviderCall, ReceivedResult, Record, Request, Usage
from processor.identity import request_id
from processor.ports import Undecodable
from processor.settings import Settings

T = TypeVar("T")

EMBEDDING = {
    "generate",
    "batch_process",
    "generate_query",
    "embedding.generate",
    "embedding.generate_query",
    "embedding.batch_process",
    "embedding.batch.process",
}


@dataclass(slots=True)
class Books:
    """Everything that was written, in log order per partition."""

    requests: list[tuple[Record, Request]] = field(default_factory=list)
    results: list[tuple[Record, ReceivedResult]] = field(default_factory=list)
    usage: list[tuple[Record, Usage]] = field(default_factory=list)
    calls: list[tuple[Record, ProviderCall]] = field(default_factory=list)
    totals: dict[BucketKey, UsageTotal] = field(default_factory=dict)
    bills: list[Mapping[str, Any]] = field(default_factory=list)

    def charges(self) -> dict[str, tuple[Record, Usage]]:
        """The first copy of each usage event: the charge (U5)."""
        first: dict[str, tuple[Record, Usage]] = {}
        for record, usage in sorted(self.usage, key=lambda pair: pair[0].source[1:3]):
            first.setdefault(usage.request_id, (record, usage))
        return first

    def accepted(self) -> dict[str, Request]:
        """Requests of embedding actions by request id; the same request sent again is one."""
        return {request_id(request): request for _, request in self.requests if request.action in EMBEDDING}


async def read_topic(settings: Settings, name: str, kind: type[T]) -> AsyncIterator[tuple[Record, T]]:
    """Every record of a topic as of now, in log order per partition. What can't be decoded fails the audit."""
    codec = Codec.from_settings(settings)
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    async with aclosing(reader.read(settings.topic(topics()[name].name))) as fetched:
        async for records in fetched:
            for record in records:
                if record.value is not None:
                    message = await codec.read(kind, record.value)
                    assert not isinstance(message, Undecodable), (name, record, message)
                    yield record, message


async def read_books(settings: Settings, bills: Sequence[Mapping[str, Any]], source: str = "requests") -> Books:
    """Read every topic from its beginning to its end."""
    books = Books(
        requests=[pair async for pair in read_topic(settings, source, Request)],
        results=[pair async for pair in read_topic(settings, "results", ReceivedResult)],
        usage=[pair async for pair in read_topic(settings, "usage", Usage)],
        calls=[pair async for pair in read_topic(settings, "calls", ProviderCall)],
        bills=list(bills),
    )
    async for _, total in read_topic(settings, "totals", UsageTotal):
        books.totals[total.key] = total
    return books


@dataclass(slots=True)
class Residuals:
    """Tokens billed to nobody by class (U6), and the attempts that charges or intents name without a receipt."""

    attributed: int = 0
    waste: int = 0
    rework: int = 0
    unclaimed: int = 0
    unconfirmed: int = 0
    recovered_attempts: int = 0
    billed: int = 0

    @property
    def total(self) -> int:
        return self.waste + self.rework + self.unclaimed + self.unconfirmed


def check_outcomes(
    books: Books,
    *,
    vector_of: Callable[[str, int], np.ndarray[Any, Any]],
    dimensions: int,
    refused: Mapping[str, str] | None = None,
) -> int:
    """Laws 1 and 6: one outcome per accepted chunk, none invented, copies agree, each vector is its own text's.

    A text that holds a marker of `refused` must have ended as an error of that code, and no other text as any.
    Returns how many records were copies beyond the first.
    """
    accepted = books.accepted()
    outcomes: dict[tuple[str, int], ReceivedResult] = {}
    copies = 0
    for _, result in books.results:
        request = accepted.get(result.request_id)
        assert request is not None, f"a result for nobody: {result.request_id}"
        assert 0 <= result.chunk_index < len(request.chunks), "a chunk that was never sent"
        chunk = request.chunks[result.chunk_index]
        assert (result.tenant_id, result.correlation_id) == (request.tenant_id, request.correlation_id)
        assert result.chunk_id == chunk.chunk_id
        assert dict(result.metadata) == dict(request.metadata)
        codes = [code for marker, code in (refused or {}).items() if marker in chunk.text]
        if codes:
            assert result.status == "error", result.status
            assert [result.error and result.error.code] == codes
        else:
            assert result.status == "ok", (result.status, result.error)
            assert result.vector is not None
            assert result.vector.shape == (dimensions,)
            assert np.isfinite(result.vector).all()
            cosine = float(result.vector @ vector_of(chunk.text, dimensions) / np.linalg.norm(result.vector))
            assert cosine > 0.99, f"the vector of another text: cosine {cosine:.3f}"
        place = (result.request_id, result.chunk_index)
        copies += place in outcomes
        first = outcomes.setdefault(place, result)
        assert first.vector_id == result.vector_id
    missing = {(name, i) for name, request in accepted.items() for i in range(len(request.chunks))} - set(outcomes)
    assert not missing, f"{len(missing)} chunks without outcome, e.g. {sorted(missing)[:3]}"
    return copies


def check_charges(books: Books) -> None:
    """U4, U5, law 4: each accepted request is charged exactly once, to its payer, and the parts add up."""
    charges = books.charges()
    accepted = books.accepted()
    assert set(charges) == set(accepted), (
        f"{len(set(accepted) - set(charges))} requests without charge, {len(set(charges) - set(accepted))} invented"
    )
    for name, (_, usage) in charges.items():
        request = accepted[name]
        assert usage.payer_id == (request.agent_owner_id or request.tenant_id)
        assert sum(part.tokens for part in usage.parts) == usage.billed.tokens
        assert usage.billed.texts + usage.saved.texts + usage.failed_texts == len(request.chunks)
        if not request.use_cache:
            assert usage.saved.texts == 0, "an item that refuses the cache was given somebody else's vector"


def check_attempts(books: Books) -> Residuals:
    """U6 and law 3 per attempt against the provider's own bill: bill = attributed + residual, nothing negative."""
    intents = {call.attempt_id: call for _, call in books.calls if call.kind is CallKind.INTENT}
    receipts = {call.attempt_id: call for _, call in books.calls if call.kind is CallKind.RECEIPT}
    billed: Counter[str] = Counter()
    for bill in books.bills:
        assert bill["attempt_id"] in intents, "a call without an intent before it"
        billed[bill["attempt_id"]] += bill["tokens"] if bill["billed"] else 0
    charges = {name: usage for name, (_, usage) in books.charges().items()}
    parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, usage in charges.items():
        for part in usage.parts:
            parts[part.attempt_id][name] += part.tokens
    residuals = Residuals(billed=sum(billed.values()))
    for attempt_id, intent in intents.items():
        attributed = sum(parts[attempt_id].values())
        residual = billed[attempt_id] - attributed
        assert residual >= 0, f"attempt {attempt_id} billed {billed[attempt_id]}, attributed {attributed}"
        leaders = {item.request_id for item in intent.items}
        assert set(parts[attempt_id]) <= leaders, "a charge names an attempt that did not embed its text"
        residuals.attributed += attributed
        receipt = receipts.get(attempt_id)
        if receipt is None:
            residuals.recovered_attempts += attributed > 0
            residuals.unconfirmed += residual
        elif receipt.outcome is CallOutcome.INVALID:
            residuals.waste += residual
        elif residual and all(leader in charges for leader in leaders):
            residuals.rework += residual
        else:
            residuals.unclaimed += residual
        if receipt is not None:
            assert receipt.billed_tokens == billed[attempt_id], "a receipt that is not the provider's bill"
    assert not set(parts) - set(intents), "a charge names an attempt that nobody intended"
    assert residuals.billed == residuals.attributed + residuals.total
    return residuals


def check_totals(books: Books) -> None:
    """Law 5: published totals are those of a recomputation with a set, first copy wins."""
    expected: defaultdict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)
    for _, usage in books.charges().values():
        at = datetime.fromtimestamp(usage.charged_at_ms / 1000, UTC)
        for bucket in (f"{at:%Y-%m-%d}", f"{at:%Y-%m}"):
            for dimension, value in (("all", ""), ("model", usage.model), ("operation", str(usage.operation))):
                sums = expected[usage.payer_id, bucket, dimension, value]
                sums["requests"] += 1
                sums["billed_tokens"] += usage.billed.tokens
                sums["saved_tokens"] += usage.saved.tokens
                sums["failed_texts"] += usage.failed_texts
                sums["billed_cost_nanos"] += usage.billed.cost_nanos or 0
    for (payer, bucket, dimension, value), sums in expected.items():
        matching = [
            total
            for key, total in books.totals.items()
            if (key.payer_id, key.bucket, key.dimension) == (payer, bucket, dimension)
            and (dimension == "all" or key.value == value)
        ]
        assert len(matching) == 1, (payer, bucket, dimension, value, len(matching))
        for name, amount in sums.items():
            published = sum(getattr(part, name) for _, part in matching[0].partitions.values())
            assert published == amount, (payer, bucket, dimension, value, name, published, amount)


def totals_cover(books: Books) -> bool:
    """Whether the published monthly totals count every charge (used as a condition to wait for)."""
    counted = sum(
        sums.requests
        for key, total in books.totals.items()
        if key.dimension == "all" and len(key.bucket) == len("2026-11")
        for _, sums in total.partitions.values()
    )
    return counted >= len(books.charges())
