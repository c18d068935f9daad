"""The translation of the vendor's errors and of answers that no specification foresees."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, TypeVar

import httpx2
import numpy as np
import openai
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from processor import errors
from processor.adapters import logs
from processor.adapters.openai import OpenAIProvider, _written, translate
from processor.adapters.openai_answers import SLICE_BYTES, read_answer
from processor.adapters.refusals import duration_s, rate_limits, retry_after_s
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate
from processor.ports import ProviderAnswer

T = TypeVar("T")

REQUEST = httpx2.Request("POST", "http://provider.test/v1/embeddings")
TEXT = "the customer's own words"


def all_subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(all_subclasses(child) for child in kind.__subclasses__()))


def a_status_error(status: int, error: Any = None, **headers: str) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=REQUEST)
    return openai.APIStatusError(TEXT, response=response, body=error)


async def answer_of(
    body: bytes,
    *,
    texts: int = 2,
    chunk_bytes: int = 65_536,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = 10**9,
) -> ProviderAnswer:
    """What is read from a body that arrives in chunks of this size."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]

    return await read_answer(chunks(), headers or {}, texts=texts, max_bytes=max_bytes, now_s=1_000_000.0)


def made(kind: type[Exception]) -> openai.OpenAIError:
    """An instance of a vendor's class, whatever its constructor takes."""
    error: Any = kind.__new__(kind, TEXT)
    error.response = httpx2.Response(418, request=REQUEST)
    error.body, error.status_code = {"message": TEXT}, 418
    assert isinstance(error, openai.OpenAIError)
    return error


@pytest.mark.parametrize("kind", sorted(all_subclasses(openai.OpenAIError), key=str), ids=lambda k: k.__name__)
def test_every_class_of_the_vendor_becomes_one_of_ours(kind: type[Exception]) -> None:
    """None slips through, none brings the vendor's text along."""
    ours = translate(made(kind), 0.0)
    assert type(ours) in all_subclasses(errors.ProviderError) - {errors.ProviderError}
    assert TEXT not in str(ours)


@pytest.mark.parametrize(
    "status,error,kind",
    [
        (401, None, errors.ProviderPaused),
        (402, None, errors.ProviderPaused),
        (404, None, errors.ProviderPaused),
        (302, None, errors.ProviderPaused),
        (404, {"code": "404", "message": "Resource not found"}, errors.ProviderPaused),
        (404, {"code": "DeploymentNotFound"}, errors.ModelRejected),
        (404, 'model "x" not found, try pulling it first', errors.ModelRejected),
        (400, {"message": "/embeddings: Invalid model name passed in model=x", "param": "None"}, errors.ModelRejected),
        (400, {"param": "dimensions", "message": TEXT}, errors.ModelRejected),
        (400, {"message": "This model's maximum context length is 8192 tokens"}, errors.CallTooLarge),
        (400, {"message": "the model's context length is only 1024 tokens, resulting in"}, errors.CallTooLarge),
        (400, {"message": "Too many inputs. The max number of inputs is 16."}, errors.CallTooLarge),
        (400, {"message": "input batch size 473 > maximum allowed batch size 64"}, errors.CallTooLarge),
        (400, {"message": "batch size is invalid, it should not be larger than 10."}, errors.CallTooLarge),
        (413, {"message": "`inputs` must have less than 512 tokens.", "type": "Validation"}, errors.CallTooLarge),
        (422, {"detail": [{"msg": "List should have at most 2048 items after validation"}]}, errors.CallTooLarge),
        (422, {"message": TEXT}, errors.InputRejected),
        (422, {"detail": [{"msg": TEXT}]}, errors.InputRejected),
        (400, {"message": "x" * 1000 + "maximum context length"}, errors.InputRejected),
        (429, {"code": "insufficient_quota"}, errors.ProviderPaused),
        (429, {"type": "tokens", "message": "Request too large for x on TPM"}, errors.CallTooLarge),
        (429, {"type": "tokens", "message": "Rate limit reached for x on TPM"}, errors.ProviderThrottled),
        (429, {"message": "litellm.RateLimitError: x", "type": "None", "code": "429"}, errors.ProviderThrottled),
        (429, {"message": "Model is overloaded", "type": "Overloaded"}, errors.ProviderThrottled),
        (400, ["not", "an", "object"], errors.InputRejected),
        (400, "\n<html>a plain HTTP request was sent to an HTTPS port", errors.ProviderTransient),
        (404, "<html>no such page, whatever the model", errors.ProviderPaused),
        (408, None, errors.ProviderTransient),
        (424, {"message": "Backend error"}, errors.ProviderTransient),
        (500, "a plain page", errors.ProviderTransient),
        (503, {"message": "server busy, please try again."}, errors.ProviderThrottled),
    ],
)
def test_status_and_code_decide(status: int, error: object, kind: type) -> None:
    """A wrong address pauses and loses nothing; what a text or the call is to blame for is told apart."""
    assert type(translate(a_status_error(status, error), 0.0)) is kind


