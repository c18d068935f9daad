"""The charge of a request (U4): what it was billed and what it was saved, by attempt, priced once."""

from __future__ import annotations

from functools import lru_cache

from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    Amounts,
    CacheLevel,
    Part,
    TokenSource,
    TokenType,
    Usage,
)
from processor.identity import refusal_key
from processor.work import Instant, Job

MILLION = 1_000_000


@lru_cache(maxsize=16_384)
def cost_nanos(tokens: int, nanos_per_million: int | None) -> int | None:
    """Integer nano-dollars, rounded once, half to even; None when unpriced."""
    if nanos_per_million is None:
        return None
    whole, rest = divmod(tokens * nanos_per_million, MILLION)
    return whole + (rest * 2 > MILLION or (rest * 2 == MILLION and whole % 2 == 1))


def cost_of(tokens: int, job: Job) -> int | None:
    """The cost at the price of the job's model; None when it had none."""
    price = job.price
    return None if price is None else cost_nanos(tokens, price.nanos_per_million)


def charge(job: Job, provider: str, now: Instant) -> Usage:
    """The usage event of an embedding request whose every work has its outcome; all texts failed when it has none.

    The time of the charge is the append time of the source record, so no client's clock can move a bill. What bills
    nothing and has failed texts is a refusal: under the request id it would be the charge, and the same request, sent
    again and served then, a copy of it.
    """
    request, function = job.request, job.plan.function if job.plan is not None else None
    price = job.price
    nanos = price.nanos_per_million if price is not None else None
    texts, tokens, characters, cached = [0, 0], [0, 0], [0, 0], 0  # saved, billed
    parts: dict[str, int] = {}
    weakest = TokenSource.PROVIDER
    for work in job.works:
        outcome = work.outcome
        if outcome is None or outcome.entry is None:
            continue
        entry, billed = outcome.entry, outcome.billed
        texts[billed] += 1
        tokens[billed] += entry.tokens
        characters[billed] += len(work.chunk.text)
        cached += outcome.level in _CACHED
        if billed:
            parts[entry.attempt_id] = parts.get(entry.attempt_id, 0) + entry.tokens
        if entry.token_source is not TokenSource.PROVIDER and weakest is not TokenSource.ESTIMATE:
            weakest = entry.token_source
    usage = Usage.__new__(Usage)  # twenty-one keywords would take three times as long
    usage.request = request
    usage.source = job.source
    usage.request_id = job.request_id
    usage.payer_id = request.payer_id
    usage.operation = OPERATION_OF[ACTION_ALIASES[request.action]]
    # Of a refused request the model stays empty: a name that a sender made up must not become a bucket.
    usage.model = function.model.name if function is not None else ""
    usage.provider = provider
    usage.vector_space = function.space_name if function is not None else ""
    usage.billed = Amounts(texts[True], tokens[True], characters[True], cost_nanos(tokens[True], nanos))
    usage.saved = Amounts(texts[False], tokens[False], characters[False], cost_nanos(tokens[False], nanos))
    usage.texts = len(request.chunks)
    usage.characters = sum([len(chunk.text) for chunk in request.chunks])
    usage.failed_texts = usage.texts - texts[True] - texts[False]
    usage.cached_texts = cached
    usage.parts = [Part(attempt_id, share) for attempt_id, share in parts.items()]
    usage.token_source = weakest
    usage.token_type = TokenType.EMBEDDING
    usage.price_nanos_per_million = nanos
    usage.price_version = price.version if price is not None else None
    usage.charged_at_ms = job.source.append_ms
    usage.completed_at_ms = now.ms
    usage.time_taken_ms = job.taken_ms(now)
    usage.event_key = refusal_key(job.request_id) if usage.failed_texts and not texts[True] else None
    return usage


_CACHED = frozenset({CacheLevel.L1, CacheLevel.L2})
