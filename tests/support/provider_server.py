"""An embeddings provider for tests and benchmarks: real HTTP, faults on demand, a ledger of its bill.

In process (`async with ProviderServer() as server`), as a process of its own (`with ProviderProcess()`), or
by hand: `python -m tests.support.provider_server --port 0` prints the base URL.

    POST /v1/embeddings   as OpenAI's: input a text or a list, encoding_format float or base64, dimensions
    GET  /v1/models
    GET  /admin/ledger    {"requests": [Call...], "billed_tokens": n}
    POST /admin/faults    the fields of Faults; those not named fall back to their defaults
    POST /admin/reset     forgets ledger and faults

A fault is a word of FAULTS. They are picked in this order: `poison` (a marker in one of the texts), `script`
(one word per request, "" is none), `probabilities`. Tokens are cl100k_base counts when bpe-openai is there
and `tokens="cl100k"`, else max(1, ceil(UTF-8 bytes / 4)) per text.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from processor.adapters.tokens import tokenizer_of

MODELS: Mapping[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}

BILLED_FAULTS = frozenset(
    {
        "reset_billed",  # the work is done, then the connection breaks
        "hang_billed",  # the work is done, the answer never comes
        "truncated_body",
        "broken_json",
        "wrong_count",
        "nan",
        "zero_vector",
        "wrong_dimension",
        "wrong_model",
        "duplicate_index",
        "shuffled",  # a valid answer: every index once, in another order
        "no_usage",  # a valid answer without its bill
        "ignores_base64",  # a valid answer in float lists, whatever was asked for
    }
)
REFUSALS: Mapping[str, tuple[int, Mapping[str, object]]] = {
    "400": (400, {"type": "invalid_request_error", "param": "input", "code": None}),
    "422": (422, {"type": "invalid_request_error", "param": "input", "code": None}),
    "context_length": (
        400,
        {"type": "invalid_request_error", "param": "input", "code": "context_length_exceeded"},
    ),
    "tokens_per_request": (
        400,
        {"type": "max_tokens_per_request", "param": None, "code": "max_tokens_per_request"},
    ),
    "bad_dimensions": (400, {"type": "invalid_request_error", "param": "dimensions", "code": None}),
    "401": (401, {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}),
    "403": (403, {"type": "invalid_request_error", "param": None, "code": "access_denied"}),
    "404": (404, {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}),
    "413": (413, {"type": "invalid_request_error", "param": None, "code": None}),
    "429": (429, {"type": "requests", "param": None, "code": "rate_limit_exceeded"}),
    "quota": (429, {"type": "insufficient_quota", "param": None, "code": "insufficient_quota"}),
    "500": (500, {"type": "server_error", "param": None, "code": None}),
    "502": (502, {"type": "server_error", "param": None, "code": None}),
    "503": (503, {"type": "server_error", "param": None, "code": None}),
    "200_error": (200, {"type": "server_error", "param": None, "code": "upstream_error"}),
}
FAULTS = frozenset({"", "reset", "hang", *BILLED_FAULTS, *REFUSALS})


@dataclass(slots=True)
class Faults:
    """What goes wrong from now on."""

    script: list[str] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    poison: dict[str, str] = field(default_factory=dict)
    """marker in a text -> fault"""
    retry_after: str | None = None
    """The Retry-After header of a 429 or 503."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = {*self.script, *self.probabilities, *self.poison.values()} - FAULTS
        if unknown:
            raise ValueError(f"unknown faults {sorted(unknown)}; there are {sorted(FAULTS)}")


@dataclass(slots=True)
class Call:
    """One request as the provider's books show it. `attempt_id` is its X-Client-Request-Id."""

    attempt_id: str
    at_ms: int
    model: str
    inputs: int
    tokens: int
    fault: str = ""
    billed: bool = False
    answered: bool = False
    status: int | None = None
    done_ms: int | None = None
    """When the answer was written out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`jitter` is the length of the noise added to a vector of length 1 (0.01: cosine about 0.99995)."""

    models: Mapping[str, int] = field(default_factory=lambda: dict(MODELS))
    jitter: float = 0.0
    base_ms: float = 0.0
    per_text_ms: float = 0.0
    tokens: str = "cl100k"
    max_inputs: int = 2048
    max_input_tokens: int = 8192
    max_call_tokens: int = 300_000
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    api_key: str | None = None


_NOISE: NDArray[np.float32] = np.random.default_rng(20_240_125).standard_normal(1 << 20, dtype=np.float32)


