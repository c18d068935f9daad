"""EmbeddingProvider over the `openai` package: OpenAI itself and every server that speaks its embeddings API.

The package (3.x, on httpx2) carries the request; its answers are read here, since its own models would turn
each vector into a Python list and refuse what a lenient reader can still bill. Its errors are translated in
this one file, by status, code and type. None of the vendor's text goes any further: it may quote a customer.
"""

from __future__ import annotations

import asyncio
import binascii
import email.utils
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    OpenAIError,
    Timeout,
    omit,
)
from pydantic_core import from_json

from processor.domain import EmbeddingFunction, Vector
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
from processor.ports import ProviderAnswer

MAX_BILL_TOKENS = 2**31 - 1
"""More for one call is nonsense, and no usage that could be read."""

_EMPTY: Vector = np.empty(0, np.float32)

_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"})
_AUTH = frozenset({"invalid_api_key", "authentication_error", "permission_error", "access_denied"})
_RATE = frozenset({"rate_limit_exceeded", "rate_limit_error", "requests", "tokens"})
_MODEL = frozenset({"model_not_found", "deploymentnotfound", "operationnotsupported", "unsupported_parameter"})
_MODEL_PARAMS = frozenset({"model", "dimensions", "encoding_format"})
_SIZE = frozenset(
    {"context_length_exceeded", "max_tokens_per_request", "string_above_max_length", "array_above_max_length"}
)
# OpenAI and its look-alikes often leave the code empty and say it in words alone.
_SIZE_WORDS = re.compile(
    r"maximum context length|max(imum|\.)? (number of )?(tokens|inputs|batch size)|too many (tokens|inputs)"
    r"|tokens per request|request too large|array too long|exceeds .{0,40}(tokens|length)",
    re.IGNORECASE,
)
# A gateway's words: whether the provider behind it did the work, and billed it, nobody knows.
_GATEWAY = frozenset({502, 504, 520, 522, 524})


class OpenAIProvider:
    """One HTTP request per call: no retries, no redirects. `timeout_s` bounds the whole call.

    `api_key` None is for servers that want none, and only with a `base_url`; else SettingsError.
    """

    name = "openai"

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str | None,
        timeout_s: float,
        connect_timeout_s: float,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if not api_key and not base_url:
            raise SettingsError("EMBEDDING_OPENAI_API_KEY: is missing; set it, or EMBEDDING_OPENAI_API_KEY_FILE")
        # It logs a line a request at INFO; ours is one line a window.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        timeout = Timeout(timeout_s, connect=connect_timeout_s)
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._client = AsyncOpenAI(
            api_key=api_key or "none",
            base_url=base_url or None,
            timeout=timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False),
        )

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        """The answer as it came, unverified: a vector that can't be read is empty, a missing index is -1."""
        model = function.model

        async def call() -> bytes:
            response = await self._client.embeddings.with_raw_response.create(
                input=list(texts),
                model=model.name,
                encoding_format="base64",
                dimensions=omit if function.dimensions == model.dimensions[0] else function.dimensions,
                extra_headers={"X-Client-Request-Id": attempt_id},
            )
            return response.content

        return read_answer(await self._ask(call))

    async def list_models(self) -> Sequence[str]:
        async def call() -> bytes:
            return (await self._client.models.with_raw_response.list()).content

        listed = _parse(await self._ask(call)).get("data")
        rows = listed if isinstance(listed, list) else []
        return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, call: Callable[[], Any]) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                body: bytes = await call()
                return body
        except OpenAIError as error:
            failure = translate(error, self._now_s())
        except TimeoutError:
            failure = ProviderTransient("timeout")
        except UnicodeEncodeError:
            failure = InputRejected("not_unicode")
        # Raised out here, so that no traceback drags the vendor's exception and its text along.
        raise failure


def read_answer(body: bytes) -> ProviderAnswer:
    """The body of an HTTP 200. Raises ProviderTransient when neither vectors nor a bill can be read from it.

    An error in the body has no `http_status`: nobody says that the call was not billed.
    """
    parsed = _parse(body)
    rows, error = parsed.get("data"), parsed.get("error")
    if error and not rows:
        raise _in_words(error)
    billed_tokens = _bill(parsed.get("usage"))
    if not isinstance(rows, list):
        if billed_tokens is None:
            raise ProviderTransient("broken_body")
        rows = []
    model = parsed.get("model")
    return ProviderAnswer(
        vectors=[_vector(row) for row in rows],
        indices=[_index(row) for row in rows],
        model=model if isinstance(model, str) else "",
        billed_tokens=billed_tokens,
    )


