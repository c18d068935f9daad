"""The cohere adapter against a real HTTP server: what is sent, what is read, what each fault becomes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import numpy as np
import pytest

from processor.adapters.catalogue import load_catalogue
from processor.adapters.cohere import CohereProvider
from processor.domain import EmbeddingFunction, InputType, Truncate
from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
    SettingsError,
)
from processor.settings import load
from tests.support.cohere_server import CohereServer, cohere_vector
from tests.support.logged import assert_untold
from tests.support.provider_server import count_tokens
from tests.support.timers import out_of_time

CANARY = "canary-7d1f the customer's own words"
TIMEOUT_S = 60.0


def a_function(
    model: str = "embed-v4.0", dimensions: int | None = None, input_type: InputType = InputType.DOCUMENT
) -> EmbeddingFunction:
    spec = load_catalogue(load(provider="cohere", _env_file=None)).find(model)
    assert spec is not None
    return EmbeddingFunction(spec, spec.space(dimensions or spec.dimensions[0]), input_type, "", Truncate.ERROR)


def a_provider(server: CohereServer, *, key: str = "co-test") -> CohereProvider:
    return CohereProvider(
        api_key=key,
        base_url=server.base_url,
        timeout_s=TIMEOUT_S,
        connect_timeout_s=TIMEOUT_S,
        read_timeout_s=TIMEOUT_S,
    )


@pytest.fixture
async def server() -> AsyncIterator[CohereServer]:
    async with CohereServer() as server:
        yield server


@pytest.fixture
async def provider(server: CohereServer) -> AsyncIterator[CohereProvider]:
    provider = a_provider(server)
    yield provider
    await provider.close()


@pytest.mark.parametrize(
    "input_type,said", [(InputType.DOCUMENT, "search_document"), (InputType.QUERY, "search_query")]
)
async def test_what_a_text_is_for_is_said(
    input_type: InputType, said: str, server: CohereServer, provider: CohereProvider
) -> None:
    """Queries and documents have vectors of their own, and nothing is ever cut by the provider."""
    answer = await provider.embed(["text"], a_function(input_type=input_type), "attempt-1")
    request = server.received[0]
    assert (request.body["input_type"], request.body["truncate"]) == (said, "NONE")
    assert (request.headers["X-Client-Name"], request.headers["X-Client-Request-Id"]) == (
        "embedding-processor",
        "attempt-1",
    )
    assert np.array_equal(answer.vectors[0], cohere_vector("text", said, 1536))


@pytest.mark.parametrize("fault", ["", "ignores_base64", "doubles"])
async def test_vectors_are_bit_exact_in_every_encoding(
    fault: str, server: CohereServer, provider: CohereProvider
) -> None:
    """Base64 of either width and float lists give the same float32 bits."""
    server.script(fault)
    texts = ["a", "naïve 文 \x00", "c" * 1000]
    answer = await provider.embed(texts, a_function(), "a")
    for text, vector in zip(texts, answer.vectors, strict=True):
        assert vector.dtype == np.float32
        assert np.array_equal(vector, cohere_vector(text, "search_document", 1536))


async def test_dimensions_are_sent_only_when_they_are_not_the_models_own(
    server: CohereServer, provider: CohereProvider
) -> None:
    """Models before embed-v4.0 refuse the parameter, so the default goes unsaid."""
    sizes = [
        (await provider.embed(["x"], function, "a")).vectors[0].size
        for function in (a_function(), a_function(dimensions=256), a_function("embed-english-v3.0"))
    ]
    assert sizes == [1536, 256, 1024]
    assert ["output_dimension" in request.body for request in server.received] == [False, True, False]


async def test_the_bill_is_that_of_its_billed_units(server: CohereServer, provider: CohereProvider) -> None:
    """Cohere's own count, written as a decimal; an answer without it leaves the bill open."""
    answer = await provider.embed(["one", "two words"], a_function(), "attempt-1")
    assert answer.billed_tokens == server.billed_tokens == count_tokens("one") + count_tokens("two words")
    assert isinstance(answer.billed_tokens, int)
    server.script("no_usage")
    assert (await provider.embed(["x"], a_function(), "a")).billed_tokens is None


