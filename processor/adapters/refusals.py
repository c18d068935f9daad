"""What the answers of providers over HTTP mean: the error of ours that says what to do, the wait, the limits told of.

By status, code and type, and by words where servers leave these empty. None of the vendor's text goes any further: it
may quote a customer. For the same reason words are looked for at the beginning of a message only.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping
from datetime import UTC

from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
    RateLimits,
)

MESSAGE_CHARS = 400

MAX_WAIT_S = 1e9
"""More than thirty years are no wait."""

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
    r"(maximum|model's) context length|max(imum|\.)? (number of )?(tokens|inputs|(allowed )?batch size)"
    r"|too many (tokens|inputs|texts)|tokens per request|request too large|array too long|at most \d+ (items|texts)"
    r"|batch size is invalid|exceeds? .{0,40}(tokens|length|n_ctx)|less than \d+ tokens",
    re.IGNORECASE,
)
_MEMORY_WORDS = re.compile(r"out.?of.?memory|alloc_failed|(unable|failed) to allocate|bad_alloc", re.IGNORECASE)
_BUSY_WORDS = re.compile(r"overloaded|(server|too) busy|at capacity|queue is full", re.IGNORECASE)
_MODEL_WORDS = re.compile(r"[^a-z]{0,20}((error|v1|embeddings)\W{1,6}){0,3}invalid model name", re.IGNORECASE)
_WAIT_WORDS = re.compile(
    r"(?:again|retry)\s+(?:in|after)\s+(?P<length>\d[\w.]*)(?:\s*(?P<unit>milli|second|minute|hour))?", re.IGNORECASE
)
_UNITS_S = {"milli": 0.001, "second": 1.0, "minute": 60.0, "hour": 3600.0}
_DURATION = re.compile(
    r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.IGNORECASE
)
# A gateway's words: whether the provider behind it did the work, and billed it, nobody knows.
_GATEWAY = frozenset({502, 504, 520, 522, 524})


def refusal(
    status: int, error: object, headers: Mapping[str, str], now_s: float, *, texts: int, answered: bool = True
) -> ProviderError:
    """What an HTTP status means; `error` is the body's error object, if it has one; `texts` is how many the call held.

    `now_s` is UTC, for a Retry-After date. `answered` False: the status is only inferred, and our error carries none.
    """
    failure = _classified(status, error, headers, now_s, texts, answered)
    failure.limits = rate_limits(headers)
    return failure


def _classified(
    status: int, error: object, headers: Mapping[str, str], now_s: float, texts: int, answered: bool
) -> ProviderError:
    words, param, message = _said(error)
    too_large = bool(words & _SIZE) or _SIZE_WORDS.search(message) is not None
    answer = status if answered else None
    if words & _QUOTA:
        return ProviderPaused("quota_exhausted", http_status=answer)
    if status not in {401, 402, 403, 429} and _MEMORY_WORDS.search(message):
        return _too_much("out_of_memory", texts, answer)
    match status:
        case 401 | 402 | 403:
            code = {401: "key_refused", 402: "payment_required", 403: "forbidden"}[status]
            return ProviderPaused(code, http_status=answer)
        case 413:
            return CallTooLarge("call_too_large", http_status=answer)
        case 429 if too_large:
            return CallTooLarge("call_too_large", http_status=answer)
        case 429:
            code = "overloaded" if _BUSY_WORDS.search(message) else "rate_limited"
            return ProviderThrottled(code, http_status=answer, retry_after_s=wait_s(headers, error, now_s))
        case 400 | 404 | 422 if words & _MODEL or param in _MODEL_PARAMS:
            return ModelRejected("model_refused", http_status=answer)
        case 400 | 404 if (status == 404 and "model" in message.lower()) or _MODEL_WORDS.match(message):
            return ModelRejected("model_refused", http_status=answer)
        case 400 | 422 if too_large:
            return CallTooLarge("call_too_large", http_status=answer)
        case 400 | 422 if _is_page(error):
            # Not the provider's words but those of a proxy before it, for instance "a plain request to an HTTPS port".
            return ProviderTransient("page_of_a_proxy", http_status=answer)
        case 400 | 422:
            return InputRejected("input_refused", http_status=answer)
        case 408 | 409 | 425:
            return ProviderTransient("try_again", http_status=answer)
        case _ if status in _GATEWAY:
            return ProviderTransient(f"gateway_{status}")
        # 424 is what text-embeddings-inference makes of a fault of its own.
        case _ if status >= 500 or status == 424:
            retry_after_s = wait_s(headers, error, now_s)
            if retry_after_s is not None or _BUSY_WORDS.search(message):
                return ProviderThrottled("overloaded", http_status=answer, retry_after_s=retry_after_s)
            return ProviderTransient("server_error", http_status=answer)
        case _:
            # A redirect, a wrong path, an unknown method: the address is at fault, not the work.
            return ProviderPaused("wrong_address", http_status=answer)


def in_words(error: object, headers: Mapping[str, str], now_s: float, *, texts: int) -> ProviderError:
    """What an error inside an HTTP 200 means. No `http_status`: nobody says that the call was not billed."""
    words, param, message = _said(error)
    code = error.get("code") if isinstance(error, Mapping) else None
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    elif words & _AUTH:
        status = 401
    elif words & _RATE:
        status = 429
    elif words & (_QUOTA | _SIZE | _MODEL) or param or _SIZE_WORDS.search(message):
        status = 400
    elif _MEMORY_WORDS.search(message) or _BUSY_WORDS.search(message):
        status = 500
    else:
        failure: ProviderError = ProviderTransient("error_in_answer")
        failure.limits = rate_limits(headers)
        return failure
    return refusal(status, error, headers, now_s, texts=texts, answered=False)


def timed_out(texts: int) -> ProviderError:
    """No answer in time: smaller calls may pass; a call of one text can't be smaller. Whether it was billed is open."""
    return _too_much("timeout", texts, None)


