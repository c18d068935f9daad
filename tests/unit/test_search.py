"""The search for a text that the provider refuses: how many calls it takes, and that nobody else suffers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.domain import Status
from processor.errors import InputRejected, ProviderError, ProviderThrottled, ProviderTransient
from tests.support import steps
from tests.support.builders import a_request
from tests.support.steps import Bench

LARGE = replace(steps.MODEL, max_inputs_per_call=512, max_tokens_per_call=10_000)


@pytest.fixture(autouse=True)
def _a_model_of_large_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MODEL", LARGE)


def outcomes(bench: Bench) -> list[str]:
    """By chunk: its error code, or ok."""
    results = sorted(bench.outbox.results, key=lambda result: result.chunk_index)
    return [result.error.code if result.error else "ok" for result in results]


@pytest.mark.parametrize("culprit", [0, 1, 127, 200, 255])
async def test_a_refused_text_is_found_by_log2_n_calls(culprit: int) -> None:
    """One text among n costs log2(n) calls, one to be certain, and one that its spared neighbours share."""
    texts = 256
    async with Bench() as bench:
        bench.provider.refuses = lambda asked: (
            InputRejected("refused", http_status=400) if f"t{culprit}" in asked else None
        )
        await bench.handle(a_request([f"t{i}" for i in range(texts)]))
        assert outcomes(bench) == ["provider_rejects" if i == culprit else "ok" for i in range(texts)]
        assert len(bench.provider.asked) <= 1 + math.log2(texts) + 2


@settings(max_examples=30, deadline=None)
@given(culprits=st.sets(st.integers(0, 30)), noise=st.lists(st.sampled_from(["500", "429", ""]), max_size=30))
async def test_every_refused_text_fails_and_nobody_else(culprits: set[int], noise: list[str]) -> None:
    """Any number of refused texts, amid faults of the provider: exactly they are rejected."""
    refused = {f"t{i}" for i in culprits}
    weather = iter(noise)

    def refuse(asked: object) -> ProviderError | None:
        match next(weather, ""):
            case "500":
                return ProviderTransient("server_error", http_status=500)
            case "429":
                return ProviderThrottled("rate_limited", http_status=429, retry_after_s=1.0)
        assert isinstance(asked, list)
        return InputRejected("refused", http_status=400) if refused.intersection(asked) else None

    async with Bench() as bench:
        bench.provider.refuses = refuse
        await bench.handle(a_request([f"t{i}" for i in range(31)]))
        assert outcomes(bench) == ["provider_rejects" if i in culprits else "ok" for i in range(31)]
        assert sum(bench.attributed().values()) == sum(bench.provider.bills.values())


async def test_a_search_that_finds_nobody_leaves_nobody_behind() -> None:
    """A provider that refuses a call and half of it, and then neither: the half that was spared is embedded too."""
    async with Bench() as bench:
        bench.provider.script = [InputRejected("refused", http_status=400) for _ in range(2)]
        await bench.handle(a_request([f"t{i}" for i in range(8)]))
        assert outcomes(bench) == ["ok"] * 8
        assert bench.lease.finished == [0]


async def test_a_text_that_always_fails_is_found_and_random_faults_convict_nobody() -> None:
    """A 500 for one text, while every fifth call fails by chance: only that text is rejected."""
    calls = 0

    def refuse(asked: object) -> ProviderError | None:
        nonlocal calls
        calls += 1
        assert isinstance(asked, list)
        failed = calls % 5 == 0 or "t7" in asked
        return ProviderTransient("server_error", http_status=500) if failed else None

    async with Bench() as bench:
        bench.provider.refuses = refuse
        await bench.publish(a_request([f"t{i}" for i in range(64)]))
        others = 0
        while sum(result.status is Status.ERROR for result in bench.outbox.results) == 0 and others < 1_000:
            await bench.publish(a_request([f"other {others}"], correlation_id=f"o{others}", document_id=None))
            await bench.step()
            others += 1
        await bench.run_until_idle()
        failed = [result for result in bench.outbox.results if result.status is Status.ERROR]
        assert [(result.chunk_index, result.error.code) for result in failed if result.error] == [
            (7, "provider_rejects")
        ]
        assert not bench.worker._tickets
        assert len(bench.outbox.results) == 64 + others


@pytest.mark.parametrize("reason", [InputRejected("refused", http_status=400), ProviderTransient("server_error")])
async def test_an_outage_in_the_middle_of_a_search_convicts_nobody(reason: ProviderError) -> None:
    """What fails while nobody else succeeds says nothing of a text, even of the last suspect."""
    texts, away_until_s = [f"t{i}" for i in range(8)], math.inf

    def refuse(asked: object) -> ProviderError | None:
        assert isinstance(asked, list)
        if set(asked) == set(texts):
            return reason
        searching = bool(set(asked) & set(texts))
        return ProviderTransient("no_connection") if searching and bench.clock.now_s < away_until_s else None

    async with Bench() as bench:
        bench.provider.refuses = refuse
        await bench.publish(a_request(texts))
        others = 0
        while not any(0 < len(set(asked) & set(texts)) < 8 for asked in bench.provider.asked):
            others += 1
            await bench.publish(a_request([f"other {others}"], correlation_id=f"o{others}", document_id=None))
            await bench.step()
            assert others < 1_000
        while bench.clock.now_s < 3_600:
            await bench.step()
        assert all(result.error is None for result in bench.outbox.results)
        away_until_s = 0.0
        texts = ["none of them is at fault after all"]
        await bench.run_until_idle()
        assert all(result.error is None for result in bench.outbox.results)
        assert len(bench.outbox.results) == 8 + others


async def test_a_search_ends_though_nobody_else_comes() -> None:
    """The neighbours of the last suspect show that the provider works: they don't wait for what waits for them."""

    def refuse(asked: object) -> ProviderError | None:
        assert isinstance(asked, list)
        return ProviderTransient("server_error", http_status=500) if "t7" in asked else None

    async with Bench() as bench:
        bench.provider.refuses = refuse
        await bench.publish(a_request([f"t{i}" for i in range(16)]))
        others = 0
        while not any("t7" in asked and len(asked) < 16 for asked in bench.provider.asked):
            others += 1
            await bench.publish(a_request([f"other {others}"], correlation_id=f"o{others}", document_id=None))
            await bench.step()
            assert others < 1_000
        await bench.run_until_idle()
        assert outcomes_of(bench) == {7: "provider_rejects"}


def outcomes_of(bench: Bench) -> dict[int, str]:
    """The errors, by chunk."""
    return {result.chunk_index: result.error.code for result in bench.outbox.results if result.error}
