"""EmbeddingProvider over Cohere's embed API, version 2. None of its text goes any further: it may quote a customer.

Its answers repeat the texts and name neither the model nor indices: vectors come in the order of the texts, and the
model is the one that was asked for.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from processor.adapters.openai_answers import MAX_BILL_TOKENS, parse_object, read_vector
from processor.adapters.refusals import MESSAGE_CHARS, rate_limits, refusal, timed_out
from processor.domain import EmbeddingFunction, InputType, Vector
from processor.errors import InputRejected, ProviderError, ProviderPaused, ProviderTransient, SettingsError
from processor.ports import ProviderAnswer

_INPUT_TYPES = {InputType.DOCUMENT: "search_document", InputType.QUERY: "search_query"}
# Cohere says in words alone what is wrong, and only of some statuses what they mean.
_MODEL_WORDS = re.compile(r"output_dimension|input_type|embedding_types", re.IGNORECASE)
_SIZE_WORDS = re.compile(r"too many tokens|number of texts must be at most", re.IGNORECASE)
_MONTH = re.compile(r"/ ?month|monthly|per month", re.IGNORECASE)


class CohereProvider:
    """One HTTP request per call: no retries, no redirects. `timeout_s` bounds the whole call, `read_timeout_s` silence.

    `models` gives the names of models there that are not the catalogue's. SettingsError without a key.
    """

    name = "cohere"

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str,
        timeout_s: float,
        connect_timeout_s: float,
        read_timeout_s: float,
        models: Mapping[str, str] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if not api_key:
            raise SettingsError("EMBEDDING_COHERE_API_KEY: is missing; set it, or EMBEDDING_COHERE_API_KEY_FILE")
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}", "X-Client-Name": "embedding-processor"}
        self._timeout = aiohttp.ClientTimeout(
            total=timeout_s, connect=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s
        )
        self._models = dict(models or {})
        self._now_s = now_s
        self._session: aiohttp.ClientSession | None = None

    async def embed(self, texts: Sequence[str], function: EmbeddingFunction, attempt_id: str) -> ProviderAnswer:
        """The answer as it came, unverified: a vector that can't be read is empty."""
        model = function.model
        body: dict[str, object] = {
            "model": self._models.get(model.name, model.name),
            "texts": list(texts),
            "input_type": _INPUT_TYPES[function.input_type],
            # A quarter of the bytes of decimals, and no list of Python floats: 2 ms a call of 96, not 12.
            "embedding_types": ["base64"],
            "truncate": "NONE",
        }
        if function.dimensions != model.dimensions[0]:
            # Models before embed-v4.0 refuse the parameter, so the default goes unsaid.
            body["output_dimension"] = function.dimensions
        asked = {"X-Client-Request-Id": attempt_id, "Content-Type": "application/json"}
        answer, headers = await self._ask("POST", "/v2/embed", texts=len(texts), data=_written(body), headers=asked)
        vectors, billed_tokens = _read(answer, function.dimensions)
        return ProviderAnswer(vectors, range(len(vectors)), model.name, billed_tokens, rate_limits(headers))

    async def list_models(self) -> Sequence[str]:
        """Of the catalogue's names where they were translated."""
        body, _ = await self._ask("GET", "/v1/models", texts=1, params={"endpoint": "embed", "page_size": "1000"})
        ours = {there: name for name, there in self._models.items()}
        rows = parse_object(body).get("models")
        names = [row.get("name") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [ours.get(name, name) for name in names if isinstance(name, str)]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, method: str, path: str, *, texts: int, **options: Any) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of an HTTP 200 to a call of so many texts."""
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, trust_env=True)
        failure: ProviderError
        try:
            async with self._session.request(
                method, self._base_url + path, allow_redirects=False, **options
            ) as response:
                body = await response.read()
                if response.status == 200:
                    return body, response.headers
                failure = _refused(response.status, body, response.headers, self._now_s(), texts)
        except aiohttp.ConnectionTimeoutError:
            failure = ProviderTransient("no_connection")
        except TimeoutError:
            failure = timed_out(texts)
        except aiohttp.ClientPayloadError:
            failure = ProviderTransient("broken_body")
        except (aiohttp.ClientError, OSError):
            failure = ProviderTransient("no_connection")
        # Raised out here, so that no traceback drags the vendor's exception and its text along.
        raise failure


def _written(body: Mapping[str, object]) -> bytes:
    """InputRejected for half a surrogate pair: nothing is sent then."""
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        pass
    raise InputRejected("not_unicode")


def _refused(status: int, body: bytes, headers: Mapping[str, str], now_s: float, texts: int) -> ProviderError:
    """The error of ours for an answer that is none. Its words are brought into the form of OpenAI's errors."""
    try:
        message = parse_object(body).get("message")
    except ProviderTransient:
        message = None
    said = message[:MESSAGE_CHARS] if isinstance(message, str) else ""
    error = {"message": said}
    if _MODEL_WORDS.search(said):
        error["param"] = "model"
    if _SIZE_WORDS.search(said):
        error["code"] = "max_tokens_per_request"
    if status == 429 and _MONTH.search(said):
        error["code"] = "insufficient_quota"
    if status == 498:
        return ProviderPaused("key_refused", http_status=status)
    if status == 499:
        return ProviderTransient("try_again", http_status=status)
    return refusal(status, error, headers, now_s, texts=texts)


def _read(body: bytes, dimensions: int) -> tuple[list[Vector], int | None]:
    """Vectors and bill. ProviderTransient when neither can be read."""
    parsed = parse_object(body)
    billed_tokens = _bill(parsed.get("meta"))
    embeddings = parsed.get("embeddings")
    rows = (embeddings.get("base64") or embeddings.get("float")) if isinstance(embeddings, dict) else None
    if not isinstance(rows, list):
        if billed_tokens is None:
            raise ProviderTransient("broken_body")
        rows = []
    # "The float embedding bytes": how many of them make a float is not said.
    return [read_vector(row, double_bytes=8 * dimensions) for row in rows], billed_tokens


def _bill(meta: object) -> int | None:
    """`input_tokens` of the billed units, which may be written as a decimal."""
    units = meta.get("billed_units") if isinstance(meta, dict) else None
    tokens = units.get("input_tokens") if isinstance(units, dict) else None
    if isinstance(tokens, int | float) and not isinstance(tokens, bool) and 0 <= tokens <= MAX_BILL_TOKENS:
        return int(tokens)
    return None