def _too_much(code: str, texts: int, http_status: int | None) -> ProviderError:
    return (CallTooLarge if texts > 1 else ProviderTransient)(code, http_status=http_status)


def _said(error: object) -> tuple[frozenset[str], str | None, str]:
    """Code and type in lower case, parameter, beginning of the message of an error object."""
    if isinstance(error, str):
        return frozenset(), None, "" if _is_page(error) else error[:MESSAGE_CHARS]
    if not isinstance(error, Mapping):
        return frozenset(), None, ""
    words = frozenset(word.lower() for name in ("code", "type") if isinstance(word := error.get(name), str))
    param, message = error.get("param"), error.get("message", error.get("detail"))
    # Servers on FastAPI list what they found wrong.
    if isinstance(message, list) and message and isinstance(message[0], Mapping):
        message = message[0].get("msg")
    # LiteLLM writes a missing parameter as the word None.
    param = param if isinstance(param, str) and param != "None" else None
    return words, param, message[:MESSAGE_CHARS] if isinstance(message, str) else ""


def _is_page(error: object) -> bool:
    """HTML instead of an error object."""
    return isinstance(error, str) and error.lstrip().startswith("<")


def wait_s(headers: Mapping[str, str], error: object, now_s: float) -> float | None:
    """The wait that the headers ask for, else the body; None: neither says."""
    by_header = retry_after_s(headers, now_s)
    if by_header is not None:
        return by_header
    if isinstance(error, Mapping):
        for name, per_s in (("retry_after_ms", 1000.0), ("retry_after", 1.0)):
            value = error.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WAIT_S * per_s:
                return value / per_s
    found = _WAIT_WORDS.search(_said(error)[2])
    if found is None:
        return None
    length, unit = found["length"].rstrip("."), found["unit"]
    if unit is None:
        return duration_s(length)
    try:
        return float(length) * _UNITS_S[unit.lower()]
    except ValueError:
        return None


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """The wait by `retry-after-ms` or `retry-after` (seconds or an HTTP date); None: it did not say.

    A negative wait, as a date that has passed, says nothing.
    """
    for name, per_s in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            asked_s = float(value) / per_s
        except ValueError:
            try:
                # Without a zone, as in the oldest form of HTTP's dates, it is UTC too.
                at = email.utils.parsedate_to_datetime(value)
                asked_s = at.replace(tzinfo=at.tzinfo or UTC).timestamp() - now_s
            except (ValueError, OverflowError):
                continue
        if math.isfinite(asked_s) and asked_s >= 0:
            return asked_s
    return None


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """What the x-ratelimit headers say; None: nothing. Azure's -1 and a limit under 1 say nothing."""
    told = RateLimits(
        requests_per_minute=_amount(headers, "limit-requests", least=1.0),
        tokens_per_minute=_amount(headers, "limit-tokens", least=1.0),
        remaining_requests=_amount(headers, "remaining-requests"),
        remaining_tokens=_amount(headers, "remaining-tokens"),
    )
    return told if any(value is not None for value in told) else None


def _amount(headers: Mapping[str, str], name: str, *, least: float = 0.0) -> float | None:
    try:
        amount = float(headers.get(f"x-ratelimit-{name}", ""))
    except ValueError:
        return None
    return amount if math.isfinite(amount) and amount >= least else None


def duration_s(text: str) -> float | None:
    """Seconds of "6m0s", "12ms", "1h2m3.5s" or a plain number of seconds; None: none of these."""
    try:
        seconds = float(text)
    except ValueError:
        found = _DURATION.fullmatch(text)
        if found is None or not any(found.groups()):
            return None
        seconds = sum(
            float(part) * unit_s for part, unit_s in zip(found.groups("0"), (86_400, 3600, 60, 1, 0.001), strict=True)
        )
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
