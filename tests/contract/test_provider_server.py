"""The test provider is what bills are checked against, so its own books are checked here."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.provider_limits import Account, duration
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
from tests.support.stack import until
from tests.support.timers import out_of_time

SMALL = "text-embedding-3-small"
TIMEOUT_S = 60.0


async def ask(server: ProviderServer, texts: list[str], attempt_id: str = "a") -> Any:
    """The answer's body, its status when it is not 200, or None when none came."""
    body = {"model": SMALL, "input": texts, "dimensions": 8}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as client:
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
        asked = ask(server, ["hello world", "x"], "attempt-7")
        answer = await out_of_time(asked, timeout_s=TIMEOUT_S, silent=server.silent)
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
    async with ProviderServer(Options(limits=limits), clock=_Clock()) as server:
        answers = [await ask(server, ["x"]) for _ in range(3)]
    assert [answer == 429 for answer in answers] == [False, False, True]
    assert server.billed_tokens == 2


async def test_the_headers_of_an_answer_tell_what_is_left() -> None:
    """As OpenAI's: limits per minute, what is left of them, and the time until all of it is back."""
    limits = Limits(requests_per_minute=60, tokens_per_minute=6000)
    server = ProviderServer(Options(limits=limits), clock=_Clock())
    async with server, aiohttp.ClientSession() as client:
        body = {"model": SMALL, "input": "x " * 1000}
        async with client.post(f"{server.base_url}/embeddings", json=body) as answer:
            told = {name.lower(): value for name, value in answer.headers.items() if "ratelimit" in name.lower()}
    tokens = server.ledger[0].tokens
    assert told == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": str(6000 - tokens),
        "x-ratelimit-reset-tokens": duration(tokens / 100),
    }


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 400)), min_size=1, max_size=200),
    st.integers(1, 300),
    st.integers(100, 5000),
)
def test_no_minute_lets_in_more_than_a_burst_and_what_flowed_in(
    asked: list[tuple[float, int]], requests: int, tokens: int
) -> None:
    """Whatever the order of the requests; a call over what a bucket holds leaves a debt, and no more."""
    clock = _Clock()
    account = Account(Limits(requests_per_minute=requests, tokens_per_minute=tokens, burst=0.5), clock)
    started, count, used, largest = clock.now, 0, 0, 0
    for gap_s, size in asked:
        clock.now += gap_s
        refusal = account.admit(size)
        assert (refusal is not None and refusal.wait_s is None) == (size > tokens)
        if refusal is None:
            count, used, largest = count + 1, used + size, max(largest, size)
        minutes = (clock.now - started) / 60
        assert count <= max(1, requests / 2) + requests * minutes + 1e-6
        assert used <= tokens / 2 + tokens * minutes + max(0, largest - tokens / 2) + 1e-6


def test_a_refused_request_passes_after_the_wait_it_was_told() -> None:
    """And not before; asking meanwhile costs requests, as at OpenAI."""
    clock = _Clock()
    account = Account(Limits(requests_per_minute=60, tokens_per_minute=600), clock)
    assert account.admit(600) is None
    refusal = account.admit(100)
    assert refusal is not None
    assert (refusal.of, refusal.wait_s) == ("tokens", 10.0)
    assert "Please try again in 10s." in str(refusal)
    clock.now += 9.9
    assert account.admit(100) is not None
    clock.now += 0.2
    assert account.admit(100) is None
    before = account.headers()["x-ratelimit-remaining-requests"]
    assert account.admit(1000) is not None
    assert int(account.headers()["x-ratelimit-remaining-requests"]) == int(before) - 1


