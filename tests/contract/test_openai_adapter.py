"""The openai adapter against a real HTTP server: what is sent, what is read, what each fault becomes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator

import numpy as np
import pytest

from processor.adapters.openai import OpenAIProvider
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate
from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
)
from tests.support.provider_server import Faults, Options, ProviderServer, count_tokens, expected_vector

CANARY = "canary-7d1f the customer's own words"


def a_function(dimensions: int = 1536, model: str = "text-embedding-3-small") -> EmbeddingFunction:
    spec = ModelSpec(name=model, weights=model, dimensions=(1536,), shortenable=True)
    return EmbeddingFunction(spec, spec.space(dimensions), InputType.DOCUMENT, "", Truncate.ERROR)


def a_provider(server: ProviderServer, *, timeout_s: float = 5.0, key: str = "sk-test") -> OpenAIProvider:
    return OpenAIProvider(api_key=key, base_url=server.base_url, timeout_s=timeout_s, connect_timeout_s=1.0)


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    async with ProviderServer() as server:
        yield server


@pytest.fixture
async def provider(server: ProviderServer) -> AsyncIterator[OpenAIProvider]:
    provider = a_provider(server)
    yield provider
    await provider.close()


async def test_the_attempt_id_travels_and_the_bill_comes_back(server: ProviderServer, provider: OpenAIProvider) -> None:
    """One call is one request, known to the provider by the attempt id."""
    answer = await provider.embed(["one", "two <|endoftext|>"], a_function(), "attempt-1")
    assert [call.attempt_id for call in server.ledger] == ["attempt-1"]
    assert answer.billed_tokens == server.billed_tokens == count_tokens("one") + count_tokens("two <|endoftext|>")


@pytest.mark.parametrize("fault", ["", "ignores_base64"])
async def test_vectors_are_bit_exact_in_both_encodings(
    fault: str, server: ProviderServer, provider: OpenAIProvider
) -> None:
    """Base64 and float lists give the same float32 bits."""
    server.script(fault)
    texts = ["a", "naïve 文 \x00", "c" * 1000]
    answer = await provider.embed(texts, a_function(), "a")
    for text, vector in zip(texts, answer.vectors, strict=True):
        assert vector.dtype == np.float32
        assert np.array_equal(vector, expected_vector(text, 1536))


async def test_dimensions_are_sent_only_when_they_are_not_the_models_own() -> None:
    """Older models refuse the parameter, so the default goes unsaid."""
    async with ProviderServer(Options(models={"text-embedding-3-small": 1535})) as server:
        provider = a_provider(server)
        unsaid = await provider.embed(["x"], a_function(1536), "a")
        said = await provider.embed(["x"], a_function(256), "b")
        await provider.close()
    assert (unsaid.vectors[0].size, said.vectors[0].size) == (1535, 256)


@pytest.mark.parametrize(
    "fault,kind,http_status",
    [
        ("401", ProviderPaused, 401),
        ("403", ProviderPaused, 403),
        ("quota", ProviderPaused, 429),
        ("429", ProviderThrottled, 429),
        ("400", InputRejected, 400),
        ("422", InputRejected, 422),
        ("context_length", CallTooLarge, 400),
        ("tokens_per_request", CallTooLarge, 400),
        ("413", CallTooLarge, 413),
        ("404", ModelRejected, 404),
        ("bad_dimensions", ModelRejected, 400),
        ("500", ProviderTransient, 500),
        ("503", ProviderTransient, 503),
        ("502", ProviderTransient, None),
        ("reset", ProviderTransient, None),
        ("reset_billed", ProviderTransient, None),
        ("truncated_body", ProviderTransient, None),
        ("broken_json", ProviderTransient, None),
        ("200_error", ProviderTransient, None),
        ("hang", ProviderTransient, None),
    ],
)
async def test_each_fault_has_its_error_and_none_quotes_the_text(
    fault: str,
    kind: type[ProviderError],
    http_status: int | None,
    server: ProviderServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A status is named only if the provider itself answered; text and key stay out of errors and logs."""
    caplog.set_level(logging.DEBUG)
    provider = a_provider(server, timeout_s=0.3 if fault == "hang" else 5.0, key="sk-canary-7d1f")
    server.script(fault)
    with pytest.raises(ProviderError) as caught:
        await provider.embed([CANARY], a_function(), "a")
    await provider.close()

    assert type(caught.value) is kind
    assert caught.value.http_status == http_status
    assert len(server.ledger) == 1
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    told = "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value)) + caplog.text
    assert "canary-7d1f" not in told


async def test_the_wait_that_the_provider_asks_for_is_passed_on(
    server: ProviderServer, provider: OpenAIProvider
) -> None:
    """Retry-After of a 429 and of a 503."""
    server.set_faults(Faults(script=["429", "503"], retry_after="1.5"))
    for code in ("rate_limited", "overloaded"):
        with pytest.raises(ProviderThrottled) as caught:
            await provider.embed(["x"], a_function(), "a")
        assert (caught.value.code, caught.value.retry_after_s) == (code, 1.5)


@pytest.mark.parametrize(
    "fault,vectors,indices,model",
    [
        ("wrong_count", 1, [0], "text-embedding-3-small"),
        ("shuffled", 2, [1, 0], "text-embedding-3-small"),
        ("duplicate_index", 2, [0, 0], "text-embedding-3-small"),
        ("wrong_model", 2, [0, 1], "another-model"),
    ],
)
async def test_a_paid_answer_is_handed_over_as_it_came(
    fault: str, vectors: int, indices: list[int], model: str, server: ProviderServer, provider: OpenAIProvider
) -> None:
    """What is wrong with a billed answer is for the verification to judge: its bill must be read."""
    server.set_faults(Faults(script=[fault], seed=1))
    answer = await provider.embed(["x", "y"], a_function(), "a")
    assert (len(answer.vectors), list(answer.indices), answer.model) == (vectors, indices, model)
    assert answer.billed_tokens == server.billed_tokens > 0


async def test_no_usage_is_no_bill(server: ProviderServer, provider: OpenAIProvider) -> None:
    """A server that does not say what it billed leaves the bill open."""
    server.script("no_usage")
    assert (await provider.embed(["x"], a_function(), "a")).billed_tokens is None


async def test_nobody_listening_is_transient() -> None:
    """A refused connection is tried again."""
    async with ProviderServer() as server:
        provider = a_provider(server)
    with pytest.raises(ProviderTransient) as caught:
        await provider.embed(["x"], a_function(), "a")
    await provider.close()
    assert caught.value.http_status is None


async def test_models_are_listed_and_a_wrong_key_pauses() -> None:
    """Health and doctor learn of the key without embedding anything."""
    async with ProviderServer(Options(api_key="right")) as server:
        right, wrong = a_provider(server, key="right"), a_provider(server, key="wrong")
        assert "text-embedding-3-small" in await right.list_models()
        with pytest.raises(ProviderPaused):
            await wrong.list_models()
        await right.close()
        await wrong.close()
    assert server.ledger == []
