"""What can go wrong with the provider server, and in which words each vendor's server says so.

The words of a dialect follow the vendor's documentation or source. Every message quotes the customer's text, as real
ones do: ours must never repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BILLED_FAULTS = frozenset(
    {
        "reset_billed",  # the work is done, then the connection breaks
        "hang_billed",  # the work is done, the answer never comes
        "truncated_body",
        "stalled_body",  # half of the answer comes, the rest never
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
        "stale_headers",  # a valid answer with the headers of the last refusal, as a careless gateway sends it
    }
)
_INVALID = "invalid_request_error"
REFUSALS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "400": (400, {"type": _INVALID, "param": "input", "code": None}),
    "422": (422, {"type": _INVALID, "param": "input", "code": None}),
    "context_length": (
        400,
        {
            "type": _INVALID,
            "param": "input",
            "code": "context_length_exceeded",
            "message": "This model's maximum context length is 8192 tokens, however you requested more.",
        },
    ),
    "too_many_inputs": (
        400,
        {
            "type": _INVALID,
            "param": "input",
            "code": "array_above_max_length",
            "message": "Invalid 'input': array too long. Expected an array with maximum length 2048.",
        },
    ),
    "tokens_per_request": (
        400,
        {
            "type": "max_tokens_per_request",
            "param": None,
            "code": "max_tokens_per_request",
            "message": "Requested more than max 300000 tokens per request.",
        },
    ),
    "bad_dimensions": (400, {"type": _INVALID, "param": "dimensions", "code": None}),
    "401": (401, {"type": _INVALID, "param": None, "code": "invalid_api_key", "message": "Incorrect API key."}),
    "403": (403, {"type": _INVALID, "param": None, "code": "access_denied"}),
    "404": (404, {"type": _INVALID, "param": "model", "code": "model_not_found", "message": "No such model."}),
    "413": (413, {"type": _INVALID, "param": None, "code": None}),
    "429": (429, {"type": "requests", "param": None, "code": "rate_limit_exceeded"}),
    "quota": (429, {"type": "insufficient_quota", "param": None, "code": "insufficient_quota"}),
    "500": (500, {"type": "server_error", "param": None, "code": None}),
    "502": (502, {"type": "server_error", "param": None, "code": None}),
    "503": (503, {"type": "server_error", "param": None, "code": None}),
    "overloaded": (
        503,
        {"type": "server_error", "param": None, "code": None, "message": "The engine is currently overloaded."},
    ),
    "out_of_memory": (
        500,
        {
            "type": "server_error",
            "param": None,
            "code": None,
            "message": "CUDA out of memory. Tried to allocate 388.00 MiB.",
        },
    ),
    "200_error": (200, {"type": "server_error", "param": None, "code": "upstream_error"}),
    "200_429": (200, {"type": "rate_limit_error", "param": None, "code": 429}),
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
    """The Retry-After header of a 429 or 503, whatever it says; "" leaves it out, also where a limit refuses."""
    retry_after_ms: str | None = None
    body_delay: str | None = None
    """Of the words "Please try again in ..." in the body of a 429, 503 or 200_429."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = {*self.script, *self.probabilities, *self.poison.values()} - FAULTS
        if unknown:
            raise ValueError(f"unknown faults {sorted(unknown)}; there are {sorted(FAULTS)}")


Refuse = Callable[[str, int, Mapping[str, Any]], tuple[int, Any]]
"""(fault, status, OpenAI's error object) -> the status and the whole body of this server's own."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server differs from OpenAI. `echoes`: it answers by the model name that it was asked by."""

    refuse: Refuse
    api_key_header: bool = False
    base64: bool = True
    usage: bool = True
    echoes: bool = True
    limit_headers: bool = True


def _openai(_: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    return status, {"error": dict(error)}


def _azure(fault: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    named = {"404": "DeploymentNotFound", "quota": "insufficient_quota"}
    message = error["message"]
    if fault == "429":
        message = f"Requests to the Embeddings_Create Operation have exceeded call rate limit. {message}"
    if fault in {"400", "422", "context_length", "too_many_inputs", "tokens_per_request", "bad_dimensions"}:
        return status, {"error": {**error, "message": message}}
    return status, {"error": {"code": named.get(fault, str(status)), "message": message}}


_VLLM_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 500: "InternalServerError"}


def _vllm(fault: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    if fault == "401":
        return status, {"error": "Unauthorized"}
    kind = _VLLM_TYPES.get(status, "InternalServerError")
    param = "input_tokens" if fault == "context_length" else None
    return status, {"error": {"message": error["message"], "type": kind, "param": param, "code": status}}


_TEI_TYPES: Mapping[str, tuple[int, str, str]] = {
    "context_length": (413, "Validation", "Input validation error: `inputs` must have less than 512 tokens."),
    "too_many_inputs": (413, "Validation", "Input validation error: batch size 33 > maximum allowed batch size 32"),
    "tokens_per_request": (413, "Validation", "Input validation error: batch size 33 > maximum allowed batch size 32"),
    "overloaded": (429, "Overloaded", "Model is overloaded"),
    "429": (429, "Overloaded", "Model is overloaded"),
    "out_of_memory": (424, "Backend", 'DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")'),
    "500": (424, "Backend", "Backend error"),
    "400": (422, "Tokenizer", "Tokenization error"),
    "422": (422, "Tokenizer", "Tokenization error"),
    "503": (503, "Unhealthy", "Unhealthy"),
}


def _tei(fault: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    status, kind, words = _TEI_TYPES.get(fault, (status, "Backend", ""))
    return status, {"message": f"{words} {error['message']}", "code": status, "type": kind}


def _infinity(fault: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    if fault in {"400", "422", "too_many_inputs"}:
        words = "List should have at most 2048 items after validation" if fault == "too_many_inputs" else "bad"
        return 422, {
            "detail": [{"type": "too_long", "loc": ["body", "input"], "msg": words, "input": error["message"]}]
        }
    status = 429 if fault == "overloaded" else status
    return status, {"error": {"message": error["message"], "type": None, "param": None, "code": status}}


_LITELLM_TYPES = {429: "RateLimitError", 401: "AuthenticationError", 404: "NotFoundError", 400: "BadRequestError"}


def _litellm(_: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    kind = _LITELLM_TYPES.get(status, "InternalServerError")
    message = f"litellm.{kind}: {kind}: OpenAIException - {error['message']}"
    return status, {"error": {"message": message, "type": "None", "param": "None", "code": str(status)}}


def _ollama(fault: str, status: int, error: Mapping[str, Any]) -> tuple[int, Any]:
    message = error["message"]
    if fault == "context_length":
        message = f"the input length exceeds the context length {message}"
    if fault == "404":
        message = f'model "{message}" not found, try pulling it first'
    if fault == "overloaded":
        message = f"server busy, please try again. maximum pending requests exceeded {message}"
    return status, {"error": {"message": message, "type": "api_error", "param": None, "code": None}}


DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect(_openai, echoes=False),
    "azure": Dialect(_azure, api_key_header=True, echoes=False),
    "vllm": Dialect(_vllm, limit_headers=False),
    "tei": Dialect(_tei, limit_headers=False),
    "infinity": Dialect(_infinity, limit_headers=False),
    "litellm": Dialect(_litellm, echoes=False),
    "ollama": Dialect(_ollama, base64=False, usage=False, limit_headers=False),
}