@pytest.mark.parametrize(
    "status,message",
    [
        (500, "CUDA out of memory. Tried to allocate 388.00 MiB."),
        (400, "400: CUDA out of memory."),
        (424, 'DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")'),
        (500, "std::bad_alloc"),
    ],
)
def test_a_server_out_of_memory_wants_smaller_calls(status: int, message: str) -> None:
    """The composition of the call is at fault, and nothing can be smaller than one text."""
    error = a_status_error(status, {"message": message})
    of_many, of_one = translate(error, 0.0, texts=2), translate(error, 0.0, texts=1)
    assert (type(of_many), type(of_one)) == (errors.CallTooLarge, errors.ProviderTransient)
    assert (of_many.code, of_many.http_status) == ("out_of_memory", status)


def a_timeout(cause: httpx2.HTTPError) -> openai.APITimeoutError:
    error = openai.APITimeoutError(request=REQUEST)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("cause", [httpx2.ReadTimeout(TEXT), httpx2.WriteTimeout(TEXT)], ids=lambda c: type(c).__name__)
def test_an_answer_that_takes_too_long_wants_smaller_calls(cause: httpx2.HTTPError) -> None:
    """Whether it was billed is unknown, so it has no status, whichever side of the head it stopped at."""
    for error in (a_timeout(cause), cause):
        of_many, of_one = translate(error, 0.0, texts=2), translate(error, 0.0, texts=1)
        assert (type(of_many), of_many.code, of_many.http_status) == (errors.CallTooLarge, "timeout", None)
        assert (type(of_one), of_one.code) == (errors.ProviderTransient, "timeout")


@pytest.mark.parametrize("cause", [httpx2.ConnectTimeout(TEXT), httpx2.PoolTimeout(TEXT)])
def test_a_connection_that_does_not_come_about_is_transient(cause: httpx2.HTTPError) -> None:
    """Nothing was sent: no call is too large to connect."""
    failure = translate(a_timeout(cause), 0.0, texts=2)
    assert (type(failure), failure.code) == (errors.ProviderTransient, "no_connection")


@pytest.mark.parametrize("status", [502, 504, 524])
def test_a_gateways_word_is_no_answer(status: int) -> None:
    """Whether the provider behind it billed is unknown, so no receipt of 0 may be written."""
    assert translate(a_status_error(status), 0.0).http_status is None


@pytest.mark.parametrize(
    "body,kind",
    [
        ({"error": {"code": 429, "message": TEXT}}, errors.ProviderThrottled),
        ({"error": {"code": "429", "message": TEXT}}, errors.ProviderThrottled),
        ({"error": {"type": "rate_limit_error", "message": TEXT}}, errors.ProviderThrottled),
        ({"error": {"message": "CUDA out of memory"}}, errors.CallTooLarge),
        ({"error": {"message": "The engine is currently overloaded"}}, errors.ProviderThrottled),
        ({"error": {"code": "insufficient_quota"}}, errors.ProviderPaused),
        ({"error": {"code": "invalid_api_key"}}, errors.ProviderPaused),
        ({"error": {"param": "input", "message": TEXT}}, errors.InputRejected),
        ({"error": {"code": "context_length_exceeded"}}, errors.CallTooLarge),
        ({"error": {"message": TEXT}}, errors.ProviderTransient),
        ({"error": {"message": TEXT, "type": "None", "param": "None"}}, errors.ProviderTransient),
        ({"error": TEXT, "data": []}, errors.ProviderTransient),
        ({"error": {"code": "9" * 5000}}, errors.ProviderTransient),
        ({"error": {"code": 429, "retry_after": 10**400}}, errors.ProviderThrottled),
        ({"object": "list"}, errors.ProviderTransient),
        ([1], errors.ProviderTransient),
    ],
)
async def test_an_error_inside_a_success_is_an_error_of_unknown_bill(body: object, kind: type) -> None:
    """HTTP 200 with an error body is translated by its words and names no status."""
    with pytest.raises(errors.ProviderError) as caught:
        await answer_of(json.dumps(body).encode())
    assert type(caught.value) is kind
    assert caught.value.http_status is None
    assert TEXT not in str(caught.value)


