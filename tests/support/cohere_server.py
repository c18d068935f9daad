"""Cohere's embed API, version 2, for tests: real HTTP, faults on demand, a ledger of its bill.

    POST /v2/embed     texts, input_type, embedding_types float or base64, output_dimension, truncate NONE
    GET  /v1/models

Vectors belong to a text and its input type. Errors are in the words that Cohere documents.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from tests.support.http_server import Call, HTTPServer
from tests.support.provider_answers import count_tokens, expected_vector

MODELS: Mapping[str, tuple[tuple[int, ...], int]] = {
    "embed-v4.0": ((1536, 1024, 512, 256), 128_000),
    "embed-english-v3.0": ((1024,), 512),
    "embed-multilingual-v3.0": ((1024,), 512),
}
INPUT_TYPES = ("search_document", "search_query", "classification", "clustering")
MAX_TEXTS = 96

REFUSALS: Mapping[str, tuple[int, str]] = {
    "400": (400, "invalid request: texts must not be empty or only whitespace."),
    "too_many_texts": (400, "invalid request: total number of texts must be at most 96 - received 97."),
    "too_many_tokens": (400, "too many tokens: total number of tokens in a text cannot exceed 512 - received 513."),
    "bad_dimensions": (400, "invalid request: output_dimension must be one of 256, 512, 1024, 1536."),
    "bad_input_type": (400, "invalid request: valid input_type must be provided with the provided model."),
    "401": (401, "invalid api token"),
    "402": (402, "Please add or update your payment method at https://dashboard.cohere.com/billing"),
    "403": (403, "forbidden"),
    "404": (404, "model not found, make sure the correct model ID was used and that you have access to the model."),
    "429": (429, "You are past the per minute request limit, please wait and try again later."),
    "quota": (429, "You are using a Trial key, which is limited to 1000 API calls / month."),
    "498": (498, "invalid token"),
    "499": (499, "request cancelled by user"),
    "500": (500, "internal server error, this has been reported to our developers."),
    "503": (503, "service unavailable"),
    "504": (504, "gateway timeout"),
}


@dataclass(slots=True)
class Received:
    """What a request asked for, beside the ledger."""

    headers: Mapping[str, str]
    body: Mapping[str, Any] = field(repr=False)


class CohereServer(HTTPServer):
    """`base_url` once it is entered; `ledger` and `received` hold the calls."""

    def __init__(self, *, api_key: str | None = None, retry_after: str | None = None) -> None:
        super().__init__()
        self.received: list[Received] = []
        self._api_key = api_key
        self._retry_after = retry_after
        self._script: list[str] = []

    def script(self, *faults: str) -> None:
        """The next requests meet these faults, one each, in this order."""
        self._script = list(faults)

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/v2/embed", self._embed), web.get("/v1/models", self._models)]

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(Received(dict(request.headers), body))
        texts = body["texts"]
        counts = [count_tokens(text) for text in texts]
        attempt_id = request.headers.get("X-Client-Request-Id", "")
        call = Call(attempt_id, int(time.time() * 1000), body["model"], len(texts), sum(counts))
        self.ledger.append(call)
        call.fault = self._refusal(request, body, counts) or (self._script.pop(0) if self._script else "")
        if call.fault == "hang":
            return await self.hang(request)
        if call.fault == "reset":
            return self.break_off(request)
        if call.fault in REFUSALS:
            return self._refuse(call, texts)
        call.billed = True
        if call.fault == "hang_billed":
            return await self.hang(request)
        if call.fault == "reset_billed":
            return self.break_off(request)
        call.status = 200
        answer = json.dumps(self._answer(call, body)).encode()
        if call.fault == "broken_json":
            answer = b'{"id": '
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(answer)
        await response.prepare(request)
        if call.fault == "truncated_body":
            await response.write(answer[: len(answer) // 2])
            return self.break_off(request)
        await response.write(answer)
        await response.write_eof()
        call.answered = True
        return response

    def _refusal(self, request: web.Request, body: Mapping[str, Any], counts: Sequence[int]) -> str:
        if not self._knows_key(request):
            return "401"
        if body["model"] not in MODELS:
            return "404"
        dimensions, max_tokens = MODELS[body["model"]]
        if body.get("output_dimension", dimensions[0]) not in dimensions or (
            "output_dimension" in body and len(dimensions) == 1
        ):
            return "bad_dimensions"
        if body.get("input_type") not in INPUT_TYPES:
            return "bad_input_type"
        if not counts:
            return "400"
        if len(counts) > MAX_TEXTS:
            return "too_many_texts"
        if max(counts) > max_tokens:
            assert body["truncate"] == "NONE", "another policy would cut the text"
            return "too_many_tokens"
        return ""

    def _knows_key(self, request: web.Request) -> bool:
        return self._api_key is None or request.headers.get("Authorization") == f"Bearer {self._api_key}"

    def _refuse(self, call: Call, texts: Sequence[str]) -> web.Response:
        status, words = REFUSALS[call.fault]
        call.answered, call.status = True, status
        headers = {"Retry-After": self._retry_after} if self._retry_after and status in {429, 503} else {}
        # As real providers do, the message quotes the customer: ours must never repeat it.
        message = f"{words} {texts[0][:200] if texts else ''}"
        return web.json_response({"id": "1", "message": message}, status=status, headers=headers)

    def _answer(self, call: Call, body: Mapping[str, Any]) -> dict[str, Any]:
        size = body.get("output_dimension", MODELS[call.model][0][0])
        vectors = [cohere_vector(text, body["input_type"], size) for text in body["texts"]]
        match call.fault:
            case "wrong_count":
                vectors = vectors[:-1]
            case "nan":
                vectors[-1] = np.full(size, np.nan, np.float32)
            case "wrong_dimension":
                vectors[-1] = vectors[-1][:-1]
        asked: Sequence[str] = ["float"] if call.fault == "ignores_base64" else body.get("embedding_types", ["float"])
        embeddings: dict[str, Any] = {}
        if "base64" in asked:
            kind = "<f8" if call.fault == "doubles" else "<f4"
            embeddings["base64"] = [base64.b64encode(vector.astype(kind).tobytes()).decode() for vector in vectors]
        if "float" in asked:
            embeddings["float"] = [vector.astype(float).tolist() for vector in vectors]
        answer = {"id": "1", "texts": body["texts"], "embeddings": embeddings, "response_type": "embeddings_by_type"}
        if call.fault != "no_usage":
            # Cohere writes its units as decimals.
            answer["meta"] = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": float(call.tokens)}}
        return answer

    async def _models(self, request: web.Request) -> web.Response:
        if not self._knows_key(request):
            return web.json_response({"message": "invalid api token"}, status=401)
        assert request.query["endpoint"] == "embed"
        return web.json_response({"models": [{"name": name, "endpoints": ["embed"]} for name in MODELS]})


def cohere_vector(text: str, input_type: str, dimensions: int) -> NDArray[np.float32]:
    """The vector of a text for a purpose: float32 of shape (dimensions,), length 1."""
    return expected_vector(f"{input_type}: {text}", dimensions)
