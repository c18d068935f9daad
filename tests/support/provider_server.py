"""An embeddings provider for tests and benchmarks: real HTTP, faults on demand, a ledger of its bill.

In process (`async with ProviderServer() as server`), as a process of its own (`with ProviderProcess()`), or
by hand: `python -m tests.support.provider_server --port 0` prints the base URL.

    POST /v1/embeddings   as OpenAI's: input a text or a list, encoding_format float or base64, dimensions
    POST /openai/deployments/{name}/embeddings?api-version=... and /openai/v1/embeddings   as Azure's
    GET  /v1/models       and Azure's /openai/models, /openai/v1/models
    GET  /admin/ledger    {"requests": [Call...], "billed_tokens": n}
    POST /admin/faults    the fields of Faults; those not named fall back to their defaults
    POST /admin/limits    the fields of Limits; those not named fall back to those of the start
    POST /admin/reset     forgets ledger and faults

A fault is a word of FAULTS. They are picked in this order: what a limit refuses, `poison` (a marker in one of the
texts), `script` (one word per request, "" is none), `probabilities`. Tokens are cl100k_base counts when bpe-openai is
there and `tokens="cl100k"`, else max(1, ceil(UTF-8 bytes / 4)) per text. Error bodies, the key's header and what an
answer leaves out follow `dialect`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from tests.support.http_server import MAX_BODY_BYTES, Call, HTTPServer
from tests.support.provider_answers import Answer, count_tokens, expected_vector
from tests.support.provider_faults import BILLED_FAULTS, DIALECTS, FAULTS, REFUSALS, Faults
from tests.support.provider_limits import Account, Limits, Refusal

__all__ = [
    "BILLED_FAULTS",
    "FAULTS",
    "Call",
    "Faults",
    "Limits",
    "Options",
    "ProviderProcess",
    "ProviderServer",
    "count_tokens",
    "expected_vector",
]

MODELS: Mapping[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}

TEXTS_A_TURN = 64
"""So many texts are counted or embedded before other requests have a turn: about a millisecond."""

_WRITE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`jitter` is the length of the noise added to a vector of length 1 (0.01: cosine about 0.99995).

    `aliases`: other names (Azure's deployments, a gateway's names) -> the model behind. `max_call_tokens` is held
    against UTF-8 bytes / 4 with `call_estimator` "bytes4", as OpenAI does, else against tokens. Of the requests in
    work over `max_concurrent` each waits for its turn; those over `refuse_over` are refused as overloaded.
    """

    models: Mapping[str, int] = field(default_factory=lambda: dict(MODELS))
    aliases: Mapping[str, str] = field(default_factory=dict)
    dialect: str = "openai"
    jitter: float = 0.0
    base_ms: float = 0.0
    per_text_ms: float = 0.0
    tokens: str = "cl100k"
    max_inputs: int = 2048
    max_input_tokens: int = 8192
    max_call_tokens: int = 300_000
    call_estimator: str = "bytes4"
    max_body_bytes: int = MAX_BODY_BYTES
    max_concurrent: int | None = None
    refuse_over: int | None = None
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None


