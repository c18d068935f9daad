"""The openai adapter against a real HTTP server: what is sent, what is read, what each fault becomes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from aiohttp import web

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
from tests.support.logged import assert_untold
from tests.support.provider_server import Faults, Limits, Options, ProviderServer, count_tokens, expected_vector
from tests.support.steps import VirtualClock
from tests.support.timers import out_of_time

CANARY = "canary-7d1f the customer's own words"
TIMEOUT_S = 60.0


def a_function(dimensions: int = 1536, model: str = "text-embedding-3-small") -> EmbeddingFunction:
    spec = ModelSpec(name=model, weights=model, dimensions=(1536,), shortenable=True)
    return EmbeddingFunction(spec, spec.space(dimensions), InputType.DOCUMENT, "", Truncate.ERROR)


def a_provider(
    server: ProviderServer,
    *,
    timeout_s: float = TIMEOUT_S,
    read_timeout_s: float | None = None,
    key: str = "sk-test",
    models: Mapping[str, str] | None = None,
) -> OpenAIProvider:
    return OpenAIProvider(
        api_key=key,
        base_url=server.base_url,
        timeout_s=timeout_s,
        read_timeout_s=read_timeout_s,
        connect_timeout_s=TIMEOUT_S,
        models=models,
    )


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
        ("too_many_inputs", CallTooLarge, 400),
        ("overloaded", ProviderThrottled, 503),
        ("out_of_memory", ProviderTransient, 500),
        ("200_429", ProviderThrottled, None),
        ("stalled_body", ProviderTransient, None),
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
    provider = a_provider(server, key="sk-canary-7d1f")
    server.script(fault)
    call = provider.embed([CANARY], a_function(), "a")
    with pytest.raises(ProviderError) as caught:
        await out_of_time(call, timeout_s=TIMEOUT_S, silent=server.silent)
    await provider.close()

    assert type(caught.value) is kind
    assert caught.value.http_status == http_status
    assert len(server.ledger) == 1
    assert_untold("canary-7d1f", caught.value, caplog)


def with_date(retry_after: str | None) -> str | None:
    """ "date +90": the HTTP date of 90 seconds from now."""
    if retry_after is None or not retry_after.startswith("date"):
        return retry_after
    return formatdate(time.time() + float(retry_after.removeprefix("date")), usegmt=True)


@pytest.mark.parametrize(
    "faults,least_s,most_s",
    [
        (Faults(retry_after="1.5"), 1.5, 1.5),
        (Faults(retry_after="2", retry_after_ms="150"), 0.15, 0.15),
        (Faults(retry_after="date +90"), 60, 90),
        (Faults(retry_after="86400"), 86_400, 86_400),
        (Faults(body_delay="1.2s"), 1.2, 1.2),
        (Faults(body_delay="6m0s"), 360, 360),
        (Faults(retry_after="-5", body_delay="20ms"), 0.02, 0.02),
    ],
    ids=["seconds", "milliseconds", "date", "absurd", "body", "minutes in the body", "negative, but the body says"],
)
@pytest.mark.parametrize("fault", ["429", "503"])
async def test_the_wait_that_the_provider_asks_for_is_passed_on(
    fault: str, faults: Faults, least_s: float, most_s: float, server: ProviderServer, provider: OpenAIProvider
) -> None:
    """In the header, whatever its form, or in words alone; how much of it to obey is decided elsewhere."""
    server.set_faults(replace(faults, script=[fault], retry_after=with_date(faults.retry_after)))
    with pytest.raises(ProviderThrottled) as caught:
        await provider.embed(["x"], a_function(), "a")
    assert caught.value.retry_after_s is not None
    assert least_s <= caught.value.retry_after_s <= most_s


@pytest.mark.parametrize("retry_after", ["-1", "date -90", "soon", ""], ids=["negative", "past", "words", "none"])
async def test_a_wait_that_says_nothing_is_none(
    retry_after: str, server: ProviderServer, provider: OpenAIProvider
) -> None:
    """The caller backs off by its own measure then, instead of asking again at once."""
    server.set_faults(Faults(script=["429"], retry_after=with_date(retry_after)))
    with pytest.raises(ProviderThrottled) as caught:
        await provider.embed(["x"], a_function(), "a")
    assert caught.value.retry_after_s is None


async def test_a_limit_inside_a_success_is_a_limit(server: ProviderServer, provider: OpenAIProvider) -> None:
    """HTTP 200 with an error body asks to wait like any other, and leaves open what was billed."""
    server.set_faults(Faults(script=["200_429"], body_delay="3s"))
    with pytest.raises(ProviderThrottled) as caught:
        await provider.embed(["x", "y"], a_function(), "a")
    assert (caught.value.retry_after_s, caught.value.http_status) == (3.0, None)


async def test_answers_and_refusals_tell_of_the_limits() -> None:
    """What the headers say comes along with either, so the next call knows."""
    limits = Limits(requests_per_minute=3, tokens_per_minute=60)
    async with ProviderServer(Options(limits=limits), clock=VirtualClock().monotonic) as server:
        provider = a_provider(server)
        answer = await provider.embed(["one two three"], a_function(), "a")
        with pytest.raises(ProviderThrottled) as caught:
            await provider.embed(["one two three " * 19], a_function(), "b")
        await provider.close()
    assert answer.limits is not None
    assert (answer.limits.requests_per_minute, answer.limits.tokens_per_minute) == (3, 60)
    assert (answer.limits.remaining_requests, answer.limits.remaining_tokens) == (2, 57)
    assert caught.value.limits is not None
    assert caught.value.limits.remaining_requests == 1
    assert caught.value.retry_after_s == count_tokens("one two three " * 19) - 57 > 0


async def test_stale_headers_on_an_answer_ask_for_no_wait(server: ProviderServer, provider: OpenAIProvider) -> None:
    """A gateway may repeat the refusal's headers on the answer of the call made again: it is an answer all the same."""
    server.set_faults(Faults(script=["429", "stale_headers"], retry_after="60"))
    with pytest.raises(ProviderThrottled):
        await provider.embed(["x"], a_function(), "a")
    answer = await provider.embed(["x"], a_function(), "b")
    assert (len(answer.vectors), answer.limits) == (1, None)


