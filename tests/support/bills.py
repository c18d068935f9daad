"""Usage as a busy month leaves it on its topics: calls shared by many requests, copies, and charges that come late.

What the totals must be is computed here too, from the log alone and by another reader than the aggregator's.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder

from processor.accounts import BucketKey, UsageSums
from processor.adapters import topics
from processor.adapters.murmur2 import partition_of
from processor.domain import Amounts, CallItem, CallKind, CallOutcome, Operation, Part, Usage
from processor.ports import Destination
from processor.settings import Settings
from tests.support.builders import a_call, a_request, a_usage
from tests.support.codec import CODEC

DAY_MS = 86_400_000
HORIZON_MS = 35 * DAY_MS
PAYERS = 300
REQUESTS_A_CALL = 50
MODELS = ("text-embedding-3-small", "text-embedding-3-large")
OPERATIONS = (Operation.DOCUMENT, Operation.BATCH, Operation.QUERY)
FIELD_OF = {"agent": "agent_id", "collection": "collection"}
COPIED = 0.05
REWORKED = 0.2
"""Of the copies: as another attempt has it, whose bill nobody pays."""
LATE = 0.01
COPIED_WITHIN = 2_000
"""A copy follows its charge after at most so many others."""


class Bill(NamedTuple):
    """A record to produce: `topic` is its id in topics.yaml."""

    topic: str
    partition: int
    key: bytes
    value: bytes


class Comparison(NamedTuple):
    """Requests that are in the totals twice, or not at all, and buckets with any sum that is not as recounted."""

    double_counted: int
    missed: int
    different_buckets: int


def some_bills(events: int, *, partitions: int, now_ms: int, seed: int = 6) -> Iterator[Bill]:
    """So many usage events of three dimensions (all, model, operation), with the calls that they were paid by.

    A call's intent and receipt come before its charges. COPIED of the events are copies, LATE were charged before the
    horizon.
    """
    dice = random.Random(seed)
    drafts = []
    for payer in range(PAYERS):
        request = a_request(["text"], tenant_id=f"tenant-{payer:03}", correlation_id=f"corr-{payer}", collection=None)
        drafts.append(a_usage(request, model=MODELS[payer % 2]))
    places = [partition_of(draft.payer_id.encode(), partitions) for draft in drafts]
    sent: deque[tuple[int, Bill, str, int]] = deque(maxlen=COPIED_WITHIN)
    made = 0
    while made < events:
        attempt = _random_id(dice)
        items: list[CallItem] = []
        charges: list[Bill] = []
        for _ in range(min(REQUESTS_A_CALL, events - made)):
            if sent and dice.random() < COPIED:
                payer, bill, request_id, tokens = dice.choice(sent)
                if dice.random() < REWORKED:
                    rework = _random_id(dice)
                    yield from _call(rework, [CallItem(request_id, 0, drafts[payer].payer_id, tokens + 1)], partitions)
                    bill = _charge(drafts[payer], places[payer], request_id, tokens + 1, rework)
                charges.append(bill)
                continue
            payer, request_id, tokens = dice.randrange(PAYERS), _random_id(dice), dice.randint(1, 4_000)
            draft = drafts[payer]
            draft.operation = dice.choice(OPERATIONS)
            draft.charged_at_ms = now_ms - (dice.randint(36, 60) * DAY_MS if dice.random() < LATE else 0)
            charges.append(_charge(draft, places[payer], request_id, tokens, attempt))
            items.append(CallItem(request_id, 0, draft.payer_id, tokens))
            sent.append((payer, charges[-1], request_id, tokens))
        yield from _call(attempt, items, partitions)
        yield from charges
        made += len(charges)


def _random_id(dice: random.Random) -> str:
    return str(uuid.UUID(int=dice.getrandbits(128), version=4))


def _charge(draft: Usage, partition: int, request_id: str, tokens: int, attempt: str) -> Bill:
    draft.request_id = request_id
    draft.billed = Amounts(1, tokens, 4 * tokens, 20 * tokens)
    draft.parts = (Part(attempt, tokens),)
    value = CODEC.encode(Destination("usage", draft)).value
    assert value is not None
    return Bill("usage", partition, draft.payer_id.encode(), value)


def _call(attempt: str, items: Sequence[CallItem], partitions: int) -> Iterator[Bill]:
    """Intent and receipt: the provider bills what was counted."""
    tokens = sum(item.local_tokens for item in items)
    price = 20_000_000
    for call in (
        a_call(attempt_id=attempt, items=items, estimated_tokens=tokens, price_nanos_per_million=price),
        a_call(
            CallKind.RECEIPT,
            attempt_id=attempt,
            items=(),
            outcome=CallOutcome.OK,
            billed_tokens=tokens,
            price_nanos_per_million=price,
        ),
    ):
        key, value, _ = CODEC.encode(Destination("calls", call))
        assert key is not None
        assert value is not None
        yield Bill("calls", partition_of(key, partitions), key, value)


async def produce_bills(producer: AIOKafkaProducer, settings: Settings, bills: Iterable[Bill]) -> None:
    """Append in order to each partition, in batches of our own; returns once all are acknowledged."""
    names = {id_: settings.topic(topic.name) for id_, topic in topics.topics().items()}
    batches: dict[tuple[str, int], BatchBuilder] = {}
    deliveries = []
    for topic, partition, key, value in bills:
        batch = batches.get((topic, partition))
        if batch is None or batch.append(key=key, value=value, timestamp=None) is None:
            if batch is not None:
                batch.close()
                deliveries.append(await producer.send_batch(batch, names[topic], partition=partition))
            batch = batches[topic, partition] = producer.create_batch()
            batch.append(key=key, value=value, timestamp=None)
    for (topic, partition), batch in batches.items():
        batch.close()
        deliveries.append(await producer.send_batch(batch, names[topic], partition=partition))
    await asyncio.gather(*deliveries)


class Recount:
    """Totals of usage events once more, without anything of the aggregator: a set of keys, and sums.

    Events of a partition are taken in offset order, as plain fields of TokenUsage. `late` are charges that are in no
    total.
    """

    def __init__(self, horizon_ms: int = HORIZON_MS) -> None:
        self._horizon_ms = horizon_ms
        self._seen: set[tuple[int, str]] = set()
        self.totals: defaultdict[BucketKey, Counter[str]] = defaultdict(Counter)
        self.late = 0

    def take(self, partition: int, append_ms: int, event: Mapping[str, Any]) -> None:
        name = (partition, event["idempotency_key"])
        if name in self._seen:
            return
        self._seen.add(name)
        if append_ms - event["charged_at_ms"] > self._horizon_ms:
            self.late += 1
            return
        day = datetime.fromtimestamp(event["charged_at_ms"] / 1000, UTC).date().isoformat()
        billed, saved = event["billed"], event["saved"]
        sums = {"requests": 1, "failed_texts": event["failed_texts"], "cached_texts": event["cached_texts"]}
        for side, amounts in (("billed", billed), ("saved", saved)):
            sums |= {f"{side}_{name}": amounts[name] or 0 for name in ("texts", "tokens", "characters", "cost_nanos")}
        sums["unpriced_tokens"] = billed["tokens"] if billed["cost_nanos"] is None else 0
        named = {"all": "", "model": event["model"], "operation": event["operation"]}
        named |= {name: value for name in ("agent", "collection") if (value := event[FIELD_OF[name]]) is not None}
        for dimension, value in named.items():
            for bucket in (day, day[:7]):
                self.totals[BucketKey(event["payer_id"], bucket, dimension, value)].update(sums)

    def compare(self, published: Mapping[BucketKey, UsageSums]) -> Comparison:
        """Requests that months of all dimensions count too often and too rarely, and buckets that differ at all."""
        double = missed = 0
        expected = {key: UsageSums(**sums) for key, sums in self.totals.items()}
        for key in expected.keys() | published.keys():
            if key.dimension == "all" and len(key.bucket) == len("2026-11"):
                more = published.get(key, UsageSums()).requests - expected.get(key, UsageSums()).requests
                double, missed = double + max(more, 0), missed + max(-more, 0)
        different = sum(published.get(key) != expected.get(key) for key in expected.keys() | published.keys())
        return Comparison(double, missed, different)