def test_time_can_be_scaled_and_limits_changed_while_it_runs() -> None:
    """With a scale of 10 a minute is over in 6 seconds; a change keeps what was used."""
    clock = _Clock()
    account = Account(Limits(tokens_per_minute=600, time_scale=10), clock)
    assert account.admit(600) is None
    clock.now += 3
    told = account.headers()
    assert told["x-ratelimit-limit-tokens"] == "6000"
    assert (told["x-ratelimit-remaining-tokens"], told["x-ratelimit-reset-tokens"]) == ("300", "3s")
    account.change(Limits(tokens_per_minute=200, time_scale=10))
    assert account.headers()["x-ratelimit-remaining-tokens"] == "0"
    account.change(Limits())
    assert account.headers() == {}
    assert account.admit(10**9) is None


@pytest.mark.parametrize(
    "seconds,written",
    [(0, "0s"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (3723.25, "1h2m3.25s"), (59.9999, "1m0s")],
)
def test_a_duration_is_written_as_in_these_headers(seconds: float, written: str) -> None:
    """And never shorter than it is."""
    assert duration(seconds) == written


async def test_the_call_is_measured_by_the_providers_own_estimator() -> None:
    """UTF-8 bytes / 4 over the limit is refused, whatever the tokens are; the last byte under it is not."""
    async with ProviderServer(Options(max_call_tokens=100)) as server:
        answers = [await ask(server, [" " * 200, "é" * 100 + "x" * more]) for more in (0, 1)]
    assert [answer == 400 for answer in answers] == [False, True]
    assert server.ledger[0].tokens != 100


async def test_work_over_the_servers_own_capacity_waits_or_is_refused() -> None:
    """One at a time is one after the other; a full house refuses."""
    async with ProviderServer(Options(base_ms=100, max_concurrent=1)) as server:
        assert all(isinstance(each, dict) for each in await asyncio.gather(*(ask(server, ["x"]) for _ in range(3))))
    done_ms = sorted(call.done_ms or 0 for call in server.ledger)
    assert all(later - earlier >= 99 for earlier, later in pairwise(done_ms))
    async with ProviderServer(Options(refuse_over=2)) as server:
        server.script("hang", "hang")
        in_work = [asyncio.create_task(ask(server, ["x"])) for _ in range(2)]
        await until(lambda: len(server.ledger) == 2, within_s=30, what="two are in work", every_s=0.01)
        assert await ask(server, ["x"]) == 503
        assert [call.fault for call in server.ledger] == ["hang", "hang", "overloaded"]
        for each in in_work:
            each.cancel()
        await asyncio.gather(*in_work, return_exceptions=True)


def test_as_a_process_it_is_driven_by_its_admin() -> None:
    """Faults are set, the ledger is read and forgotten over HTTP; it ends with its parent's pipe."""
    with ProviderProcess("--model", "tiny:4", "--tokens", "bytes4") as server:
        server.admin("limits", {"requests_per_minute": 2})
        server.admin("faults", {"script": ["503"]})
        request = urllib.request.Request(
            f"{server.base_url}/embeddings", json.dumps({"model": "tiny", "input": "hello world"}).encode()
        )
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(request, timeout=TIMEOUT_S)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            assert len(json.load(answer)["data"][0]["embedding"]) == 4
        with pytest.raises(urllib.error.HTTPError, match="429"):
            urllib.request.urlopen(request, timeout=TIMEOUT_S)
        ledger = server.admin("ledger")
        server.admin("reset", {})
        forgotten = server.admin("ledger")
    assert [(call["tokens"], call["billed"]) for call in ledger["requests"]] == [(3, False), (3, True), (3, False)]
    assert (ledger["billed_tokens"], forgotten) == (3, {"requests": [], "billed_tokens": 0})
    assert server._process.returncode == 0


def test_an_unknown_fault_is_refused() -> None:
    """A misspelt fault would make a test that cannot fail."""
    with pytest.raises(ValueError, match="unknown faults"):
        Faults(script=["5000"])


def test_tokens_are_exact_or_a_quarter_of_the_bytes() -> None:
    """Both ways of counting, for models with and without a known tokenizer."""
    assert (count_tokens("hello world"), count_tokens("hello world", "bytes4")) == (2, 3)