def expected_vector(text: str, dimensions: int) -> NDArray[np.float32]:
    """The vector that belongs to a text: float32 of shape (dimensions,), length 1, before jitter.

    The difference of two stretches of a fixed normal sequence, chosen by the text's hash: 7 times faster than
    a generator seeded per text; two texts share a vector with probability 2^-39.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    room = _NOISE.size - dimensions
    one, other = int.from_bytes(digest[:8]) % room, int.from_bytes(digest[8:]) % room
    vector = _NOISE[one : one + dimensions] - _NOISE[other : other + dimensions]
    length = float(np.sqrt(vector @ vector))
    return vector / np.float32(length) if length else _NOISE[:dimensions]


def count_tokens(text: str, tokens: str = "cl100k") -> int:
    """What the server bills for a text."""
    tokenizer = tokenizer_of("cl100k_base") if tokens == "cl100k" else None
    return tokenizer.count(text) if tokenizer else max(1, -(-len(text.encode()) // 4))


class Bucket:
    """Allows `rate` units a second with a burst of one second; says how long to wait when it is empty."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._left = rate
        self._at = time.monotonic()

    def take(self, units: float) -> float:
        """0 when taken, else seconds until there is room."""
        now = time.monotonic()
        self._left = min(self.rate, self._left + (now - self._at) * self.rate)
        self._at = now
        # More than a second's worth at once passes when the bucket is full, and leaves it in debt.
        if self._left < min(units, self.rate):
            return (min(units, self.rate) - self._left) / self.rate
        self._left -= units
        return 0.0


