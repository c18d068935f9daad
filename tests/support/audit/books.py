"""Everything that was written, read back from the topics or put together by a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from processor.accounts import BucketKey, UsageTotal
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.adapters.topics import topics
from processor.domain import ProviderCall, ReceivedResult, Record, Request, Usage
from processor.identity import request_id
from processor.ports import Undecodable
from processor.settings import Settings

T = TypeVar("T")

EMBEDDING = {
    "generate": "document",
    "batch_process": "batch",
    "generate_query": "query",
    "embedding.generate": "document",
    "embedding.generate_query": "query",
    "embedding.batch_process": "batch",
    "embedding.batch.process": "batch",
}
"""The operation of each action."""
HORIZON_MS = 35 * 86_400_000


class Charge(NamedTuple):
    """The first copy of a usage event (U5). A late one is quarantined: it is in no total."""

    record: Record
    usage: Usage
    late: bool


@dataclass(slots=True)
class Books:
    """Everything that was written, in log order per partition, and what the provider says it billed.

    A bill is `{"attempt_id": ..., "tokens": ..., "billed": ...}`, one a call. `key_of` is what copies of a usage event
    are known by.
    """

    requests: list[tuple[Record, Request]] = field(default_factory=list)
    results: list[tuple[Record, ReceivedResult]] = field(default_factory=list)
    usage: list[tuple[Record, Usage]] = field(default_factory=list)
    calls: list[tuple[Record, ProviderCall]] = field(default_factory=list)
    totals: dict[BucketKey, UsageTotal] = field(default_factory=dict)
    bills: list[Mapping[str, Any]] = field(default_factory=list)
    horizon_ms: int = HORIZON_MS
    key_of: Callable[[Usage], str] = lambda usage: usage.idempotency_key
    shared_cache: bool = False
    """Whether a text may be answered with what another tenant paid for."""

    def charges(self) -> list[Charge]:
        """Of each key in its partition the first copy, and the first after a pause of more than twice the horizon."""
        return self._first_copies(self.key_of)

    def due(self) -> Counter[tuple[str, bool]]:
        """How often each request is to be charged, and how often refused, by its id."""
        first = self._first_copies(lambda usage: f"{usage.request_id} {refuses(usage)}")
        return Counter((charge.usage.request_id, refuses(charge.usage)) for charge in first)

    def accepted(self) -> dict[str, Request]:
        """Requests of embedding actions by request id; the same request sent again is one."""
        return {request_id(request): request for _, request in self.requests if request.action in EMBEDDING}

    def _first_copies(self, key_of: Callable[[Usage], str]) -> list[Charge]:
        last_ms: dict[tuple[int, str], int] = {}
        first = []
        for record, usage in sorted(self.usage, key=lambda pair: pair[0].source[1:3]):
            append_ms = record.source.append_ms
            key = (record.source.partition, key_of(usage))
            if key not in last_ms or append_ms - last_ms[key] > 2 * self.horizon_ms:
                first.append(Charge(record, usage, append_ms - usage.charged_at_ms > self.horizon_ms))
            last_ms[key] = max(append_ms, last_ms.get(key, append_ms))
        return first


def refuses(usage: Usage) -> bool:
    """Whether it bills nothing and has texts that failed: it is no charge, and one may stand beside it."""
    return usage.billed.texts == 0 and usage.failed_texts > 0


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
