"""`usage explain` on logs in memory: what the topics hold of a request is told, and nothing of anybody else's."""

from __future__ import annotations

import json

import pytest

from processor.cli.explain import Explanation, Scan, sentences
from processor.domain import (
    Action,
    Amounts,
    CacheLevel,
    CallItem,
    CallOutcome,
    DeadLetter,
    DlqClass,
    ErrorCode,
    Fault,
    Record,
    Request,
    Source,
    Status,
    TokenType,
)
from processor.identity import refusal_key, request_id
from processor.ports import Destination
from processor.settings import load
from tests.support.aggregation import HORIZON_MS, TOPICS, MemoryLog
from tests.support.builders import a_call, a_record, a_request, a_result
from tests.support.ledgers import call, charge, receive

REQUESTS, RESULTS = "embedding-requests", "embedding-results"
CANARY = "a secret of a customer"


def send(log: MemoryLog, request: Request) -> Source:
    return log.append_bytes(REQUESTS, 0, log.codec.encode_request(request))


def answer(log: MemoryLog, request: Request, index: int, **result: object) -> None:
    key, value, headers = log.codec.encode(Destination("results", a_result(request, index, **result)))
    log.append_bytes(RESULTS, 0, value, key=key, headers=headers)


def bury(log: MemoryLog, record: Record, reason: DlqClass, *, by_reference: bool = False) -> None:
    letter = DeadLetter(record=record, reason=reason, code="any", at_ms=log.now_ms, by_reference=by_reference)
    log.append(Destination("dlq", letter))


async def told(log: MemoryLog, name: str = "corr-1", tenant_id: str | None = None) -> Explanation:
    """And no text with it, neither for people nor for programs."""
    explanation = await Scan(load(_env_file=None), log, log.codec, name, tenant_id, {}).run()
    shown = "\n".join(sentences(explanation))
    lines = [life.fields() for life in explanation.lives] + [each.fields() for each in explanation.dead_letters]
    shown += json.dumps(lines, default=str)
    assert CANARY not in shown
    return explanation


async def test_the_life_of_a_request_is_told_from_record_to_price() -> None:
    """Records, outcomes of first copies by level and code, the charge and its copies, each part with its call."""
    log = MemoryLog()
    request = a_request([CANARY, CANARY, " "])
    sent = [send(log, request), send(log, request)]
    fault = Fault(ErrorCode.EMPTY_TEXT, "chunks.text", "chunks.text: is empty")
    for _ in range(2):
        answer(log, request, 0)
        answer(log, request, 1, cache=CacheLevel.COALESCED)
        answer(log, request, 2, status=Status.ERROR, error=fault)
    call(log, "a", (request, 3), (a_request(correlation_id="other"), 4))
    receive(log, "a", 7)
    call(log, "lost", (request, 3))
    call(log, "of-others", (a_request(correlation_id="other"), 4))
    charge(log, request, ("a", 3))
    charge(log, request, ("a", 3))
    log.commits[TOPICS.usage, log.all_of(TOPICS.usage)[0].source.partition] = 1

    (life,) = (await told(log)).lives
    assert (life.request_id, life.action, life.chunks, life.records) == (request_id(request), "generate", 3, sent)
    assert life.outcomes == {("ok", "miss"): 1, ("ok", "coalesced"): 1, ("error", "empty_text"): 1}
    assert life.result_copies == 3
    (charged,) = life.charges
    assert (charged.copies, charged.late, charged.in_totals, charged.usage.price_version) == (
        1,
        False,
        True,
        "openai-2024-01",
    )
    attempts = [(each.attempt_id, each.outcome, each.billed_tokens, each.items) for each in life.attempts.values()]
    assert attempts == [("a", "ok", 7, 1), ("lost", None, None, 1)]
    assert [each.charged_tokens for each in life.attempts.values()] == [3, 0]


async def test_a_late_charge_is_in_no_total_and_a_waiting_one_not_yet() -> None:
    """Whatever the aggregator has committed, a late one never is."""
    for late in (True, False):
        log = MemoryLog()
        charge(log, a_request(), ("a", 3), charged_at_ms=log.now_ms - late * (HORIZON_MS + 1))
        (life,) = (await told(log)).lives
        assert [(each.late, each.in_totals) for each in life.charges] == [(late, False)]
        log.commits |= {(TOPICS.usage, partition): 1 for partition in range(2)}
        (life,) = (await told(log)).lives
        assert [(each.late, each.in_totals) for each in life.charges] == [(late, not late)]


async def test_one_correlation_id_may_name_several_requests() -> None:
    """Of several tenants, and of several contents; each is told by itself, or only one tenant's."""
    log = MemoryLog()
    first, second, theirs = a_request([CANARY]), a_request(["more"]), a_request(tenant_id="globex")
    for request in (first, second, theirs, a_request(correlation_id="corr-11")):
        send(log, request)
        answer(log, request, 0)
        charge(log, request, ("a", 3))
    assert {life.request_id for life in (await told(log)).lives} == {
        request_id(each) for each in (first, second, theirs)
    }
    for tenant_id, count in (("acme", 2), ("globex", 1), ("nobody", 0)):
        lives = (await told(log, tenant_id=tenant_id)).lives
        assert [life.tenant_id for life in lives] == [tenant_id] * count
        assert all(sum(life.outcomes.values()) == len(life.charges) == len(life.records) == 1 for life in lives)