@pytest.mark.parametrize("fault", ["hang", "hang_billed", "stalled_body"])
@pytest.mark.parametrize(
    "timeout_s,read_timeout_s", [(TIMEOUT_S, None), (10 * TIMEOUT_S, TIMEOUT_S)], ids=["whole call", "read"]
)
async def test_a_call_that_takes_too_long_is_too_large(
    fault: str, timeout_s: float, read_timeout_s: float | None, server: ProviderServer
) -> None:
    """Smaller ones may pass in time; what became of it nobody knows, so no status is claimed."""
    provider = a_provider(server, timeout_s=timeout_s, read_timeout_s=read_timeout_s)
    server.script(fault)
    call = provider.embed([CANARY, "y"], a_function(), "a")
    with pytest.raises(CallTooLarge) as caught:
        await out_of_time(call, timeout_s=TIMEOUT_S, silent=server.silent)
    assert (caught.value.code, caught.value.http_status) == ("timeout", None)
    assert (await provider.embed(["x"], a_function(), "b")).indices == [0]
    await provider.close()


async def test_a_server_out_of_memory_wants_smaller_calls(server: ProviderServer, provider: OpenAIProvider) -> None:
    """A local server says so with a 500; the refusal is an answer, and bills nothing."""
    server.script("out_of_memory")
    with pytest.raises(CallTooLarge) as caught:
        await provider.embed(["x", "y"], a_function(), "a")
    assert (caught.value.code, caught.value.http_status) == ("out_of_memory", 500)


async def test_a_cancelled_call_leaves_the_next_one_whole(server: ProviderServer, provider: OpenAIProvider) -> None:
    """The connection of an answer that nobody reads to its end is not used again."""
    server.script("stalled_body")
    call = asyncio.create_task(provider.embed(["x"] * 50, a_function(), "a"))
    async with asyncio.timeout(30):
        while not (server.ledger and server.ledger[0].status == 200):
            await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    answer = await provider.embed(["y"], a_function(), "b")
    assert np.array_equal(answer.vectors[0], expected_vector("y", 1536))


async def test_the_largest_call_there_is(server: ProviderServer, provider: OpenAIProvider) -> None:
    """2,048 texts, each with a vector of its own, whatever is in them."""
    texts = [f'{i} "quoted" }} \\ naïve 文 \x00' * 4 for i in range(2048)]
    answer = await provider.embed(texts, a_function(), "a")
    assert answer.indices == list(range(2048))
    assert answer.billed_tokens == server.billed_tokens
    for i in (0, 1, 1023, 2046, 2047):
        assert np.array_equal(answer.vectors[i], expected_vector(texts[i], 1536))


async def test_a_text_that_is_no_unicode_is_refused_here(server: ProviderServer, provider: OpenAIProvider) -> None:
    """Half a surrogate pair can't be sent, so it is told before anything is."""
    with pytest.raises(InputRejected):
        await provider.embed(["x", "\ud800"], a_function(), "a")
    assert server.ledger == []


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


async def test_a_redirect_is_not_followed(server: ProviderServer) -> None:
    """Texts and key go to the address that was set, and to no other."""

    async def elsewhere(_: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"{server.base_url}/embeddings"})

    app = web.Application()
    app.router.add_post("/v1/embeddings", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    provider = OpenAIProvider(api_key="k", base_url=base_url, timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S)
    with pytest.raises(ProviderPaused) as caught:
        await provider.embed([CANARY], a_function(), "a")
    await provider.close()
    await runner.cleanup()
    assert caught.value.code == "wrong_address"
    assert server.ledger == []
