"""Calls, receipts and charges for a log in memory, and what the audit makes of them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from processor.audit import Audit
from processor.cli.audit import read_books
from processor.domain import Amounts, CallItem, CallKind, CallOutcome, Part, Request
from processor.findings import Breach, LedgerCheck
from processor.identity import request_id
from processor.ports import Destination
from tests.support import audit
from tests.support.aggregation import (
    HORIZON_MS,
    TOPICS,
    MemoryLog,
)
from tests.support.builders import a_call, a_request, a_usage

EMBEDDING = frozenset({"embedding"})


async def audited(log: MemoryLog, **options: Any) -> Audit:
    """The finished audit of a log as it stands."""
    wanted: dict[str, Any] = {"horizon_ms": HORIZON_MS, "now_ms": log.now_ms, "token_types": EMBEDDING}
    books, unread, _ = await read_books(log, log.codec, TOPICS, **wanted | options)
    assert unread == []
    return books


def unexplained(books: Audit) -> list[object]:
    """Every breach and every difference."""
    breaches = [each for each in books.ledger.findings if isinstance(each.kind, Breach)]
    return [
        *breaches,
        *books.totals().differences,
        *books.tasks().differences,
        *books.budgets().differences,
    ]


ONE, TWO, THREE = (a_request(correlation_id=name) for name in ("one", "two", "three"))
PRICE = 20_000_000


def call(log: MemoryLog, attempt_id: str, *shares: tuple[Request, int], **intent: Any) -> None:
    """An intent of one item per request."""
    items = tuple(CallItem(request_id(request), 0, "acme", tokens) for request, tokens in shares)
    fields: dict[str, Any] = {
        "attempt_id": attempt_id,
        "items": items,
        "estimated_tokens": sum(tokens for _, tokens in shares),
        "confirm_by_ms": log.now_ms + 60_000,
        "price_nanos_per_million": PRICE,
    }
    log.append(Destination("calls", a_call(**fields | intent)))


def receive(log: MemoryLog, attempt_id: str, billed: int, outcome: CallOutcome = CallOutcome.OK) -> None:
    """Its receipt."""
    receipt = a_call(
        CallKind.RECEIPT,
        attempt_id=attempt_id,
        outcome=outcome,
        billed_tokens=billed,
        price_nanos_per_million=PRICE,
        items=(),
    )
    log.append(Destination("calls", receipt))


def charge(log: MemoryLog, request: Request, *parts: tuple[str, int], **overrides: Any) -> None:
    tokens = sum(tokens for _, tokens in parts)
    fields: dict[str, Any] = {
        "billed": Amounts(1, tokens, 5, 20 * tokens),
        "parts": tuple(Part(*part) for part in parts),
        "charged_at_ms": log.now_ms,
    }
    log.append(Destination("usage", a_usage(request, **fields | overrides)))


async def a_ledger(log: MemoryLog, **options: Any) -> tuple[LedgerCheck, dict[str, int]]:
    """The ledger, and the tokens of each class that is not empty."""
    ledger = (await audited(log, **options)).ledger
    assert ledger.balanced
    lines = [*ledger.residuals.items(), *ledger.breaches.items()]
    classes = {kind.value: line.tokens for kind, line in lines if line.attempts}
    assert sorted((f.kind.value, f.tokens) for f in ledger.findings) == sorted(classes.items())
    return ledger, classes


def invoice_of(books: audit.Books) -> dict[str, int]:
    """The tokens that the provider's own books bill for each UTC day."""
    tokens: Counter[str] = Counter()
    for bill in books.bills:
        tokens[f"{datetime.fromtimestamp(bill['at_ms'] / 1000, UTC):%Y-%m-%d}"] += bill["tokens"] * bill["billed"]
    return dict(tokens)
