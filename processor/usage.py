"""The charge of a request (U4): what it was billed and what it was saved, by attempt, priced once."""

from __future__ import annotations

from collections.abc import Sequence

from processor.domain import (
    ACTION_ALIASES,
    OPERATION_OF,
    Amounts,
    CacheLevel,
    Entry,
    ModelSpec,
    Part,
    TokenSource,
    Usage,
)
from processor.ports import Clock
from processor.work import Job, Work

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
    request = job.request
    billed = [work for work in job.works if work.outcome is not None and work.outcome.billed]
    saved = [work for work in job.works if work.outcome is not None and work.outcome.entry and not work.outcome.billed]
    cached = sum(
        work.outcome.level in {CacheLevel.L1, CacheLevel.L2} for work in job.works if _entry(work) and work.outcome
    )
    function = job.plan.function if job.plan is not None else None
    price = function.model.price_at(job.source.append_ms) if function is not None else None
    nanos = price.nanos_per_million if price is not None else None
    parts: dict[str, int] = {}
    for work in billed:
        if (entry := _entry(work)) is not None:
            parts[entry.attempt_id] = parts.get(entry.attempt_id, 0) + entry.tokens
    return Usage(
        request=request,
        source=job.source,
        request_id=job.request_id,
        payer_id=request.payer_id,
        operation=OPERATION_OF[ACTION_ALIASES[request.action]],
        # Of a refused request the model stays empty: a name that a sender made up must not become a bucket.
        model=function.model.name if function is not None else "",
        provider=provider,
        vector_space=str(function.space) if function is not None else "",
        billed=_amounts(billed, nanos),
        saved=_amounts(saved, nanos),
        texts=len(request.chunks),
        characters=sum(len(chunk.text) for chunk in request.chunks),
        failed_texts=len(request.chunks) - len(billed) - len(saved),
        cached_texts=cached,
        parts=[Part(attempt_id, tokens) for attempt_id, tokens in parts.items()],
        token_source=_source([*billed, *saved]),
        price_nanos_per_million=nanos,
        price_version=price.version if price is not None else None,
        charged_at_ms=job.source.append_ms,
        completed_at_ms=clock.now_ms(),
        time_taken_ms=int((clock.monotonic() - job.started) * 1000),
    )


def _entry(work: Work) -> Entry | None:
    return work.outcome.entry if work.outcome is not None else None


def _amounts(works: Sequence[Work], nanos_per_million: int | None) -> Amounts:
    tokens = sum(entry.tokens for work in works if (entry := _entry(work)) is not None)
    return Amounts(
        texts=len(works),
        tokens=tokens,
        characters=sum(len(work.text) for work in works),
        cost_nanos=cost_nanos(tokens, nanos_per_million),
    )


def _source(works: Sequence[Work]) -> TokenSource:
    """The weakest source among the entries: one estimate makes the sum an estimate."""
    sources = {entry.token_source for work in works if (entry := _entry(work)) is not None}
    for source in (TokenSource.ESTIMATE, TokenSource.TOKENIZER):
        if source in sources:
            return source
    return TokenSource.PROVIDER