class ProviderServer(HTTPServer):
    """The server in this event loop; `base_url` once it is entered, `ledger` what it billed. `clock`: of its limits."""

    def __init__(
        self, options: Options | None = None, *, port: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.options = options or Options()
        super().__init__(port=port, max_body_bytes=self.options.max_body_bytes)
        self._account = Account(self.options.limits, clock)
        self._dialect = DIALECTS[self.options.dialect]
        self._turns = asyncio.Semaphore(self.options.max_concurrent or sys.maxsize)
        self._in_work = 0
        self._refused_headers: Mapping[str, str] = {}
        self.set_faults(Faults())

    @property
    def base_url(self) -> str:
        """Of the embeddings API; Azure's newer one with that dialect."""
        return f"{self.root_url}/openai/v1" if self.options.dialect == "azure" else f"{self.root_url}/v1"

    def set_faults(self, faults: Faults) -> None:
        """Replaces all faults."""
        self._faults = faults
        self._dice = random.Random(faults.seed)

    def script(self, *faults: str) -> None:
        """The next requests meet these faults, one each, in this order."""
        self.set_faults(Faults(script=list(faults)))

    def set_limits(self, limits: Limits) -> None:
        """New limits of the account from now on."""
        self._account.change(limits)

    def routes(self) -> Iterable[web.RouteDef]:
        return [
            web.post("/v1/embeddings", self._embeddings),
            web.post("/openai/v1/embeddings", self._embeddings),
            web.post("/openai/deployments/{deployment}/embeddings", self._embeddings),
            web.get("/v1/models", self._models),
            web.get("/openai/v1/models", self._models),
            web.get("/openai/models", self._models),
            web.get("/admin/ledger", self._show_ledger),
            web.post("/admin/faults", self._take_faults),
            web.post("/admin/limits", self._take_limits),
            web.post("/admin/reset", self._reset),
        ]

    # --- the API

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        started = time.perf_counter()
        texts = [body["input"]] if isinstance(body["input"], str) else list(body["input"])
        name = request.match_info.get("deployment") or body["model"]
        model = self.options.aliases.get(name, name)
        counts = []
        for text in texts:
            counts.append(count_tokens(text, self.options.tokens))
            if len(counts) % TEXTS_A_TURN == 0:
                await asyncio.sleep(0)
        call = Call(
            request.headers.get("X-Client-Request-Id", ""), int(time.time() * 1000), model, len(texts), sum(counts)
        )
        self.ledger.append(call)
        self._in_work += 1
        try:
            return await self._serve(request, call, texts, counts, name, body, started)
        finally:
            self._in_work -= 1
            call.took_ms = (time.perf_counter() - started) * 1000

    async def _serve(
        self,
        request: web.Request,
        call: Call,
        texts: Sequence[str],
        counts: Sequence[int],
        name: str,
        body: Mapping[str, Any],
        started: float,
    ) -> web.StreamResponse:
        call.fault = self._refusal(request, call.model, texts, counts, body.get("dimensions"))
        refusal = None if call.fault else self._account.admit(call.tokens)
        # As a gateway does: the headers tell how it stood when the request was let in.
        headers = self._account.headers() if self._dialect.limit_headers else {}
        call.fault = call.fault or ("429" if refusal else self._pick(texts))
        if call.fault == "hang":
            return await self.hang(request)
        if call.fault == "reset":
            return self.break_off(request)
        if call.fault in REFUSALS:
            return self._refuse(call, texts, refusal, headers)
        dimensions = body.get("dimensions") or self.options.models[call.model]
        as_base64 = body.get("encoding_format") == "base64" and self._dialect.base64
        async with self._turns:
            if self.options.max_concurrent:
                started = time.perf_counter()
            answer = await self._answer(call, name, texts, dimensions, as_base64)
            done = started + (self.options.base_ms + self.options.per_text_ms * len(texts)) / 1000
            await asyncio.sleep(done - time.perf_counter())
        # From here on the work is done: the customer pays, whatever becomes of the answer.
        call.billed = True
        if call.fault == "hang_billed":
            return await self.hang(request)
        if call.fault == "reset_billed":
            return self.break_off(request)
        if call.fault == "stale_headers":
            headers = {**headers, **self._refused_headers}
        return await self._send(request, call, answer, headers)

    def _refusal(
        self, request: web.Request, model: str, texts: Sequence[str], counts: Sequence[int], dimensions: object
    ) -> str:
        """The fault that the server's own checks make of this request."""
        options = self.options
        if not self._knows_key(request):
            return "401"
        if model not in options.models or ("deployment" in request.match_info and not request.query.get("api-version")):
            return "404"
        if dimensions is not None and not (isinstance(dimensions, int) and 1 <= dimensions <= options.models[model]):
            return "bad_dimensions"
        if len(counts) > options.max_inputs:
            return "too_many_inputs"
        if not counts:
            return "400"
        if max(counts) > options.max_input_tokens:
            return "context_length"
        quarter = options.call_estimator == "bytes4"
        if (sum(len(text.encode()) for text in texts) * 0.25 if quarter else sum(counts)) > options.max_call_tokens:
            return "tokens_per_request"
        if options.refuse_over is not None and self._in_work > options.refuse_over:
            return "overloaded"
        return ""

    def _knows_key(self, request: web.Request) -> bool:
        key = self.options.api_key
        if key is None or (self._dialect.api_key_header and request.headers.get("api-key") == key):
            return True
        if "deployment" in request.match_info:
            return False
        return request.headers.get("Authorization") == f"Bearer {key}"

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

    def _refuse(
        self, call: Call, texts: Sequence[str], refusal: Refusal | None, limit_headers: Mapping[str, str]
    ) -> web.Response:
        status, error = REFUSALS[call.fault]
        faults, headers, words = self._faults, dict(limit_headers), error.get("message", call.fault)
        if refusal is not None:
            words, error = str(refusal), {**error, "type": refusal.of}
        if call.fault in {"429", "503", "overloaded", "200_429"}:
            if refusal is not None and refusal.wait_s is not None and faults.retry_after != "":
                headers["retry-after"] = str(int(-(-refusal.wait_s // 1)))
                headers["retry-after-ms"] = str(int(-(-refusal.wait_s * 1000 // 1)))
            if faults.retry_after:
                headers["retry-after"] = faults.retry_after
            if faults.retry_after_ms:
                headers["retry-after-ms"] = faults.retry_after_ms
            if faults.body_delay is not None:
                words = f"{words} Please try again in {faults.body_delay}."
        # As real providers do, the message quotes the customer: ours must never repeat it.
        quoted = {**error, "message": f"{words} {texts[0][:200] if texts else ''}"}
        status, body = self._dialect.refuse(call.fault, status, quoted)
        call.answered, call.status, call.done_ms = True, status, int(time.time() * 1000)
        self._refused_headers = headers
        return web.json_response(body, status=status, headers=headers)

    async def _answer(
        self, call: Call, name: str, texts: Sequence[str], dimensions: int, as_base64: bool
    ) -> list[bytes]:
        """The body in parts; others have their turn in between."""
        answer = Answer(
            fault=call.fault,
            model=name if self._dialect.echoes else call.model,
            dimensions=dimensions,
            as_base64=as_base64,
            billed_tokens=call.tokens if self._dialect.usage else None,
            jitter=self.options.jitter,
        )
        parts = []
        for part in answer.parts(texts, self._dice):
            parts.append(part)
            if len(parts) % TEXTS_A_TURN == 0:
                await asyncio.sleep(0)
        return parts

    async def _send(
        self, request: web.Request, call: Call, parts: Sequence[bytes], headers: Mapping[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", **headers})
        response.content_length = sum(map(len, parts))
        call.status = 200
        # Half of the body in bytes: the part that holds its middle is cut.
        left = response.content_length // 2 if call.fault in {"truncated_body", "stalled_body"} else None
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            waiting = bytearray()
            for part in parts:
                if left is not None:
                    part = part[:left]
                    left -= len(part)
                waiting += part
                if len(waiting) >= _WRITE_BYTES:
                    await response.write(bytes(waiting))
                    waiting.clear()
            await response.write(bytes(waiting))
            if call.fault == "truncated_body":
                return self.break_off(request)
            if call.fault == "stalled_body":
                return await self.hang(request)
            await response.write_eof()
            call.answered, call.done_ms = True, int(time.time() * 1000)
        return response

    async def _models(self, request: web.Request) -> web.Response:
        if not self._knows_key(request):
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

    async def _take_limits(self, request: web.Request) -> web.Response:
        try:
            self.set_limits(replace(self.options.limits, **await request.json()))
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
        self._process.communicate(timeout=60)

    @property
    def root_url(self) -> str:
        """Without a path."""
        return "/".join(self.base_url.split("/")[:3])

    def admin(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`admin("ledger")` reads; `admin("faults", {...})`, `("limits", {...})` and `("reset", {})` write."""
        import urllib.request

        request = urllib.request.Request(
            f"{self.root_url}/admin/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            result: dict[str, Any] = json.load(answer)
            return result


async def _serve(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    models = {**MODELS, **{name: int(size) for name, _, size in (m.partition(":") for m in arguments.model)}}
    aliases = {name: model for name, _, model in (a.partition("=") for a in arguments.alias)}
    limits = Limits(**{each.name: given[each.name] for each in fields(Limits) if each.name in given})
    options = Options(
        models=models,
        aliases=aliases,
        limits=limits,
        **{each.name: given[each.name] for each in fields(Options) if each.name in given},
    )
    async with ProviderServer(options, port=arguments.port) as server:
        print(server.base_url, flush=True)
        if arguments.until_eof:
            await asyncio.to_thread(sys.stdin.read)
        else:
            await asyncio.Event().wait()


def main() -> None:
    """The command line: one option per field of Options and of Limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--model", action="append", default=[], help="name:dimensions, besides OpenAI's three")
    parser.add_argument("--alias", action="append", default=[], help="other name=model")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    parser.add_argument("--dialect", choices=sorted(DIALECTS))
    parser.add_argument("--tokens", choices=["cl100k", "bytes4"])
    parser.add_argument("--call-estimator", choices=["tokens", "bytes4"])
    parser.add_argument("--api-key")
    for name in ("jitter", "base-ms", "per-text-ms", *(each.name.replace("_", "-") for each in fields(Limits))):
        parser.add_argument(f"--{name}", type=float)
    for name in ("inputs", "input-tokens", "call-tokens", "body-bytes", "concurrent"):
        parser.add_argument(f"--max-{name}", type=int)
    parser.add_argument("--refuse-over", type=int)
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
