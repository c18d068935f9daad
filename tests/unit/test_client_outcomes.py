"""The first copy counts: for who awaits replies, and for who reads results or usage."""

from __future__ import annotations

from typing import Any

from processor.client.outcomes import DAY_MS, FirstCharges, FirstResults, Pending
from processor.domain import ErrorCode, Fault, ReceivedResult, Request, Result, Status
from processor.identity import request_id
from tests.support.builders import NOW_MS, a_request, a_result
from tests.support.codec import read, value_of

REQUEST = a_request(["a", "b", "c"])
FAULT = Fault(ErrorCode.UNKNOWN_MODEL, "model", "model: not in the catalogue")


def received(result: Result) -> ReceivedResult:
    answer: ReceivedResult = read(ReceivedResult, value_of("results", result))
    return answer


def chunk(index: int, request: Request = REQUEST, **fields: Any) -> ReceivedResult:
    return received(a_result(request, index, **fields))


def whole(request: Request = REQUEST, **fields: Any) -> ReceivedResult:
    fields = {"chunk_index": -1, "status": Status.ERROR, "error": FAULT, "length": request.length} | fields
    return received(a_result(request, 0, chunk_id="", vector=None, vector_id=None, **fields))


def pending(request: Request = REQUEST) -> Pending:
    return Pending(request, request_id(request))


def test_outcomes_are_in_the_order_of_the_texts() -> None:
    """Whatever order replies come in, and what has none is timed out."""
    waiting = pending()
    waiting.take(chunk(2))
    waiting.take(chunk(0))
    assert [(one.index, one.chunk_id, one.status) for one in waiting.outcomes()] == [
        (0, "c0", "ok"),
        (1, "c1", "timed_out"),
        (2, "c2", "ok"),
    ]
    assert not waiting.complete
    waiting.take(chunk(1))
    assert waiting.complete


def test_the_first_reply_of_a_chunk_stands() -> None:
    """A later copy that says otherwise changes nothing."""
    waiting = pending()
    waiting.take(chunk(1))
    waiting.take(chunk(1, status=Status.ERROR, vector=None, vector_id=None, error=FAULT))
    assert waiting.outcomes()[1].ok


def test_an_error_of_the_request_stands_for_every_chunk_without_an_outcome() -> None:
    """One record fails the rest, and what had its outcome keeps it."""
    waiting = pending()
    waiting.take(chunk(0))
    waiting.take(whole())
    assert waiting.complete
    assert [one.status for one in waiting.outcomes()] == ["ok", "error", "error"]
    assert [one.error and one.error.code for one in waiting.outcomes()] == [None, "unknown_model", "unknown_model"]


def test_a_part_counts_from_the_wholes_first_chunk() -> None:
    """Outcomes of a second part carry the index in the whole."""
    part = a_request(["x", "y"], first_chunk_index=5, chunk_count=7)
    waiting = pending(part)
    waiting.take(whole(part))
    assert [one.index for one in waiting.outcomes()] == [5, 6]
    assert waiting.complete


def test_a_manifest_has_one_outcome() -> None:
    """Its `ok` with index -1 is the document's, however many ids it lists."""
    manifest = a_request(action="document_manifest", chunks=(), chunk_ids=("a", "b"), vector_spaces=("s",))
    waiting = pending(manifest)
    assert [one.status for one in waiting.outcomes()] == ["timed_out"]
    waiting.take(whole(manifest, status=Status.OK, error=None))
    assert waiting.complete
    assert waiting.outcomes()[0].ok


def test_no_vector_or_text_is_in_the_repr_of_an_outcome() -> None:
    """A stray log line leaks nothing."""
    waiting = pending(a_request(["canary-text"]))
    waiting.take(chunk(0, a_request(["canary-text"])))
    shown = repr(waiting.outcomes())
    assert "canary" not in shown
    assert "array" not in shown


def test_results_pass_once() -> None:
    """Copies of a chunk are dropped, and a whole request's error passes only if it says something new."""
    first = FirstResults(remember=None)
    assert first.is_first(chunk(0))
    assert not first.is_first(chunk(0))
    assert first.is_first(whole())
    assert not first.is_first(whole())
    assert not first.is_first(chunk(2))


def test_the_manifest_of_an_empty_document_passes_once() -> None:
    """It stands for no chunk and is an outcome all the same."""
    manifest = a_request(action="document_manifest", chunks=(), chunk_ids=(), vector_spaces=())
    first = FirstResults(remember=None)
    record = whole(manifest, status=Status.OK, error=None)
    assert [first.is_first(record), first.is_first(record)] == [True, False]


def test_memory_of_results_is_bounded_when_asked() -> None:
    """The request that was touched last is remembered, the older one is not."""
    other = a_request(["z"], correlation_id="other")
    first = FirstResults(remember=1)
    assert first.is_first(chunk(0))
    assert first.is_first(chunk(0, other))
    assert not first.is_first(chunk(0, other))
    assert first.is_first(chunk(0))


def test_a_charge_counts_once_within_twice_the_horizon() -> None:
    """Each copy renews the key; one that comes later than that is a charge of its own."""
    first = FirstCharges(horizon_days=35, remember=None)
    times = [0, 1, 70 * DAY_MS, 70 * DAY_MS + 70 * DAY_MS, 140 * DAY_MS + 70 * DAY_MS + 1]
    assert [first.is_first("k", NOW_MS + time) for time in times] == [True, False, False, False, True]


def test_memory_of_charges_is_bounded_when_asked() -> None:
    """With room for one key the older one is forgotten, without a bound none is."""
    bounded, unbounded = FirstCharges(horizon_days=35, remember=1), FirstCharges(horizon_days=35, remember=None)
    keys = ["a", "b", "a"]
    assert [bounded.is_first(key, NOW_MS) for key in keys] == [True, True, True]
    assert [unbounded.is_first(key, NOW_MS) for key in keys] == [True, True, False]
