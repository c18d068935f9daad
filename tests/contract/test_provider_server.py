"""The test provider is what bills are checked against, so its own books are checked here."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.provider_server import (
    BILLED_FAULTS,
    FAULTS,
    Faults,
    Limits,
    Options,
    ProviderProcess,
    ProviderServer,
    count_tokens,
    expected_vector,
)

SMALL = "text-embedding-3-small"


async def ask(server: ProviderServer, texts: list[str], attempt_id: str = "a", timeout_s: float = 5.0) -> Any:
    """The answer's body, its status when it is not 200, or None when none came."""
    body = {"model": SMALL, "input": texts, "dimensions": 8}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as client:
        try:
            async with client.post(
                f"{server.base_url}/embeddings", json=body, headers={"X-Client-Request-Id": attempt_id}
            ) as answer:
                return await answer.json() if answer.status == 200 else answer.status
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None


@given(st.text(max_size=30), st.text(max_size=30), st.integers(2, 3072))
def test_a_vector_belongs_to_its_text_alone(one: str, other: str, dimensions: int) -> None:
    """The same text has the same vector, another text another, each of length 1."""
    vector = expected_vector(one, dimensions)
    assert np.array_equal(vector, expected_vector(one, dimensions))
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    assert np.array_equal(vector, expected_vector(other, dimensions)) == (one == other)


@pytest.mark.parametrize("fault", sorted(FAULTS - {""}))
async def test_the_books_say_what_was_billed_and_answered(fault: str) -> None:
    """Work that was done is billed whatever became of the answer; a refusal is not."""
    async with ProviderServer() as server:
        server.script(fault)
        answer = await ask(server, ["hello world", "x"], "attempt-7", timeout_s=0.3)
        [call] = server.ledger
    came = fault not in {"reset", "hang", "reset_billed", "hang_billed", "truncated_body", "stalled_body"}
    assert (call.attempt_id, call.inputs, call.tokens, call.fault) == ("attempt-7", 2, 3, fault)
    assert call.billed == (fault in BILLED_FAULTS)
    assert call.answered == came
    assert (answer is not None) == (came and fault != "broken_json")
    assert server.billed_tokens == 3 * call.billed


async def test_jitter_moves_a_vector_a_little_each_time() -> None:
    """As real providers do: never the same bits, always the same meaning."""
    async with ProviderServer(Options(jitter=0.01)) as server:
        rows = [np.array((await ask(server, ["text"]))["data"][0]["embedding"]) for _ in range(2)]
    assert not np.array_equal(rows[0], rows[1])
    for row in rows:
        assert row @ expected_vector("text", 8) == pytest.approx(1, abs=1e-3)


async def test_a_poisonous_text_spoils_its_call_and_no_other() -> None:
    """The marker decides, whatever the script says."""
    async with ProviderServer() as server:
        server.set_faults(Faults(poison={"POISON": "500", "ARSENIC": "400"}))
        answers = [await ask(server, texts) for texts in (["a", "b POISON"], ["a"], ["ARSENIC"])]
    assert answers[0] == 500
    assert isinstance(answers[1], dict)
    assert answers[2] == 400


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=2), Limits(tokens_per_minute=2)])
async def test_a_limit_refuses_with_a_wait(limits: Limits) -> None:
    """429 once the minute's allowance is used up; nothing is billed for it."""
    async with ProviderServer(Options(limits=limits)) as server:
        answers = [await ask(server, ["x"]) for _ in range(3)]
    assert [answer == 429 for answer in answers] == [False, False, True]
    assert server.billed_tokens == 2


def test_as_a_process_it_is_driven_by_its_admin() -> None:
    """Faults are set, the ledger is read and forgotten over HTTP; it ends with its parent's pipe."""
    with ProviderProcess("--model", "tiny:4", "--tokens", "bytes4") as server:
        server.admin("faults", {"script": ["503"]})
        request = urllib.request.Request(
            f"{server.base_url}/embeddings", json.dumps({"model": "tiny", "input": "hello world"}).encode()
        )
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(request, timeout=5)
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert len(json.load(answer)["data"][0]["embedding"]) == 4
        ledger = server.admin("ledger")
        server.admin("reset", {})
        forgotten = server.admin("ledger")
    assert [(call["tokens"], call["billed"]) for call in ledger["requests"]] == [(3, False), (3, True)]
    assert (ledger["billed_tokens"], forgotten) == (3, {"requests": [], "billed_tokens": 0})
    assert server._process.returncode == 0


def test_an_unknown_fault_is_refused() -> None:
    """A misspelt fault would make a test that cannot fail."""
    with pytest.raises(ValueError, match="unknown faults"):
        Faults(script=["5000"])


def test_tokens_are_exact_or_a_quarter_of_the_bytes() -> None:
    """Both ways of counting, for models with and without a known tokenizer."""
    assert (count_tokens("hello world"), count_tokens("hello world", "bytes4")) == (2, 3)