class ProviderServer:
    """The server in this event loop; `base_url` once it is entered, `ledger` what it billed."""

    def __init__(self, options: Options | None = None, *, port: int = 0) -> None:
        self.options = options or Options()
        self.ledger: list[Call] = []
        self.base_url = ""
        self._port = port
        self._closing = asyncio.Event()
        self._buckets = [
            (Bucket(rate), of_tokens)
            for rate, of_tokens in ((self.options.requests_per_s, False), (self.options.tokens_per_s, True))
            if rate is not None
        ]
        self._noise = np.random.default_rng()
        self.set_faults(Faults())

    def set_faults(self, faults: Faults) -> None:
        """Replaces all faults."""
        self._faults = faults
        self._dice = random.Random(faults.seed)

    def script(self, *faults: str) -> None:
        """The next requests meet these faults, one each, in this order."""
        self.set_faults(Faults(script=list(faults)))

    @property
    def billed_tokens(self) -> int:
        return sum(call.tokens for call in self.ledger if call.billed)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.add_routes(
            [
                web.post("/v1/embeddings", self._embeddings),
                web.get("/v1/models", self._models),
                web.get("/admin/ledger", self._show_ledger),
                web.post("/admin/faults", self._take_faults),
                web.post("/admin/reset", self._reset),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        await self._runner.cleanup()

    # --- the API

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        texts = [body["input"]] if isinstance(body["input"], str) else list(body["input"])
        model = body["model"]
        counts = [count_tokens(text, self.options.tokens) for text in texts]
        call = Call(
            request.headers.get("X-Client-Request-Id", ""),
            int(time.time() * 1000),
            model,
            len(texts),
            sum(counts),
        )
        self.ledger.append(call)
        fault, wait_s = self._refusal(request, model, counts, body.get("dimensions"))
        call.fault = fault or self._pick(texts)
        if call.fault == "hang":
            return await self._hang(request)
        if call.fault == "reset":
            return self._break_off(request)
        if call.fault in REFUSALS:
            return self._refuse(call, texts, wait_s)
        await asyncio.sleep((self.options.base_ms + self.options.per_text_ms * len(texts)) / 1000)
        # From here on the work is done: the customer pays, whatever becomes of the answer.
        call.billed = True
        if call.fault == "hang_billed":
            return await self._hang(request)
        if call.fault == "reset_billed":
            return self._break_off(request)
        dimensions = body.get("dimensions") or self.options.models[model]
        answer = self._answer(call, texts, dimensions, body.get("encoding_format") == "base64")
        return await self._send(request, call, answer)

    def _refusal(
        self, request: web.Request, model: str, counts: Sequence[int], dimensions: object
    ) -> tuple[str, float]:
        """The fault that a limit of the server makes of this request, and seconds to wait."""
        if self.options.api_key and request.headers.get("Authorization") != f"Bearer {self.options.api_key}":
            return "401", 0.0
        if model not in self.options.models:
            return "404", 0.0
        if dimensions is not None and not (
            isinstance(dimensions, int) and 1 <= dimensions <= self.options.models[model]
        ):
            return "bad_dimensions", 0.0
        if len(counts) > self.options.max_inputs or not counts:
            return "400", 0.0
        if max(counts) > self.options.max_input_tokens:
            return "context_length", 0.0
        if sum(counts) > self.options.max_call_tokens:
            return "tokens_per_request", 0.0
        for bucket, of_tokens in self._buckets:
            wait_s = bucket.take(sum(counts) if of_tokens else 1)
            if wait_s:
                return "429", wait_s
        return "", 0.0

    def _pick(self, texts: Sequence[str]) -> str:
        for marker, fault in self._faults.poison.items():
            if any(marker in text for text in texts):
                return fault
        if self._faults.script:
            return self._faults.script.pop(0)
        for fault, probability in self._faults.probabilities.items():
            if self._dice.random() < probability:
                return fault
        return ""

    def _refuse(self, call: Call, texts: Sequence[str], wait_s: float) -> web.Response:
        status, error = REFUSALS[call.fault]
        # As real providers do, the message quotes the customer: ours must never repeat it.
        message = f"{call.fault}: {texts[0][:200] if texts else ''}"
        headers = {}
        if status in {429, 503} and (self._faults.retry_after is not None or wait_s):
            headers["Retry-After"] = self._faults.retry_after or f"{wait_s:.3f}"
        call.answered, call.status, call.done_ms = True, status, int(time.time() * 1000)
        return web.json_response({"error": {"message": message, **error}}, status=status, headers=headers)

    async def _hang(self, request: web.Request) -> web.StreamResponse:
        """Until the client gives up or the server closes."""
        while not (self._closing.is_set() or request.transport is None or request.transport.is_closing()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), 0.05)
        return self._break_off(request)

    def _break_off(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    def _answer(self, call: Call, texts: Sequence[str], dimensions: int, as_base64: bool) -> bytes:
        vectors = [self._vector(text, dimensions) for text in texts]
        indices = list(range(len(texts)))
        model = call.model
        match call.fault:
            case "wrong_count":
                vectors, indices = vectors[:-1], indices[:-1]
            case "nan":
                vectors[-1][0] = np.nan
            case "zero_vector":
                vectors[-1][:] = 0
            case "wrong_dimension":
                vectors[-1] = self._vector(texts[-1], max(1, dimensions - 1))
            case "wrong_model":
                model = "another-model"
            case "duplicate_index":
                indices[-1] = 0 if len(indices) > 1 else 1
            case "shuffled":
                order = list(indices)
                self._dice.shuffle(order)
                vectors, indices = [vectors[i] for i in order], order
        if call.fault == "ignores_base64" or not as_base64:
            written = [json.dumps(vector.astype(float).tolist()).encode() for vector in vectors]
        else:
            written = [b'"%b"' % base64.b64encode(vector.astype("<f4").tobytes()) for vector in vectors]
        rows = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % row for row in zip(indices, written, strict=True)
        )
        bill = {} if call.fault == "no_usage" else {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
        body = b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
            rows,
            json.dumps(model).encode(),
            json.dumps(bill).encode(),
        )
        return b'{"object":"list","data":[{' if call.fault == "broken_json" else body

    def _vector(self, text: str, dimensions: int) -> NDArray[np.float32]:
        vector = expected_vector(text, dimensions)
        if not self.options.jitter:
            return vector.copy()
        noise = self._noise.standard_normal(dimensions, dtype=np.float32)
        vector = vector + noise * np.float32(self.options.jitter / np.sqrt(noise @ noise))
        vector /= np.sqrt(vector @ vector)
        return vector

    async def _send(self, request: web.Request, call: Call, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        call.status = 200
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            if call.fault == "truncated_body":
                await response.write(body[: len(body) // 2])
                return self._break_off(request)
            await response.write(body)
            await response.write_eof()
            call.answered, call.done_ms = True, int(time.time() * 1000)
        return response

    async def _models(self, request: web.Request) -> web.Response:
        if self.options.api_key and request.headers.get("Authorization") != f"Bearer {self.options.api_key}":
            return web.json_response({"error": {"message": "no", "code": "invalid_api_key"}}, status=401)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.options.models]
        return web.json_response({"object": "list", "data": models})

    # --- the admin's side

    async def _show_ledger(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"requests": [asdict(call) for call in self.ledger], "billed_tokens": self.billed_tokens}
        )

    async def _take_faults(self, request: web.Request) -> web.Response:
        try:
            self.set_faults(Faults(**await request.json()))
        except (TypeError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({})

    async def _reset(self, _: web.Request) -> web.Response:
        self.ledger.clear()
        self.set_faults(Faults())
        return web.json_response({})


class ProviderProcess:
    """The server as a process of its own; it ends with this one (it reads its standard input to the end)."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.base_url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "--until-eof", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.base_url = self._process.stdout.readline().strip()
        if not self.base_url:
            raise RuntimeError(f"the provider server ended with {self._process.wait()} before it was up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=10)

    def admin(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`admin("ledger")` reads; `admin("faults", {...})` and `admin("reset", {})` write."""
        import urllib.request

        request = urllib.request.Request(
            self.base_url.removesuffix("v1") + f"admin/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            result: dict[str, Any] = json.load(answer)
            return result


async def _serve(arguments: argparse.Namespace) -> None:
    models = {**MODELS, **{name: int(size) for name, _, size in (m.partition(":") for m in arguments.model)}}
    options = Options(
        models=models,
        **{
            name: getattr(arguments, name)
            for name in Options.__dataclass_fields__
            if name != "models" and getattr(arguments, name) is not None
        },
    )
    async with ProviderServer(options, port=arguments.port) as server:
        print(server.base_url, flush=True)
        if arguments.until_eof:
            await asyncio.to_thread(sys.stdin.read)
        else:
            await asyncio.Event().wait()


def main() -> None:
    """The command line: one option per field of Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--model", action="append", default=[], help="name:dimensions, besides OpenAI's three")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    parser.add_argument("--tokens", choices=["cl100k", "bytes4"])
    parser.add_argument("--api-key")
    for name in ("jitter", "base-ms", "per-text-ms", "requests-per-s", "tokens-per-s"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("max-inputs", "max-input-tokens", "max-call-tokens"):
        parser.add_argument(f"--{name}", type=int)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
