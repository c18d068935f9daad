"""EmbeddingProvider over the `openai` package: OpenAI, Azure OpenAI and every server that speaks their embeddings API.

The package (3.x, on httpx2) carries the request. Body and answer are written and read here: its own types would walk
through every text for 27 ms a call of 2,048, make a Python list of each vector, and refuse what a lenient reader can
still bill. Its errors become ours here; what HTTP answers mean is said in `refusals`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import httpx2
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncAzureOpenAI,
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpxClient,
    OpenAIError,
    Timeout,
    omit,
)

from processor.adapters.openai_answers import parse_object, read_answer
from processor.adapters.refusals import refusal, timed_out
from processor.domain import EmbeddingFunction
from processor.errors import InputRejected, ProviderError, ProviderTransient, SettingsError
from processor.ports import ProviderAnswer

T = TypeVar("T")

_OPENAI_URL = "https://api.openai.com/v1"

_TEXTS_A_TURN = 256
"""Written as JSON before others have their turn: under a millisecond for chunks of usual size."""

_BYTES_A_NUMBER, _SPARE_BYTES = 32, 4096
"""Most that an answer has for each number, written out and indented, and for a row or all of them beside these."""


class OpenAIProvider:
    """One HTTP request per call: no retries, no redirects. `timeout_s` bounds the whole call.

    `api_key` None is for servers that want none, and only with a `base_url`; else SettingsError. `models` maps a
    model of the catalogue to its name there. With `azure_api_version` the `base_url` is that of an Azure resource,
    and the names are its deployments.
    """

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str | None,
        timeout_s: float,
        connect_timeout_s: float,
        read_timeout_s: float | None = None,
        name: str = "openai",
        azure_api_version: str | None = None,
        models: Mapping[str, str] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if not api_key and not base_url:
            raise SettingsError("EMBEDDING_OPENAI_API_KEY: is missing; set it, or EMBEDDING_OPENAI_API_KEY_FILE")
        # It logs a line a request at INFO; ours is one line a window.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        timeout = Timeout(timeout_s, connect=connect_timeout_s, read=read_timeout_s or timeout_s)
        carrier = DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False)
        self.name = name
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._names = dict(models or {})
        self._names_back = {there: here for here, there in self._names.items()}
        self._azure = azure_api_version is not None
        # The package takes what is not said from variables of its own: a key must not go to the address in one of them,
        # nor the ids of an organisation to other servers.
        headers = cast(Mapping[str, str], {"OpenAI-Organization": omit, "OpenAI-Project": omit} if base_url else {})
        self._client: AsyncOpenAI
        if azure_api_version is not None:
            self._client = AsyncAzureOpenAI(
                api_key=api_key or "none",
                azure_endpoint=base_url or "",
                api_version=azure_api_version,
                default_headers=headers,
                timeout=timeout,
                max_retries=0,
                http_client=carrier,
            )
        else:
            self._client = AsyncOpenAI(
                api_key=api_key or "none",
                base_url=base_url or _OPENAI_URL,
                default_headers=headers,
                timeout=timeout,
                max_retries=0,
                http_client=carrier,
            )

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        """The answer as it came, unverified, with its model by the catalogue's name."""
        model = self._names.get(function.model.name, function.model.name)
        path = f"/deployments/{urllib.parse.quote(model, safe='')}/embeddings" if self._azure else "/embeddings"
        row_bytes = _SPARE_BYTES + _BYTES_A_NUMBER * function.model.dimensions[0]

        async def call() -> ProviderAnswer:
            response = cast(
                httpx2.Response,
                await self._client.post(
                    path,
                    cast_to=httpx2.Response,
                    content=await _written(texts, model, function),
                    options={"headers": {"X-Client-Request-Id": attempt_id, "x-ms-client-request-id": attempt_id}},
                    stream=True,
                    stream_cls=AsyncStream[object],
                ),
            )
            try:
                return await read_answer(
                    response.aiter_bytes(),
                    response.headers,
                    texts=len(texts),
                    max_bytes=_SPARE_BYTES + len(texts) * row_bytes,
                    now_s=self._now_s(),
                )
            finally:
                await response.aclose()

        answer = await self._ask(call, len(texts))
        return answer._replace(model=self._names_back.get(answer.model, answer.model))

    async def list_models(self) -> Sequence[str]:
        async def call() -> bytes:
            return (await self._client.models.with_raw_response.list()).content

        listed = parse_object(await self._ask(call, 0)).get("data")
        rows = listed if isinstance(listed, list) else []
        names = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
        return [self._names_back.get(name, name) for name in names]

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, call: Callable[[], Awaitable[T]], texts: int) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call()
        except (OpenAIError, httpx2.HTTPError) as error:
            failure = translate(error, self._now_s(), texts)
        except TimeoutError:
            failure = timed_out(texts)
        except UnicodeEncodeError:
            failure = InputRejected("not_unicode")
        # Raised out here, so that no traceback drags the vendor's exception and its text along.
        raise failure


async def _written(texts: Sequence[str], model: str, function: EmbeddingFunction) -> bytes:
    """The request's body."""
    options: dict[str, Any] = {"model": model, "encoding_format": "base64"}
    if function.dimensions != function.model.dimensions[0]:
        options["dimensions"] = function.dimensions
    parts = [json.dumps(options)[:-1].encode(), b', "input": [']
    for start in range(0, len(texts), _TEXTS_A_TURN):
        if start:
            await asyncio.sleep(0)
            parts.append(b",")
        parts.append(json.dumps(texts[start : start + _TEXTS_A_TURN], ensure_ascii=False)[1:-1].encode())
    parts.append(b"]}")
    return b"".join(parts)


def translate(error: OpenAIError | httpx2.HTTPError, now_s: float, texts: int = 1) -> ProviderError:
    """The error of ours that says what to do about the vendor's. `now_s`: UTC, for a Retry-After date."""
    cause = error.__cause__ if isinstance(error, APITimeoutError) else error
    if isinstance(cause, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return ProviderTransient("no_connection")
    if isinstance(error, APITimeoutError | httpx2.TimeoutException):
        return timed_out(texts)
    if isinstance(error, APIConnectionError):
        return ProviderTransient("no_connection")
    if isinstance(error, httpx2.HTTPError):
        return ProviderTransient("broken_body")
    if isinstance(error, APIStatusError):
        return refusal(error.status_code, error.body, error.response.headers, now_s, texts=texts)
    return ProviderTransient("unexpected_answer")