@pytest.mark.parametrize(
    "row,size,index",
    [
        ({"index": 0, "embedding": "AACAPwAAAEA="}, 2, 0),
        ({"index": 0, "embedding": [1, 2.5]}, 2, 0),
        ({"index": 0, "embedding": "AACAPw"}, 0, 0),
        ({"index": 0, "embedding": "AAA="}, 0, 0),
        ({"index": 0, "embedding": ["x"]}, 0, 0),
        ({"index": 0, "embedding": [1, [2]]}, 0, 0),
        ({"index": 0}, 0, 0),
        ({"embedding": [1]}, 1, -1),
        ("nonsense", 0, -1),
    ],
)
async def test_a_row_that_cannot_be_read_is_empty_and_the_bill_stands(row: object, size: int, index: int) -> None:
    """One bad row never hides what the whole call cost."""
    answer = await answer_of(json.dumps({"data": [row], "usage": {"total_tokens": 7}}).encode())
    assert (answer.vectors[0].size, answer.indices[0], answer.billed_tokens) == (size, index, 7)


@pytest.mark.parametrize(
    "headers,wait_s",
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "2", "retry-after-ms": "150"}, 0.15),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "86400"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "2", "retry-after-ms": "x"}, 2.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": format_datetime(datetime.fromtimestamp(1_000_090, UTC), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(999_000, UTC), usegmt=True)}, None),
    ],
)
def test_the_wait_is_read_from_seconds_milliseconds_or_a_date(headers: dict[str, str], wait_s: float | None) -> None:
    """Retry-After in each of its forms; nonsense and what has passed are as if they were not there."""
    assert retry_after_s(headers, 1_000_000.0) == wait_s


@pytest.mark.parametrize(
    "status,error,headers,wait_s",
    [
        (429, {"message": "Rate limit reached. Please try again in 1.2s. Visit our page."}, {}, 1.2),
        (429, {"message": "Please try again in 6m0s."}, {}, 360.0),
        (429, {"message": "Please try again in 20ms."}, {}, 0.02),
        (429, {"message": "have exceeded call rate limit. Please retry after 7 seconds. Please go"}, {}, 7.0),
        (429, {"message": "x", "retry_after": 3}, {}, 3.0),
        (429, {"message": "x", "retry_after": True}, {}, None),
        (429, {"message": "x", "retry_after": 10**400}, {}, None),
        (429, {"message": "x", "code": 10**400, "retry_after_ms": float("nan")}, {}, None),
        (429, {"message": "Please try again in a while."}, {}, None),
        (429, {"message": "Please try again in 9s."}, {"retry-after": "2"}, 2.0),
        (429, {"message": "Please try again in 9s."}, {"retry-after": "-2"}, 9.0),
        (503, {"message": "Please try again in 3s."}, {}, 3.0),
        (429, None, {}, None),
    ],
)
def test_the_wait_may_stand_in_the_body(
    status: int, error: object, headers: dict[str, str], wait_s: float | None
) -> None:
    """Headers come first; a body that names a delay is believed where they are silent."""
    failure = translate(a_status_error(status, error, **headers), 1_000_000.0)
    assert isinstance(failure, errors.ProviderThrottled)
    assert failure.retry_after_s == pytest.approx(wait_s)