async def test_usage_of_other_services_under_the_same_name_is_told_apart() -> None:
    """By its own key, each with its copies."""
    log = MemoryLog()
    for key in ("in", "out", "in"):
        charge(log, a_request(), token_type=TokenType.INPUT, event_key=key)
    (life,) = (await told(log)).lives
    assert [each.copies for each in life.charges] == [1, 0]


async def test_usage_that_is_not_totalled_is_said_to_be_in_no_total() -> None:
    """However far the aggregator has come."""
    log = MemoryLog()
    charge(log, a_request(), token_type=TokenType.INPUT)
    log.commits |= {(TOPICS.usage, partition): 1 for partition in range(2)}
    explanation = await told(log)
    assert [charge.in_totals for life in explanation.lives for charge in life.charges] == [False]
    assert "in no total: input tokens" in "".join(sentences(explanation))


async def test_only_actions_that_embed_wait_for_a_charge() -> None:
    """A delete never has one."""
    for action, says in ((Action.DELETE, "the action embeds nothing"), ("embedding.generate", "none yet")):
        log = MemoryLog()
        send(log, a_request(action=action))
        assert says in "".join(sentences(await told(log)))


async def test_the_first_receipt_of_a_call_is_told() -> None:
    """Its outcome and its bill, not those of two."""
    log = MemoryLog()
    send(log, a_request())
    call(log, "a", (a_request(), 3))
    receive(log, "a", 3)
    receive(log, "a", 9, CallOutcome.INVALID)
    (life,) = (await told(log)).lives
    assert [(each.outcome, each.billed_tokens) for each in life.attempts.values()] == [("ok", 3)]


@pytest.mark.parametrize("at_ms", [-1, 2**62])
async def test_a_dead_letter_of_any_time_is_told(at_ms: int) -> None:
    """Its topic has the time of whoever wrote it."""
    log = MemoryLog()
    log.append_bytes("embedding-requests-dlq", 0, b"\x00corr-1", append_ms=at_ms)
    assert "dead letter" in "".join(sentences(await told(log)))


async def test_a_refusal_is_told_apart_from_the_charge() -> None:
    """A request that was refused, sent again and served has both."""
    log, request = MemoryLog(), a_request()
    charge(log, request, billed=Amounts(0, 0, 0, 0), failed_texts=1, event_key=refusal_key(request_id(request)))
    charge(log, request, ("a", 3))
    explanation = await told(log)
    (life,) = explanation.lives
    assert [each.fields()["refusal"] for each in life.charges] == [True, False]
    told_so = [line.split()[0] for line in sentences(explanation)]
    assert ("refusal" in told_so, "charge" in told_so) == (True, True)


async def test_dead_letters_of_its_records_are_told() -> None:
    """By where they stood, or by the id in their bytes; of another record nothing is."""
    log = MemoryLog()
    source = send(log, a_request([CANARY]))
    bury(log, a_record(None, source), DlqClass.LETHAL, by_reference=True)
    bury(log, a_record(b"\x00corr-1" + CANARY.encode(), offset=7), DlqClass.UNDECODABLE)
    bury(log, a_record(b"\x00corr-2", offset=8), DlqClass.UNDECODABLE)
    letters = (await told(log)).dead_letters
    assert sorted(each.headers["error_class"] for each in letters) == ["lethal", "undecodable"]
    (letter,) = (await told(log, tenant_id="acme")).dead_letters
    assert (letter.headers["error_class"], letter.headers["source_offset"]) == ("lethal", str(source.offset))
    assert not await told(log, "never sent")


async def test_an_attempt_counts_all_its_items_of_the_request() -> None:
    """Several of its texts may have been in one call."""
    log = MemoryLog()
    request = a_request(["one", "two"])
    send(log, request)
    items = [CallItem(request_id(request), index, "acme", 2) for index in range(2)]
    log.append(Destination("calls", a_call(attempt_id="a", items=items, estimated_tokens=4)))
    (life,) = (await told(log)).lives
    assert [(each.items, each.local_tokens, each.estimated_tokens) for each in life.attempts.values()] == [(2, 4, 4)]


async def test_a_call_for_several_requests_of_one_name_tells_what_each_was_charged() -> None:
    """One call may have had texts of two bodies under one correlation id."""
    log = MemoryLog()
    first, second = a_request(["one"]), a_request(["two"])
    call(log, "a", (first, 3), (second, 4))
    charge(log, first, ("a", 3))
    charge(log, second, ("a", 4))
    lives = {life.request_id: life.attempts["a"].charged_tokens for life in (await told(log)).lives}
    assert lives == {request_id(first): 3, request_id(second): 4}
