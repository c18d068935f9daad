"""The checker of the fault tests finds what it must: honest books pass it, and books tampered with do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from processor.accounts import BucketKey, UsageSums, UsageTotal
from processor.aggregate import buckets_of, sums_of
from processor.domain import (
    Amounts,
    CallItem,
    CallKind,
    CallOutcome,
    ErrorCode,
    Fault,
    Part,
    ProviderCall,
    ReceivedResult,
    Record,
    Request,
    Source,
    Usage,
)
from processor.identity import refusal_key, request_id
from tests.support import audit
from tests.support.builders import NOW_MS, SPACE, a_call, a_request, a_result, a_source, a_usage
from tests.support.codec import read, value_of
from tests.support.provider_answers import expected_vector

DIMENSIONS = 8
VECTOR_SPACE = str(replace(SPACE, dimensions=DIMENSIONS))
PRICE = 20
"""Nano-dollars a token, as `a_usage` has it."""

TEXT, LONGER = "one two three", "four five six seven"
PAID = a_request([TEXT, LONGER], agent_id="helper")
UNCACHED = a_request(
    [TEXT], tenant_id="globex", correlation_id="2", agent_owner_id="initech", use_cache=False, collection=None
)
SAVED = a_request([TEXT], correlation_id="3", document_id="doc-3")
REQUESTS = [PAID, UNCACHED, SAVED]
SOURCES = {request_id(request): a_source(offset) for offset, request in enumerate(REQUESTS)}

OF_PAID = (CallItem(request_id(PAID), 0, "acme", 3), CallItem(request_id(PAID), 1, "acme", 4))
OF_UNCACHED = (CallItem(request_id(UNCACHED), 0, "initech", 3),)
CALLS = {
    "paid": (OF_PAID, 7, CallOutcome.OK),
    "replayed": (OF_PAID, 7, CallOutcome.OK),
    "invalid": (OF_UNCACHED, 3, CallOutcome.INVALID),
    "valid": (OF_UNCACHED, 3, CallOutcome.OK),
    "unanswered": (OF_UNCACHED, 3, None),
}


def result_of(request: Request, index: int, tokens: int) -> tuple[Record, ReceivedResult]:
    vector = expected_vector(request.chunks[index].text, DIMENSIONS)
    source = SOURCES[request_id(request)]
    value = value_of("results", a_result(request, index, source=source, token_count=tokens, vector=vector))
    return Record(a_source(index, topic="embedding-results"), None, value), read(ReceivedResult, value)


def usage_of(offset: int, request: Request, *, billed: int, saved: int, attempt_id: str) -> tuple[Record, Usage]:
    """The event of a request whose texts were all billed, or all saved."""
    texts, characters = len(request.chunks), sum(len(chunk.text) for chunk in request.chunks)
    usage = a_usage(
        request,
        source=SOURCES[request_id(request)],
        vector_space=VECTOR_SPACE,
        billed=Amounts(texts, billed, characters, billed * PRICE) if billed else Amounts(0, 0, 0, 0),
        saved=Amounts(texts, saved, characters, saved * PRICE) if saved else Amounts(0, 0, 0, 0),
        parts=[Part(attempt_id, billed)] if billed else [],
    )
    return Record(a_source(offset, topic="token-usage"), usage.payer_id.encode(), b""), usage


def totals_of(charges: Iterable[tuple[Record, Usage]]) -> dict[BucketKey, UsageTotal]:
    """As the aggregator publishes them."""
    sums: dict[BucketKey, list[int]] = defaultdict(lambda: [0] * len(audit.SUMS))
    for _, usage in charges:
        for key in buckets_of(usage):
            sums[key] = [known + added for known, added in zip(sums[key], sums_of(usage), strict=True)]
    return {
        key: UsageTotal(
            key=key,
            partitions={0: (9, UsageSums(**dict(zip(audit.SUMS, amounts, strict=True))))},
            updated_at_ms=NOW_MS,
        )
        for key, amounts in sums.items()
    }


def honest_books() -> audit.Books:
    """Three requests, five calls: one replayed after a crash, one answered wrongly, one never."""
    usage = [
        usage_of(0, PAID, billed=7, saved=0, attempt_id="paid"),
        usage_of(1, PAID, billed=7, saved=0, attempt_id="replayed"),
        usage_of(2, UNCACHED, billed=3, saved=0, attempt_id="valid"),
        usage_of(3, SAVED, billed=0, saved=3, attempt_id=""),
    ]
    calls = []
    for attempt_id, (items, bill, outcome) in CALLS.items():
        named: dict[str, Any] = {"attempt_id": attempt_id, "items": items, "vector_space": VECTOR_SPACE}
        calls.append(a_call(**named))
        if outcome is not None:
            calls.append(a_call(CallKind.RECEIPT, **named, outcome=outcome, billed_tokens=bill))
    return audit.Books(
        requests=[(Record(SOURCES[request_id(request)], None, b""), request) for request in REQUESTS],
        results=[
            result_of(PAID, 0, 3),
            result_of(PAID, 1, 4),
            result_of(PAID, 0, 3),
            result_of(UNCACHED, 0, 3),
            result_of(SAVED, 0, 3),
        ],
        usage=usage,
        calls=[
            (Record(a_source(offset, topic="embedding-calls"), None, b""), call) for offset, call in enumerate(calls)
        ],
        totals=totals_of([usage[0], usage[2], usage[3]]),
        bills=[{"attempt_id": name, "tokens": bill, "billed": True} for name, (_, bill, _) in CALLS.items()],
    )


def hold(books: audit.Books) -> audit.Residuals:
    """All that the fault tests hold their books against."""
    audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS)
    audit.check_charges(books)
    residuals = audit.check_attempts(books)
    audit.check_shares(books)
    audit.check_totals(books)
    return residuals


def test_honest_books_pass_and_every_residual_has_its_class() -> None:
    """Copies beyond the first charge nothing; what nobody is charged for is told apart."""
    residuals = hold(honest_books())
    assert (residuals.billed, residuals.attributed) == (23, 10)
    assert (residuals.waste, residuals.rework, residuals.unconfirmed) == (3, 7, 3)
    assert (residuals.late, residuals.unclaimed, residuals.recovered_attempts) == (0, 0, 0)


def test_the_order_of_reading_decides_nothing() -> None:
    """The first copy is that of the lowest offset, wherever it stands in the list."""
    books = honest_books()
    books.usage.reverse()
    assert hold(books) == hold(honest_books())


def test_a_lost_receipt_is_a_recovered_attempt_and_no_breach() -> None:
    """A crash may lose a receipt: the charge names the attempt all the same, and the checker says so."""
    books = honest_books()
    books.calls = [pair for pair in books.calls if (pair[1].kind, pair[1].attempt_id) != (CallKind.RECEIPT, "paid")]
    residuals = hold(books)
    assert (residuals.recovered_attempts, residuals.attributed, residuals.unconfirmed) == (1, 10, 3)


def refused_first(books: audit.Books, **changed: Any) -> None:
    """The first request had been sent before, and was past its deadline then."""
    books.requests.append((Record(a_source(9), None, b""), replace(PAID, deadline_ms=1)))
    late = Fault(ErrorCode.DEADLINE_EXCEEDED, "deadline_ms", "deadline_ms: had passed")
    for record, result in [result_of(PAID, index, 0) for index in range(2)]:
        books.results.insert(0, (record, replace(result, status="error", error=late, vector=None)))
    record, usage = usage_of(-1, PAID, billed=0, saved=0, attempt_id="")
    refusal = replace(usage, source=a_source(9), failed_texts=2, event_key=refusal_key(usage.request_id))
    books.usage.append((record, replace(refusal, **changed)))
    books.totals = totals_of([books.usage[index] for index in (0, 2, 3, 4)])


def test_a_request_that_was_refused_first_has_a_refusal_and_a_charge() -> None:
    """What was paid for when it was sent again is attributed all the same."""
    books = honest_books()
    refused_first(books)
    assert hold(books) == hold(honest_books())


Tampering = Callable[[audit.Books], object]


def changed_usage(place: int, **fields: Any) -> Tampering:
    def tamper(books: audit.Books) -> None:
        record, usage = books.usage[place]
        books.usage[place] = record, replace(usage, **fields)

    return tamper


def changed_result(place: int, **fields: Any) -> Tampering:
    def tamper(books: audit.Books) -> None:
        record, result = books.results[place]
        books.results[place] = record, replace(result, **fields)

    return tamper


def changed_call(attempt_id: str, kind: CallKind, **fields: Any) -> Tampering:
    """None leaves the record out."""

    def tamper(books: audit.Books) -> None:
        books.calls = [
            (record, replace(call, **fields) if (call.attempt_id, call.kind) == (attempt_id, kind) else call)
            for record, call in books.calls
        ]

    return tamper


def without_call(attempt_id: str, kind: CallKind) -> Tampering:
    def is_it(call: ProviderCall) -> bool:
        return (call.attempt_id, call.kind) == (attempt_id, kind)

    def tamper(books: audit.Books) -> None:
        books.calls = [pair for pair in books.calls if not is_it(pair[1])]

    return tamper


def charged_again_under_another_key(books: audit.Books) -> None:
    record, usage = books.usage[0]
    books.usage.append((replace_source(record, 4), replace(usage, request_id=f"{usage.request_id}-retry")))


def keyed_by_attempt(books: audit.Books) -> None:
    """A key that depends on the attempt makes a second charge of a replay."""
    books.key_of = lambda usage: usage.request_id + "".join(part.attempt_id for part in usage.parts)


def refused_under_the_key_of_the_charge(books: audit.Books) -> None:
    """What is charged is the refusal, and what was paid for a copy of it."""
    refused_first(books, event_key=None)
    books.totals = totals_of(books.usage[2:])


def charged_again_in_another_partition(books: audit.Books) -> None:
    """There nobody knows of the first copy, and the totals count both."""
    record, usage = books.usage[3]
    elsewhere = Source(record.source.topic, record.source.partition + 1, 0, record.source.append_ms)
    books.usage.append((Record(elsewhere, record.key, record.value), usage))
    books.totals = totals_of([*books.usage[:1], *books.usage[2:]])


def charged_elsewhere(**fields: Any) -> Tampering:
    """What a total is grouped by is not what the request says; the totals agree."""

    def tamper(books: audit.Books) -> None:
        record, usage = books.usage[3]
        fits = {name: value for name, value in fields.items() if name in {"operation", "token_type"}}
        request = replace(usage.request, **{name: value for name, value in fields.items() if name not in fits})
        books.usage[3] = record, replace(usage, request=request, **fits)
        books.totals = totals_of([books.usage[0], *books.usage[2:]])

    return tamper


def second_copy_comes_first(books: audit.Books) -> None:
    """The totals count the copy that is now the second."""
    (first, usage), (second, replayed) = books.usage[:2]
    books.usage[:2] = [(second, replace(usage, model="other")), (first, replayed)]
    books.totals = totals_of([books.usage[0], *books.usage[2:]])


def replace_source(record: Record, offset: int, append_ms: int = NOW_MS) -> Record:
    source = record.source
    return Record(Source(source.topic, source.partition, offset, append_ms), record.key, record.value)


def late_charge_in_the_totals(books: audit.Books) -> None:
    record, usage = books.usage[2]
    books.usage[2] = replace_source(record, 2, NOW_MS + audit.HORIZON_MS + 1), usage


def other_total(books: audit.Books, added: int) -> None:
    key = next(iter(books.totals))
    [(partition, (last_offset, sums))] = books.totals[key].partitions.items()
    sums = replace(sums, saved_characters=sums.saved_characters + added)
    books.totals[key] = replace(books.totals[key], partitions={partition: (last_offset, sums)})


def invented_bucket(books: audit.Books) -> None:
    key, total = next(iter(books.totals.items()))
    books.totals[key._replace(payer_id="nobody")] = total


def a_bill_more(attempt_id: str) -> Tampering:
    return lambda books: books.bills.append({"attempt_id": attempt_id, "tokens": 3, "billed": True})


TAMPERED: dict[str, tuple[Tampering, str]] = {
    "a result is lost": (lambda books: books.results.pop(1), "1 chunks without outcome"),
    "a result for nobody": (changed_result(0, request_id="nobody"), "a result for nobody"),
    "a result of another document": (changed_result(4, document_id="doc-1"), "another's document_id"),
    "a result with another chunk's metadata": (changed_result(0, chunk_metadata={"page": "1"}), "of another chunk"),
    "a result of another tenant": (changed_result(0, tenant_id="globex"), "check_outcomes"),
    "a chunk that was never sent": (changed_result(0, chunk_index=2), "never sent"),
    "another text's vector": (
        changed_result(0, vector=expected_vector(LONGER, DIMENSIONS)),
        "the vector of another text",
    ),
    "a vector that is not finite": (
        changed_result(0, vector=np.full(DIMENSIONS, np.nan, np.float32)),
        "check_outcomes",
    ),
    "an error in place of a vector": (changed_result(0, status="error", vector=None), "check_outcomes"),
    "copies with two vector ids": (changed_result(2, vector_id="another"), "check_outcomes"),
    "tokens that nobody paid for this text": (changed_result(4, token_count=4), "check_shares"),
    "a charge is lost": (lambda books: books.usage.pop(2), "1 requests without charge"),
    "a charge is made again under another key": (charged_again_under_another_key, "1 invented"),
    "a charge is made again in another partition": (charged_again_in_another_partition, "in two partitions"),
    "a charge to another agent": (charged_elsewhere(agent_id="somebody"), "check_charges"),
    "a charge to another collection": (charged_elsewhere(collection="elsewhere"), "check_charges"),
    "a charge of another operation": (charged_elsewhere(operation="query"), "check_charges"),
    "a charge of other tokens": (charged_elsewhere(token_type="completion"), "check_charges"),
    "a text found that was billed to nobody": (changed_usage(3, cached_texts=2), "check_charges"),
    "the key depends on the attempt": (keyed_by_attempt, "1 requests charged more than once"),
    "a refusal is taken for the charge": (refused_under_the_key_of_the_charge, "1 requests were served at a cost"),
    "a refusal under any key": (lambda books: refused_first(books, event_key="any"), "a key that is not its request's"),
    "a charge to another payer": (changed_usage(2, payer_id="globex"), "check_charges"),
    "a charge at another time": (changed_usage(0, charged_at_ms=NOW_MS + 1), "not the time of its source record"),
    "a nano-dollar too much": (changed_usage(2, billed=Amounts(1, 3, 13, 61)), "check_charges"),
    "parts that do not sum up": (changed_usage(2, parts=[Part("valid", 2)]), "check_charges"),
    "a text that is in no sum": (changed_usage(0, billed=Amounts(1, 7, 32, 140)), "check_charges"),
    "saved what refuses the cache": (
        changed_usage(2, billed=Amounts(0, 0, 0, 0), saved=Amounts(1, 3, 13, 60), parts=[]),
        "refuses the cache",
    ),
    "saved tokens that nobody paid": (changed_usage(3, saved=Amounts(1, 2, 13, 40)), "check_shares"),
    "a token more than the bill": (
        changed_usage(0, billed=Amounts(2, 8, 32, 160), parts=[Part("paid", 8)]),
        "attributed more than its bill",
    ),
    "a token less than a share": (
        changed_usage(0, billed=Amounts(2, 6, 32, 120), parts=[Part("paid", 6)]),
        "is no share of",
    ),
    "a charge of another's call": (changed_usage(2, parts=[Part("replayed", 3)]), "did not embed its text"),
    "a charge of an invalid answer": (changed_usage(2, parts=[Part("invalid", 3)]), "names the invalid attempt"),
    "a charge of no call": (changed_usage(2, parts=[Part("nowhere", 3)]), "nobody intended"),
    "a call without intent": (without_call("unanswered", CallKind.INTENT), "a call without an intent before it"),
    "a receipt without intent": (without_call("paid", CallKind.INTENT), "a receipt without an intent before it"),
    "a receipt that is not the bill": (changed_call("valid", CallKind.RECEIPT, billed_tokens=2), "not the provider's"),
    "a bill that no receipt shows": (changed_call("paid", CallKind.RECEIPT, billed_tokens=0), "not the provider's"),
    "two calls under one intent": (a_bill_more("valid"), "two calls under one intent"),
    "a call that no intent names": (a_bill_more("secret"), "a call without an intent before it"),
    "a total that is off by one": (lambda books: other_total(books, 1), "check_totals"),
    "a total that counts copies": (lambda books: books.totals.update(totals_of(books.usage)), "check_totals"),
    "a total of the second copy": (second_copy_comes_first, "check_totals"),
    "a total with a late charge": (late_charge_in_the_totals, "0 buckets missing, 6 invented"),
    "a bucket is missing": (lambda books: books.totals.popitem(), "1 buckets missing, 0 invented"),
    "a bucket is invented": (invented_bucket, "0 buckets missing, 1 invented"),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_books_that_were_tampered_with_do_not_pass(tampered: str) -> None:
    """One record lost, doubled or changed is found, by the check that is meant to."""
    tamper, found = TAMPERED[tampered]
    books = honest_books()
    tamper(books)
    with pytest.raises(AssertionError) as caught:
        hold(books)
    assert found in " ".join([*(entry.name for entry in caught.traceback), str(caught.value)])
