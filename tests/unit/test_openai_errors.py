"""The translation of the vendor's errors and of answers that no specification foresees."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import httpx2
import openai
import pytest

from processor import errors
from processor.adapters.openai import OpenAIProvider, read_answer, retry_after_s, translate

REQUEST = httpx2.Request("POST", "http://provider.test/v1/embeddings")
TEXT = "the customer's own words"


def all_subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(all_subclasses(child) for child in kind.__subclasses__()))


def a_status_error(status: int, error: Any = None, **headers: str) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=REQUEST)
    return openai.APIStatusError(TEXT, response=response, body=error)


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
        (404, {"code": "DeploymentNotFound"}, errors.ModelRejected),
        (404, 'model "x" not found, try pulling it first', errors.ModelRejected),
        (400, {"param": "dimensions", "message": TEXT}, errors.ModelRejected),
        (400, {"message": "This model's maximum context length is 8192 tokens"}, errors.CallTooLarge),
        (400, {"message": "Too many inputs. The max number of inputs is 16."}, errors.CallTooLarge),
        (422, {"message": TEXT}, errors.InputRejected),
        (429, {"code": "insufficient_quota"}, errors.ProviderPaused),
        (429, {"type": "tokens", "message": "Request too large for x on TPM"}, errors.CallTooLarge),
        (429, {"type": "tokens", "message": "Rate limit reached for x on TPM"}, errors.ProviderThrottled),
        (400, ["not", "an", "object"], errors.InputRejected),
        (408, None, errors.ProviderTransient),
        (500, "a plain page", errors.ProviderTransient),
    ],
)
def test_status_and_code_decide(status: int, error: object, kind: type) -> None:
    """A wrong address pauses and loses nothing; what a text or the call is to blame for is told apart."""
    assert type(translate(a_status_error(status, error), 0.0)) is kind


@pytest.mark.parametrize("status", [502, 504, 524])
def test_a_gateways_word_is_no_answer(status: int) -> None:
    """Whether the provider behind it billed is unknown, so no receipt of 0 may be written."""
    assert translate(a_status_error(status), 0.0).http_status is None


@pytest.mark.parametrize(
    "body,kind",
    [
        ({"error": {"code": 429, "message": TEXT}}, errors.ProviderThrottled),
        ({"error": {"code": "insufficient_quota"}}, errors.ProviderPaused),
        ({"error": {"code": "invalid_api_key"}}, errors.ProviderPaused),
        ({"error": {"param": "input", "message": TEXT}}, errors.InputRejected),
        ({"error": {"code": "context_length_exceeded"}}, errors.CallTooLarge),
        ({"error": {"message": TEXT}}, errors.ProviderTransient),
        ({"error": TEXT, "data": []}, errors.ProviderTransient),
        ({"object": "list"}, errors.ProviderTransient),
        ([1], errors.ProviderTransient),
    ],
)
def test_an_error_inside_a_success_is_an_error_of_unknown_bill(body: object, kind: type) -> None:
    """HTTP 200 with an error body is translated by its words and names no status."""
    with pytest.raises(errors.ProviderError) as caught:
        read_answer(json.dumps(body).encode())
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
def test_a_row_that_cannot_be_read_is_empty_and_the_bill_stands(row: object, size: int, index: int) -> None:
    """One bad row never hides what the whole call cost."""
    answer = read_answer(json.dumps({"data": [row], "usage": {"total_tokens": 7}}).encode())
    assert (answer.vectors[0].size, answer.indices[0], answer.billed_tokens) == (size, index, 7)


@pytest.mark.parametrize(
    "headers,wait_s",
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "2", "retry-after-ms": "150"}, 0.15),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": format_datetime(datetime.fromtimestamp(1_000_090, UTC), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(999_000, UTC), usegmt=True)}, 0.0),
    ],
)
def test_the_wait_is_read_from_seconds_milliseconds_or_a_date(headers: dict[str, str], wait_s: float | None) -> None:
    """Retry-After in each of its forms; nonsense is as if it were not there."""
    assert retry_after_s(headers, 1_000_000.0) == wait_s


def test_a_key_is_needed_where_openai_itself_is_asked() -> None:
    """A missing key is told at start, by the name of its setting."""
    with pytest.raises(errors.SettingsError, match="EMBEDDING_OPENAI_API_KEY"):
        OpenAIProvider(api_key=None, base_url=None, timeout_s=1, connect_timeout_s=1)


@pytest.mark.parametrize("tokens", [-1, 2**31, 10**30, True, 1.5, "7", None])
def test_a_nonsensical_bill_is_none(tokens: Any) -> None:
    """A figure that no call can cost is not read, so it reaches neither a charge nor a cache entry."""
    answer = read_answer(json.dumps({"data": [], "usage": {"total_tokens": tokens}}).encode())
    assert answer.billed_tokens is None
