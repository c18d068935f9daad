"""Each bad input has one documented outcome, and neither stops the stream nor touches its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from processor.adapters.avro import encode_request
from processor.domain import Chunk, Lane, ReplyTo, Request, Status
from tests.support.builders import NOW_MS, a_request, some_chunks
from tests.support.steps import Bench

LONG = "x" * 1025

REFUSED: dict[str, tuple[Request, str, str]] = {
    "unknown action": (a_request(action="explode"), "invalid_request", "action"),
    "neither list": (a_request(chunks=()), "invalid_request", "chunks"),
    "both lists": (a_request(chunks=some_chunks(["a"]), chunk_ids=("b",)), "invalid_request", "chunk_ids"),
    "chunks in a delete": (
        a_request(chunks=some_chunks(["a"]), action="delete", chunk_ids=("b",), vector_spaces=("s",)),
        "invalid_request",
        "chunks",
    ),
    "too many chunks": (a_request(["a"] * 2049), "invalid_request", "chunks"),
    "too large": (a_request(["a" * 900_001]), "invalid_request", "chunks"),
    "manifest too large": (
        a_request(action="document_manifest", chunks=(), chunk_ids=tuple(f"{i:01000d}" for i in range(901))),
        "document_too_large",
        "chunk_ids",
    ),
    "manifest of too many vectors": (
        a_request(
            action="document_manifest",
            chunks=(),
            chunk_ids=tuple(map(str, range(100_001))),
            vector_spaces=("s", "t"),
        ),
        "document_too_large",
        "vector_spaces",
    ),
    "duplicate chunk ids": (
        a_request(chunks=(Chunk("a", "1"), Chunk("a", "2"))),
        "invalid_request",
        "chunks.chunk_id",
    ),
    "duplicate ids of a delete": (
        a_request(action="delete", chunks=(), chunk_ids=("a", "a"), vector_spaces=("s",)),
        "invalid_request",
        "chunk_ids",
    ),
    "metadata too large": (a_request(["a"], metadata={"k": "v" * 8192}), "invalid_request", "metadata"),
    "unknown model": (a_request(["a"], model="nobody-knows"), "unknown_model", "model"),
    "model of another route": (a_request(["a"], model="elsewhere"), "model_not_served", "model"),
    "dimensions the model lacks": (a_request(["a"], dimensions=5), "bad_dimensions", "dimensions"),
    "dimensions of nothing": (a_request(["a"], dimensions=0), "bad_dimensions", "dimensions"),
    "two texts in a query": (a_request(["a", "b"], action="generate_query"), "invalid_request", "chunks"),
    "unknown input type": (a_request(["a"], input_type="poem"), "invalid_request", "input_type"),
    "unknown truncate policy": (a_request(["a"], truncate="middle"), "invalid_request", "truncate"),
    "reply elsewhere": (a_request(["a"], reply_to=ReplyTo("token-usage", 0)), "reply_not_allowed", "reply_to.topic"),
    "reply to no partition": (
        a_request(["a"], reply_to=ReplyTo("embedding-replies", 9)),
        "reply_not_allowed",
        "reply_to.partition",
    ),
    "negative index": (a_request(["a"], first_chunk_index=-1), "invalid_request", "first_chunk_index"),
    "index beyond all documents": (
        a_request(["a"], first_chunk_index=2**63 - 1),
        "invalid_request",
        "first_chunk_index",
    ),
    "count below its part": (a_request(["a", "b"], chunk_count=1), "invalid_request", "chunk_count"),
    "negative task total": (a_request(["a"], task_total=-1), "invalid_request", "task_total"),
    "delete of no document": (
        a_request(action="delete", chunks=(), chunk_ids=("a",), vector_spaces=("s",), document_id=None),
        "invalid_request",
        "document_id",
    ),
    "unknown spelling of an action": (
        a_request(action="embedding.delete", chunks=(), chunk_ids=("a",)),
        "invalid_request",
        "action",
    ),
    "delete without spaces": (
        a_request(action="delete", chunks=(), chunk_ids=("a",)),
        "invalid_request",
        "vector_spaces",
    ),
    "too many spaces": (
        a_request(action="delete", chunks=(), chunk_ids=("a",), vector_spaces=tuple(map(str, range(33)))),
        "invalid_request",
        "vector_spaces",
    ),
    "a space of any length": (
        a_request(action="delete", chunks=(), chunk_ids=("a",), vector_spaces=("s", LONG)),
        "invalid_request",
        "vector_spaces",
    ),
    "an id that fills results": (a_request(["a"], document_id=LONG), "invalid_request", "document_id"),
    "an owner that fills intents": (a_request(["a"], agent_owner_id="o" * 257), "invalid_request", "agent_owner_id"),
    "an action that fills results": (a_request(["a"], action=LONG), "invalid_request", "action"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refused_request_names_code_and_field_and_spares_its_neighbours(name: str) -> None:
    """One error result with index -1 that stands for all chunks, in a record of bounded size; neighbours are `ok`."""
    request, code, field = REFUSED[name]
    async with Bench() as bench:
        await bench.handle(
            a_request(["before"], correlation_id="before"),
            replace(request, correlation_id="bad"),
            a_request(["after"], correlation_id="after"),
        )
        results = {result.request.correlation_id: result for result in bench.outbox.results}
        bad = results["bad"]
        assert (bad.chunk_index, bad.status, bad.length) == (-1, Status.ERROR, request.length)
        assert bad.error is not None
        assert (bad.error.code, bad.error.field) == (code, field)
        assert results["before"].status is results["after"].status is Status.OK
        assert sorted(bench.lease.finished) == [0, 1, 2]
        for message in bench.outbox.sent:
            encoded = bench.codec.encode(message)
            assert len(encoded.value or b"") < 950_000, "a refusal must fit where a result fits"


def _with(change: Callable[[bytes], bytes]) -> bytes:
    return change(encode_request(a_request(["text"])))


DEAD: dict[str, tuple[bytes | None, str]] = {
    "null value": (None, "undecodable"),
    "empty value": (b"", "undecodable"),
    "no frame": (b"hello", "undecodable"),
    "truncated": (_with(lambda value: value[:-3]), "undecodable"),
    "trailing bytes": (_with(lambda value: value + b"\x00"), "undecodable"),
    "unknown fingerprint": (_with(lambda value: value[:2] + b"\x01" * 8 + value[10:]), "unknown_schema"),
    "another record of ours": (None, "unknown_schema"),
    "registry id without a registry": (b"\x00\x00\x00\x00\x07abc", "unknown_schema"),
    "over the cap": (b"\xc3\x01" + b"x" * 1_000_001, "too_large"),
    "no tenant": (encode_request(a_request(["text"], tenant_id="")), "no_identity"),
    "no correlation id": (encode_request(a_request(["text"], correlation_id="")), "no_identity"),
    "endless tenant": (encode_request(a_request(["text"], tenant_id="t" * 257)), "no_identity"),
    "lone surrogate": (_with(lambda value: value.replace(b"\x08text", b"\x08\xed\xa0\x80!")), "undecodable"),
}


@pytest.mark.parametrize("name", DEAD)
async def test_what_is_no_request_becomes_a_dead_letter_and_spares_its_neighbours(name: str) -> None:
    """The original bytes, untouched, under one class; the stream goes on."""
    value, reason = DEAD[name]
    async with Bench() as bench:
        if name == "another record of ours":
            await bench.handle(a_request(["first"], correlation_id="first"))
            value = bench.codec.encode(bench.outbox.sent[-1]).value
        await bench.handle(value, a_request(["after"], correlation_id="after"))
        (letter,) = bench.outbox.letters
        assert letter.reason == reason
        assert letter.record.value == value
        assert bench.outbox.results[-1].status is Status.OK


ODD_TEXTS = ["a\x00b", "<|endoftext|>", "\ufeff", "\u202egnirts", "👩‍👩‍👧" * 3, "\r\n\t x"]


@pytest.mark.parametrize("text", ODD_TEXTS)
async def test_odd_texts_are_texts_like_any_other(text: str) -> None:
    """NUL, special tokens and control characters are embedded as they are."""
    async with Bench() as bench:
        await bench.handle(a_request([text]))
        assert bench.provider.asked == [[text]]
        assert bench.outbox.results[0].status is Status.OK


BAD_CHUNKS: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("empty", ["", "fine"], {}, "empty_text"),
    ("blank", [" \n ", "fine"], {}, "empty_text"),
    ("too long", ["w " * 11, "fine"], {}, "text_too_long"),
    ("expired", ["late"], {"deadline_ms": NOW_MS - 1}, "deadline_exceeded"),
]


@pytest.mark.parametrize("name, texts, overrides, code", BAD_CHUNKS)
async def test_a_bad_chunk_fails_alone(name: str, texts: list[str], overrides: dict[str, Any], code: str) -> None:
    """Faults of a chunk are its own error result, with its chunk id and index; its neighbours are `ok`."""
    async with Bench() as bench:
        await bench.handle(a_request(chunks=some_chunks(texts), **overrides))
        by_index = {result.chunk_index: result for result in bench.outbox.results}
        error = by_index[0].error
        assert error is not None, name
        assert (error.code, by_index[0].chunk_id) == (code, "c0")
        assert all(by_index[i].status is Status.OK for i in range(1, len(texts)))


async def test_the_interactive_lane_refuses_what_is_not_interactive() -> None:
    """`wrong_lane` for deletes, manifests and batches on the query topic."""
    async with Bench(lane=Lane.INTERACTIVE, window_max_wait_s=0.0) as bench:
        await bench.handle(
            a_request(["a"], action="batch_process"),
            a_request(action="delete", chunks=(), chunk_ids=("a",), vector_spaces=("s",), correlation_id="d"),
            a_request(["a"], action="generate_query", correlation_id="q"),
        )
        codes = [result.error.code if result.error else "ok" for result in bench.outbox.results]
        assert sorted(codes) == ["ok", "wrong_lane", "wrong_lane"]


async def test_a_delete_without_a_sink_view_says_so() -> None:
    """`sink_view_off`, and no tombstone."""
    async with Bench(sink_view=False) as bench:
        await bench.handle(a_request(action="delete", chunks=(), chunk_ids=("a",), vector_spaces=("s",)))
        error = bench.outbox.results[0].error
        assert error is not None
        assert error.code == "sink_view_off"
        assert bench.outbox.sink == []
