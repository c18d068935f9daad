"""The eight steps on fakes when the provider fails, refuses, answers nonsense or makes wait."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from processor.domain import (
    CallKind,
    CallOutcome,
    Status,
)
from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
)
from processor.ports import ProviderAnswer
from tests.support.builders import a_request
from tests.support.steps import Bench, vector_of


async def test_a_transient_fault_is_tried_again_with_an_intent_of_its_own() -> None:
    """U1: an attempt is one HTTP request; unanswered ones leave an intent without receipt, answered ones bill 0."""
    async with Bench() as bench:
        bench.provider.script = [ProviderTransient("reset"), ProviderTransient("http_500", http_status=500)]
        await bench.handle(a_request(["text"]))
        receipts = [call for call in bench.outbox.calls if call.kind is CallKind.RECEIPT]
        assert len(bench.intents()) == 3
        assert [(r.outcome, r.billed_tokens) for r in receipts] == [(CallOutcome.FAILED, 0), (CallOutcome.OK, 1)]
        assert bench.outbox.results[0].status is Status.OK


def _nan(answer: ProviderAnswer) -> ProviderAnswer:
    return answer._replace(vectors=[np.full_like(vector, np.nan) for vector in answer.vectors])


def _short(answer: ProviderAnswer) -> ProviderAnswer:
    return answer._replace(vectors=answer.vectors[:-1], indices=list(answer.indices)[:-1])


def _zero(answer: ProviderAnswer) -> ProviderAnswer:
    return answer._replace(vectors=[vector * 0 for vector in answer.vectors])


def _twice(answer: ProviderAnswer) -> ProviderAnswer:
    return answer._replace(indices=[0] * len(answer.vectors))


def _other(answer: ProviderAnswer) -> ProviderAnswer:
    return answer._replace(model="another")


@pytest.mark.parametrize("spoil", [_nan, _short, _zero, _twice, _other])
async def test_an_answer_that_fails_verification_is_paid_and_never_used(spoil: object) -> None:
    """Law 6, U1: an `invalid` receipt holds the bill, a new attempt gets the vectors, the payer pays once."""
    async with Bench() as bench:
        bench.provider.script = [spoil]  # type: ignore[list-item]
        await bench.handle(a_request(["one", "two words"]))
        receipts = [call for call in bench.outbox.calls if call.kind is CallKind.RECEIPT]
        assert [(r.outcome, r.billed_tokens) for r in receipts] == [(CallOutcome.INVALID, 3), (CallOutcome.OK, 3)]
        assert bench.attributed() == {receipts[1].attempt_id: 3}


async def test_a_shuffled_answer_is_put_in_order() -> None:
    """A complete permutation of indices is no fault."""
    async with Bench() as bench:
        bench.provider.script = [
            lambda answer: answer._replace(vectors=answer.vectors[::-1], indices=list(answer.indices)[::-1])
        ]
        await bench.handle(a_request(["one", "two"]))
        for result, text in zip(bench.outbox.results, ["one", "two"], strict=True):
            assert result.vector is not None
            assert np.array_equal(result.vector, vector_of(text))


async def test_one_refused_text_is_bisected_out() -> None:
    """A permanent fault of one text fails that chunk alone; how few calls that takes is `test_search.py`'s."""
    async with Bench() as bench:
        bench.provider.refuses = lambda texts: (
            InputRejected("bad_input", http_status=400) if any("poison" in text for text in texts) else None
        )
        await bench.handle(a_request([f"text {i}" for i in range(7)] + ["poison"]))
        codes = [r.error.code if r.error else "ok" for r in sorted(bench.outbox.results, key=lambda r: r.chunk_index)]
        assert codes == ["ok"] * 7 + ["provider_rejects"]


async def test_a_text_that_always_crashes_the_provider_is_found_while_others_succeed() -> None:
    """Liveness: after k failures, while others succeeded, a 500 for one text becomes its error result."""
    async with Bench(window_max_texts=4) as bench:
        bench.provider.refuses = lambda texts: (
            ProviderTransient("http_500", http_status=500) if any("poison" in text for text in texts) else None
        )
        await bench.publish(a_request(["poison", "b", "c", "d"]))
        for i in range(40):
            await bench.publish(a_request([f"other {i}"], correlation_id=f"o{i}", document_id=None))
            await bench.step()
        await bench.run_until_idle()
        failed = [r.chunk_id for r in bench.outbox.results if r.error]
        assert failed == ["c0"]
        assert not bench.worker._tickets


