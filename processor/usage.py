"""The charge of a request (U4): what it was billed and what it was saved, by attempt, priced once."""

from __future__ import annotations

from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    Amounts,
    CacheLevel,
    ModelSpec,
    Part,
    TokenSource,
    Usage,
)
from processor.ports import Clock
from processor.work import Job

MILLION = 1_000_000


def cost_nanos(tokens: int, nanos_per_million: int | None) -> int | None:
    """Integer nano-dollars, rounded once, half to even; None when unpriced."""
    if nanos_per_million is None:
        return None
    whole, rest = divmod(tokens * nanos_per_million, MILLION)
    return whole + (rest * 2 > MILLION or (rest * 2 == MILLION and whole % 2 == 1))


def cost_at(tokens: int, model: ModelSpec, at_ms: int) -> int | None:
    """The cost at the price in force at that time; None when the model had none."""
    price = model.price_at(at_ms)
    return cost_nanos(tokens, price.nanos_per_million if price is not None else None)


def charge(job: Job, *, provider: str, clock: Clock) -> Usage:
    """The usage event of an embedding request whose every work has its outcome; all texts failed when it has none.

    The time of the charge is the append time of the source record, so no client's clock can move a bill.
    """
    request, function = job.request, job.plan.function if job.plan is not None else None
    price = function.model.price_at(job.source.append_ms) if function is not None else None
    nanos = price.nanos_per_million if price is not None else None
    billed, saved = Amounts(), Amounts()
    cached = 0
    parts: dict[str, int] = {}
    sources: set[TokenSource] = set()
    for work in job.works:
        outcome = work.outcome
        if outcome is None or outcome.entry is None:
            continue
        entry = outcome.entry
        sources.add(entry.token_source)
        cached += outcome.level in _CACHED
        amounts = saved
        if outcome.billed:
            amounts = billed
            parts[entry.attempt_id] = parts.get(entry.attempt_id, 0) + entry.tokens
        amounts.texts += 1
        amounts.tokens += entry.tokens
        amounts.characters += len(work.chunk.text)
    billed.cost_nanos = cost_nanos(billed.tokens, nanos)
    saved.cost_nanos = cost_nanos(saved.tokens, nanos)
    chunks = request.chunks
    return Usage(
        request=request,
        source=job.source,
        request_id=job.request_id,
        payer_id=request.payer_id,
        operation=OPERATION_OF[ACTION_ALIASES[request.action]],
        # Of a refused request the model stays empty: a name that a sender made up must not become a bucket.
        model=function.model.name if function is not None else "",
        provider=provider,
        vector_space=function.space_name if function is not None else "",
        billed=billed,
        saved=saved,
        texts=len(chunks),
        characters=sum([len(chunk.text) for chunk in chunks]),
        failed_texts=len(chunks) - billed.texts - saved.texts,
        cached_texts=cached,
        parts=[Part(attempt_id, tokens) for attempt_id, tokens in parts.items()],
        token_source=next((source for source in _WEAKEST_FIRST if source in sources), TokenSource.PROVIDER),
        price_nanos_per_million=nanos,
        price_version=price.version if price is not None else None,
        charged_at_ms=job.source.append_ms,
        completed_at_ms=clock.now_ms(),
        time_taken_ms=int((clock.monotonic() - job.started) * 1000),
    )


_CACHED = frozenset({CacheLevel.L1, CacheLevel.L2})
_WEAKEST_FIRST = (TokenSource.ESTIMATE, TokenSource.TOKENIZER, TokenSource.PROVIDER)
"""One estimate makes the sum an estimate."""