@pytest.mark.parametrize(
    "fault,kind,code,http_status",
    [
        ("401", ProviderPaused, "key_refused", 401),
        ("402", ProviderPaused, "payment_required", 402),
        ("403", ProviderPaused, "forbidden", 403),
        ("498", ProviderPaused, "key_refused", 498),
        ("quota", ProviderPaused, "quota_exhausted", 429),
        ("429", ProviderThrottled, "rate_limited", 429),
        ("400", InputRejected, "input_refused", 400),
        ("too_many_texts", CallTooLarge, "call_too_large", 400),
        ("too_many_tokens", CallTooLarge, "call_too_large", 400),
        ("404", ModelRejected, "model_refused", 404),
        ("bad_dimensions", ModelRejected, "model_refused", 400),
        ("bad_input_type", ModelRejected, "model_refused", 400),
        ("499", ProviderTransient, "try_again", 499),
        ("500", ProviderTransient, "server_error", 500),
        ("503", ProviderTransient, "server_error", 503),
        ("504", ProviderTransient, "gateway_504", None),
        ("reset", ProviderTransient, "no_connection", None),
        ("reset_billed", ProviderTransient, "no_connection", None),
        ("truncated_body", ProviderTransient, "broken_body", None),
        ("broken_json", ProviderTransient, "broken_body", None),
        ("hang", ProviderTransient, "timeout", None),
    ],
)
async def test_each_fault_has_its_error_and_none_quotes_the_text(
    fault: str,
    kind: type[ProviderError],
    code: str,
    http_status: int | None,
    server: CohereServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A status is named only if the provider itself answered; text and key stay out of errors and logs."""
    caplog.set_level(logging.DEBUG)
    provider = a_provider(server, key="co-canary-7d1f")
    server.script(fault)
    call = provider.embed([CANARY], a_function(), "a")
    with pytest.raises(ProviderError) as caught:
        await out_of_time(call, timeout_s=TIMEOUT_S, silent=server.silent)
    await provider.close()

    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.http_status) == (code, http_status)
    assert len(server.ledger) == 1
    assert_untold("canary-7d1f", caught.value, caplog)


async def test_a_call_of_several_texts_that_takes_too_long_is_too_large(server: CohereServer) -> None:
    """Smaller calls may be answered in time; whether this one was billed stays open."""
    provider = a_provider(server)
    server.script("hang_billed")
    call = provider.embed(["x", "y"], a_function(), "a")
    with pytest.raises(CallTooLarge, match="timeout") as caught:
        await out_of_time(call, timeout_s=TIMEOUT_S, silent=server.silent)
    await provider.close()
    assert caught.value.http_status is None


async def test_the_wait_that_the_provider_asks_for_is_passed_on() -> None:
    """Retry-After of a 429 and of a 503."""
    async with CohereServer(retry_after="1.5") as server:
        provider = a_provider(server)
        server.script("429", "503")
        for code in ("rate_limited", "overloaded"):
            with pytest.raises(ProviderThrottled) as caught:
                await provider.embed(["x"], a_function(), "a")
            assert (caught.value.code, caught.value.retry_after_s) == (code, 1.5)
        await provider.close()


@pytest.mark.parametrize("fault,sizes", [("wrong_count", [1536]), ("wrong_dimension", [1536, 1535])])
async def test_a_paid_answer_is_handed_over_as_it_came(
    fault: str, sizes: list[int], server: CohereServer, provider: CohereProvider
) -> None:
    """What is wrong with a billed answer is for the verification to judge: its bill must be read."""
    server.script(fault)
    answer = await provider.embed(["x", "y"], a_function(), "a")
    assert [vector.size for vector in answer.vectors] == sizes
    assert answer.billed_tokens == server.billed_tokens > 0


async def test_names_of_a_deployment_are_translated_both_ways() -> None:
    """A gateway may know a model by another name; ours is that of the catalogue."""
    async with CohereServer() as server:
        provider = CohereProvider(
            api_key="co-test",
            base_url=server.base_url + "/",
            timeout_s=TIMEOUT_S,
            connect_timeout_s=TIMEOUT_S,
            read_timeout_s=TIMEOUT_S,
            models={"ours": "embed-v4.0"},
        )
        assert "ours" in await provider.list_models()
        spec = a_function().model
        ours = EmbeddingFunction(
            type(spec)(name="ours", weights="w", dimensions=(1536,)),
            spec.space(1536),
            InputType.DOCUMENT,
            "",
            Truncate.ERROR,
        )
        assert (await provider.embed(["x"], ours, "a")).model == "ours"
        await provider.close()
    assert server.received[0].body["model"] == "embed-v4.0"


async def test_half_a_surrogate_pair_is_refused_and_not_sent(server: CohereServer, provider: CohereProvider) -> None:
    """It can't be written as UTF-8; the error does not quote it."""
    with pytest.raises(InputRejected, match="not_unicode") as caught:
        await provider.embed(["fine", "canary \ud800"], a_function(), "a")
    assert (caught.value.__context__, server.ledger) == (None, [])


def test_a_missing_key_is_told_at_start() -> None:
    """By the name of its setting."""
    with pytest.raises(SettingsError, match="EMBEDDING_COHERE_API_KEY"):
        a_provider(CohereServer(), key="")