@pytest.mark.parametrize(
    "refusal",
    [ProviderThrottled("rate_limited", http_status=429), ProviderPaused("quota_exhausted", http_status=429)],
)
async def test_a_text_that_is_throttled_again_and_again_is_no_culprit(refusal: Exception) -> None:
    """Liveness: only faults that a text can cause count against it, however often others get through meanwhile."""
    async with Bench(window_max_texts=1) as bench:
        bench.provider.refuses = lambda texts: refusal if "unlucky" in texts else None
        await bench.publish(a_request(["unlucky"]))
        for i in range(60):
            await bench.publish(a_request([f"other {i}"], correlation_id=f"o{i}", document_id=None))
            await bench.step()
        assert sum("unlucky" in texts for texts in bench.provider.asked) > 5
        bench.provider.refuses = lambda texts: None
        await bench.run_until_idle()
        assert [r for r in bench.outbox.results if r.error] == []
        assert len(bench.outbox.results) == 61


async def test_an_outage_turns_no_work_into_errors() -> None:
    """An outage pauses the stream: nothing fails, calls are few while it lasts, and all of it is embedded after."""
    async with Bench() as bench:
        bench.provider.refuses = lambda texts: ProviderTransient("connection")
        await bench.publish(*[a_request([f"t{i}"], correlation_id=f"c{i}") for i in range(50)])
        while bench.clock.now_s < 600:
            await bench.step()
        assert bench.route.paused == "connection"
        assert bench.outbox.results == []
        assert len(bench.provider.asked) < 100
        bench.provider.refuses = lambda texts: None
        await bench.run_until_idle()
        assert len(bench.outbox.results) == 50
        assert all(r.status is Status.OK for r in bench.outbox.results)
        assert bench.route.paused is None


async def test_whoever_waited_to_probe_is_free_once_the_provider_is_back() -> None:
    """After an outage calls go side by side again: only a paused provider is probed by one call at a time."""
    async with Bench() as bench:
        bench.provider.refuses = lambda texts: ProviderTransient("connection")
        await bench.publish(*[a_request([f"t{i}" + " w" * 9], correlation_id=f"c{i}") for i in range(16)])
        while bench.route.paused is None:
            await bench.step()
        for _ in range(10):
            await bench.step()
        bench.provider.refuses = lambda texts: None
        asked = len(bench.provider.asked)
        bench.provider.gate = asyncio.Event()
        while len(bench.provider.asked) == asked:
            await bench.step()
        assert len(bench.provider.asked) == asked + 1
        bench.provider.gate.set()
        bench.provider.gate = asyncio.Event()
        await bench.settle()
        assert not bench.worker.waiting()
        assert len(bench.provider.asked) >= asked + 3, "the probe, and those whose backoff is over"
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert len(bench.outbox.results) == 16


async def test_a_provider_whose_every_answer_is_unusable_pauses_and_fails_no_text() -> None:
    """Liveness: an answer that fails verification is no success, so it can't make a text the culprit."""
    async with Bench(window_max_texts=4) as bench:
        bench.provider.spoil = _other
        await bench.publish(*[a_request([f"t{i}"], correlation_id=f"c{i}") for i in range(20)])
        for _ in range(60):
            await bench.step()
        assert bench.route.paused == "wrong_model"
        assert bench.outbox.results == []
        bench.provider.spoil = None
        await bench.run_until_idle()
        assert [r.status for r in bench.outbox.results] == [Status.OK] * 20


async def test_a_missing_key_pauses_with_a_reason() -> None:
    """Auth and quota: health says why, and the work waits."""
    async with Bench() as bench:
        bench.provider.script = [ProviderPaused("auth", http_status=401)]
        await bench.publish(a_request(["text"]))
        await bench.step()
        assert bench.route.paused == "auth"
        await bench.run_until_idle()
        assert bench.outbox.results[0].status is Status.OK


async def test_a_throttled_call_waits_as_long_as_it_was_told() -> None:
    """`Retry-After` is obeyed."""
    async with Bench() as bench:
        bench.provider.script = [ProviderThrottled("rate_limited", http_status=429, retry_after_s=7.0)]
        await bench.handle(a_request(["text"]))
        assert bench.clock.now_s >= 7.0


async def test_a_call_that_is_too_large_is_halved() -> None:
    """A fault of composition splits the call and fails nothing."""
    async with Bench() as bench:
        bench.provider.refuses = lambda texts: CallTooLarge("too_large", http_status=400) if len(texts) > 2 else None
        await bench.handle(a_request([f"t{i}" for i in range(8)]))
        assert all(r.status is Status.OK for r in bench.outbox.results)
        assert sum(bench.attributed().values()) == sum(bench.provider.bills.values())


async def test_a_refused_model_fails_its_chunks() -> None:
    """`provider_model_error` for the chunks of a model that the provider doesn't serve."""
    async with Bench() as bench:
        bench.provider.script = [ModelRejected("no_such_model", http_status=404)]
        await bench.handle(a_request(["text"]))
        assert bench.outbox.results[0].error is not None
        assert bench.outbox.results[0].error.code == "provider_model_error"