def _parse(body: bytes) -> dict[str, Any]:
    try:
        parsed = from_json(body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ProviderTransient("broken_body")
    return parsed


def _bill(usage: object) -> int | None:
    if isinstance(usage, dict):
        for name in ("total_tokens", "prompt_tokens"):
            tokens = usage.get(name)
            if isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MAX_BILL_TOKENS:
                return tokens
    return None


def _vector(row: object) -> Vector:
    embedding = row.get("embedding") if isinstance(row, dict) else None
    try:
        if isinstance(embedding, str):
            return np.frombuffer(binascii.a2b_base64(embedding, strict_mode=True), "<f4")
        if isinstance(embedding, list):
            with np.errstate(over="ignore"):
                return np.asarray(embedding, np.float32)
    except (ValueError, TypeError, OverflowError):
        pass
    return _EMPTY


def _index(row: object) -> int:
    index = row.get("index") if isinstance(row, dict) else None
    return index if isinstance(index, int) else -1


def translate(error: OpenAIError, now_s: float) -> ProviderError:
    """The error of ours that says what to do about the vendor's. `now_s`: UTC, for a Retry-After date."""
    if isinstance(error, APITimeoutError):
        return ProviderTransient("timeout")
    if isinstance(error, APIConnectionError):
        return ProviderTransient("no_connection")
    if isinstance(error, APIStatusError):
        return _refusal(error.status_code, error.body, retry_after_s(error.response.headers, now_s))
    return ProviderTransient("unexpected_answer")


def _refusal(status: int, error: object, wait_s: float | None, *, answered: bool = True) -> ProviderError:
    """What an HTTP status means; `error` is the body's error object, if it has one.

    `answered` False: the status is only inferred, and our error carries none.
    """
    words, param, message = _said(error)
    too_large = bool(words & _SIZE) or _SIZE_WORDS.search(message) is not None
    answer = status if answered else None
    if words & _QUOTA:
        return ProviderPaused("quota_exhausted", http_status=answer)
    match status:
        case 401 | 402 | 403:
            code = {401: "key_refused", 402: "payment_required", 403: "forbidden"}[status]
            return ProviderPaused(code, http_status=answer)
        case 413:
            return CallTooLarge("call_too_large", http_status=answer)
        case 429 if too_large:
            return CallTooLarge("call_too_large", http_status=answer)
        case 429:
            return ProviderThrottled("rate_limited", http_status=answer, retry_after_s=wait_s)
        case 400 | 404 | 422 if words & _MODEL or param in _MODEL_PARAMS:
            return ModelRejected("model_refused", http_status=answer)
        case 404 if "model" in message.lower():
            return ModelRejected("model_refused", http_status=answer)
        case 400 | 422 if too_large:
            return CallTooLarge("call_too_large", http_status=answer)
        case 400 | 422:
            return InputRejected("input_refused", http_status=answer)
        case 408 | 409 | 425:
            return ProviderTransient("try_again", http_status=answer)
        case _ if status in _GATEWAY:
            return ProviderTransient(f"gateway_{status}")
        case _ if status >= 500 and wait_s is not None:
            return ProviderThrottled("overloaded", http_status=answer, retry_after_s=wait_s)
        case _ if status >= 500:
            return ProviderTransient("server_error", http_status=answer)
        case _:
            # A redirect, a wrong path, an unknown method: the address is at fault, not the work.
            return ProviderPaused("wrong_address", http_status=answer)


def _in_words(error: object) -> ProviderError:
    """What an error inside an HTTP 200 means."""
    words, param, message = _said(error)
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    elif words & _AUTH:
        status = 401
    elif words & _RATE:
        status = 429
    elif words & (_QUOTA | _SIZE | _MODEL) or param or _SIZE_WORDS.search(message):
        status = 400
    else:
        return ProviderTransient("error_in_answer")
    return _refusal(status, error, None, answered=False)


def _said(error: object) -> tuple[frozenset[str], str | None, str]:
    """Code and type in lower case, parameter, message of an error object. The message is only matched on."""
    if isinstance(error, str):
        return frozenset(), None, error
    if not isinstance(error, Mapping):
        return frozenset(), None, ""
    words = frozenset(str(error[name]).lower() for name in ("code", "type") if error.get(name) is not None)
    param, message = error.get("param"), error.get("message")
    return words, param if isinstance(param, str) else None, message if isinstance(message, str) else ""


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """The wait by `retry-after-ms` or `retry-after` (seconds or an HTTP date); None: it did not say."""
    for name, per_s in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            wait_s = float(value) / per_s
        except ValueError:
            try:
                wait_s = email.utils.parsedate_to_datetime(value).timestamp() - now_s
            except ValueError:
                continue
        if math.isfinite(wait_s):
            return max(0.0, wait_s)
    return None