@pytest.mark.parametrize(
    "text,seconds",
    [
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("12ms", 0.012),
        ("1s", 1.0),
        ("2m59.56s", 179.56),
        ("7.5", 7.5),
        ("0", 0.0),
        ("-1", None),
        ("nan", None),
        ("soon", None),
        ("", None),
    ],
)
def test_a_wait_is_read_as_vendors_write_it(text: str, seconds: float | None) -> None:
    """Go's way of writing a duration, or plain seconds."""
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "headers,limits",
    [
        ({}, None),
        (
            {
                "x-ratelimit-limit-requests": "600",
                "x-ratelimit-limit-tokens": "1000000",
                "x-ratelimit-remaining-requests": "599",
                "x-ratelimit-remaining-tokens": "0",
            },
            errors.RateLimits(600, 1_000_000, 599, 0),
        ),
        (
            {"x-ratelimit-limit-tokens": "-1", "x-ratelimit-remaining-tokens": "-1"},
            None,
        ),
        ({"x-ratelimit-remaining-tokens": "117"}, errors.RateLimits(remaining_tokens=117)),
        ({"x-ratelimit-limit-requests": "100, 100;w=60"}, None),
        ({"x-ratelimit-limit-requests": "0", "x-ratelimit-limit-tokens": "1e-322"}, None),
    ],
)
def test_what_headers_say_of_limits(headers: dict[str, str], limits: errors.RateLimits | None) -> None:
    """Of a refusal and of an answer; Azure's -1 says nothing, nor does what is no number."""
    assert rate_limits(headers) == limits
    assert translate(a_status_error(429, None, **headers), 0.0).limits == limits
    assert translate(a_status_error(500, None, **headers), 0.0).limits == limits


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_a_date_without_a_zone_is_in_utc() -> None:
    """The oldest form of HTTP's dates names no zone, and is no local time."""
    assert retry_after_s({"retry-after": "Sun Nov  6 08:49:37 1994"}, 784_111_767.0) == 10.0


async def test_a_wait_beside_a_success_is_not_obeyed() -> None:
    """Stale headers on the answer of a retried call: what was refused before has passed by now."""
    answer = await answer_of(b'{"data": [], "usage": {"total_tokens": 1}}', headers={"retry-after": "60"})
    assert (answer.billed_tokens, answer.limits) == (1, None)


# --- answers in slices

ROW = {"object": "embedding", "index": 0, "embedding": base64.b64encode(np.ones(1536, "<f4").tobytes()).decode()}


def a_body(rows: int, **members: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{**ROW, "index": i} for i in range(rows)], "model": "m", **members}


async def turns_during(work: Awaitable[T]) -> tuple[int, T]:
    """How often others had their turn meanwhile, and what came out."""
    turns, over = 0, False

    async def count() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    result = await work
    over = True
    await counting
    return turns, result


async def test_a_large_request_leaves_turns_to_others() -> None:
    """It is written in parts, and is the same JSON as in one."""
    spec = ModelSpec(name="m", weights="m", dimensions=(1536,), shortenable=True)
    function = EmbeddingFunction(spec, spec.space(256), InputType.DOCUMENT, "", Truncate.ERROR)
    texts = [f'{i} "naïve" 文' for i in range(2048)]
    turns, body = await turns_during(_written(texts, "there", function))
    assert turns >= 7
    assert json.loads(body) == {"model": "there", "encoding_format": "base64", "dimensions": 256, "input": texts}


async def test_a_large_answer_leaves_turns_to_others() -> None:
    """Never more than a slice is read between two turns of the event loop, even if all of it came at once."""
    body = json.dumps(a_body(512, usage={"total_tokens": 7})).encode()
    turns, answer = await turns_during(answer_of(body, texts=512, chunk_bytes=len(body)))
    assert turns >= len(body) // (SLICE_BYTES + 9000)
    assert len(body) > 15 * SLICE_BYTES
    assert (list(answer.indices), answer.model, answer.billed_tokens) == (list(range(512)), "m", 7)
    assert all(np.array_equal(vector, np.ones(1536, np.float32)) for vector in answer.vectors)


@pytest.mark.parametrize(
    "body",
    [
        a_body(90, usage={"total_tokens": 7}),
        {"usage": {"total_tokens": 7}, "model": "m", "data": a_body(90)["data"]},
        {"id": "x", "created": 17, "data": [{**row, "more": {"a": "}"}} for row in a_body(90)["data"]]},
        {"note": 'a "quoted" word', "data": a_body(90)["data"], "error": None},
        {"data": a_body(90)["data"], "usage": {"details": {}, "total_tokens": 7}},
        {"data": a_body(45)["data"] + ["}"] + a_body(45)["data"]},
        {"data": [{"embedding": [0.5] * 3000, "index": i} for i in range(90)]},
    ],
    ids=["as OpenAI's", "rows last", "nested", "quoted", "nested end", "a row of text", "float lists"],
)
@pytest.mark.parametrize("indent", [None, 2])
async def test_whatever_the_layout_all_rows_are_read(body: dict[str, Any], indent: int | None) -> None:
    """In slices where rows can be cut, else as a whole: the answer is the same."""
    written = json.dumps(body, indent=indent).encode()
    assert len(written) > 2 * SLICE_BYTES
    sliced = await answer_of(written)
    small = [await answer_of(json.dumps({**body, "data": [row]}).encode()) for row in body["data"]]
    assert list(sliced.indices) == [each.indices[0] for each in small]
    for vector, alone in zip(sliced.vectors, small, strict=True):
        assert np.array_equal(vector, alone.vectors[0])
    assert {(sliced.model, sliced.billed_tokens)} == {(each.model, each.billed_tokens) for each in small}


