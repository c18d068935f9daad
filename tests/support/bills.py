"""Usage as a busy month leaves it on its topics: calls shared by many requests, copies, and charges that come late.

What the totals must be is computed here too, from the log alone and by another reader than the aggregator's.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from processor.adapters.murmur2 import partition_of
from processor.domain import Amounts, CallItem, CallKind, CallOutcome, Operation, Part, Usage
from processor.ports import Destination
from tests.support.builders import a_call, a_request, a_usage
from tests.support.codec import CODEC

DAY_MS = 86_400_000
HORIZON_MS = 35 * DAY_MS
PAYERS = 300
REQUESTS_A_CALL = 50
MODELS = ("text-embedding-3-small", "text-embedding-3-large")
OPERATIONS = (Operation.DOCUMENT, Operation.BATCH, Operation.QUERY)
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