async def test_more_than_an_answer_can_hold_is_none() -> None:
    """A few compressed kilobytes may become gigabytes: no more is kept than the call can be worth."""
    with pytest.raises(errors.ProviderTransient, match="answer_too_large"):
        await answer_of(b" " * 1_000_001, max_bytes=1_000_000)
    assert (await answer_of(b'{"data": []}' + b" " * 999_988, max_bytes=1_000_000)).vectors == []


async def test_an_answer_that_never_begins_is_not_looked_at_again_and_again() -> None:
    """Blanks without end are searched for the first row once, not with every chunk that arrives."""
    began = time.process_time()
    with pytest.raises(errors.ProviderTransient, match="broken_body"):
        await answer_of(b" " * 32_000_000, chunk_bytes=16_384)
    assert time.process_time() - began < 2.0  # 0.1 s; looked at again and again it was 20


WHOLE = json.dumps(a_body(90, usage={"total_tokens": 7})).encode()


@given(cut=st.integers(1, 700_000), chunk_bytes=st.integers(1000, 400_000))
async def test_an_answer_that_breaks_off_is_no_answer(cut: int, chunk_bytes: int) -> None:
    """However much of it was read: half an answer has no bill."""
    with pytest.raises(errors.ProviderTransient):
        await answer_of(WHOLE[:-cut], chunk_bytes=chunk_bytes)


@pytest.fixture
def logs_of_its_own() -> Iterator[None]:
    """What is set up for logs is gone afterwards."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    loggers = [root, *map(logging.getLogger, [*root.manager.loggerDict, "httpx2", "httpcore2", "openai"])]
    levels = [logger.level for logger in loggers]
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("logs_of_its_own")
def test_what_carries_a_call_says_nothing_even_at_debug() -> None:
    """It would print requests with their texts, and whatever a server answers with."""
    for carrier in ("openai", "httpx2", "httpcore2"):
        logging.getLogger(carrier).setLevel(logging.NOTSET)
        logs.configure("DEBUG", "json")
        assert not logging.getLogger(f"{carrier}.http11").isEnabledFor(logging.INFO)


def test_a_key_is_needed_where_openai_itself_is_asked() -> None:
    """A missing key is told at start, by the name of its setting."""
    with pytest.raises(errors.SettingsError, match="EMBEDDING_OPENAI_API_KEY"):
        OpenAIProvider(api_key=None, base_url=None, timeout_s=1, connect_timeout_s=1)


@pytest.mark.parametrize(
    "options,host,header",
    [
        ({"base_url": None}, "api.openai.com", "authorization"),
        ({"base_url": "http://one.test/v1"}, "one.test", "authorization"),
        ({"base_url": "http://two.test", "azure_api_version": "2024-10-21"}, "two.test", "api-key"),
    ],
    ids=["OpenAI", "another server", "Azure"],
)
async def test_a_key_goes_nowhere_but_to_its_own_address(
    options: dict[str, Any], host: str, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own variables change neither address nor key, and ids of an organisation stay with OpenAI."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.test/v1")
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", "another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    sent: list[httpx2.Request] = []

    async def note(request: httpx2.Request, *args: object, **others: object) -> httpx2.Response:
        sent.append(request)
        raise httpx2.ConnectError("not now")

    provider = OpenAIProvider(api_key="sk-own", timeout_s=1, connect_timeout_s=1, **options)
    monkeypatch.setattr(provider._client._client, "send", note)
    with pytest.raises(errors.ProviderTransient):
        await provider.list_models()
    await provider.close()
    assert sent[0].url.host == host
    assert sent[0].headers[header].removeprefix("Bearer ") == "sk-own"
    assert ("openai-organization" in sent[0].headers) == (host == "api.openai.com")


@pytest.mark.parametrize("tokens", [-1, 2**31, 10**30, True, 1.5, "7", None])
async def test_a_nonsensical_bill_is_none(tokens: Any) -> None:
    """A figure that no call can cost is not read, so it reaches neither a charge nor a cache entry."""
    answer = await answer_of(json.dumps({"data": [], "usage": {"total_tokens": tokens}}).encode())
    assert answer.billed_tokens is None
