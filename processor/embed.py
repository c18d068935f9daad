"""Step 5: intent, call, verify, receipt, split. An attempt is one HTTP request and has an intent of its own.

What a provider's failure means is decided here, once, from the class of the error:

    throttled, transient   wait with full jitter and try again; the batch stays whole
    paused (key, quota)    the route stands still, health says why; the next real call probes, alone
    composition, input     halve the call; a single text that fails alone is `provider_rejects`
    model                  `provider_model_error` for its chunks
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from processor.batching import Call
from processor.domain import (
    CallItem,
    CallKind,
    CallOutcome,
    Entry,
    ErrorCode,
    Fault,
    ProviderCall,
    TokenSource,
    Vector,
)
from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
)
from processor.ports import Clock, Destination, EmbeddingProvider, Events, Outbox, ProviderAnswer
from processor.work import Policy, Work

BREAKER_FAILURES = 5
"""So many failures in a row open the breaker: then one call at a time probes the provider."""


@dataclass(slots=True, eq=False)
class Route:
    """The provider as this worker sees it: a bound on calls in flight, a breaker, and why it is paused."""

    provider: EmbeddingProvider
    outbox: Outbox
    clock: Clock
    policy: Policy
    new_id: Callable[[], str]
    events: Events = field(default_factory=Events)
    jitter: Callable[[float, float], float] = random.uniform
    paused: str | None = None
    successes: int = 0
    _failures_in_row: int = 0
    room: asyncio.Semaphore = field(init=False)
    probe: asyncio.Lock = field(init=False)

    def __post_init__(self) -> None:
        self.room = asyncio.Semaphore(self.policy.max_concurrent_calls)
        self.probe = asyncio.Lock()

    async def probes(self) -> bool:
        """While the route is paused, waits to be the one call that probes it. Whether this one is."""
        probing = self.paused is not None
        if probing:
            await self.probe.acquire()
            probing = self.paused is not None
            if not probing:  # the one before found the provider back
                self.probe.release()
        return probing

    def succeeded(self) -> None:
        """An answer came and was verified: one that can't be used is no sign of a provider that works."""
        self.successes += 1
        self._closed()

    def failed(self, error: ProviderError) -> None:
        if isinstance(error, InputRejected | CallTooLarge | ModelRejected):
            self._closed()
            return
        self._failures_in_row += 1
        if isinstance(error, ProviderPaused) or self._failures_in_row >= BREAKER_FAILURES:
            self.paused = error.code

    def _closed(self) -> None:
        self._failures_in_row = 0
        self.paused = None


async def embed(calls: Sequence[Call], route: Route) -> list[Awaitable[None]]:
    """Step 5 for a window: entries or faults are set on the folds. Returns the receipts' acknowledgements to await."""
    receipts = await asyncio.gather(*(_embed_call(call, route) for call in calls))
    return [receipt for each in receipts for receipt in each]


async def _embed_call(call: Call, route: Route) -> list[Awaitable[None]]:
    receipts: list[Awaitable[None]] = []
    backoff_s = route.policy.retry_initial_s
    while True:
        async with route.room:
            probing = await route.probes()
            try:
                leaders = [fold.leader() for fold in call.folds]
                if None in leaders:
                    call = call.only([i for i, leader in enumerate(leaders) if leader is not None])
                    leaders = [leader for leader in leaders if leader is not None]
                if not call.folds:
                    return receipts
                error = await _attempt(call, [work for work in leaders if work], route, receipts)
                if error is None:
                    return receipts
                wait_s = _wait_s(error, backoff_s, route)
                if route.paused is not None:
                    # The prober keeps the lock while it waits, so an outage costs one attempt per backoff.
                    await route.clock.sleep(wait_s)
                    wait_s = 0.0
            finally:
                if probing:
                    route.probe.release()
        if isinstance(error, ModelRejected):
            _fail(
                call,
                ErrorCode.PROVIDER_MODEL_ERROR,
                "model",
                "model: the provider refuses it; see the worker's log",
            )
            return receipts
        if isinstance(error, InputRejected | CallTooLarge) or _is_poison(call, route):
            if len(call.folds) == 1:
                _fail(
                    call,
                    ErrorCode.PROVIDER_REJECTS,
                    "chunks.text",
                    "chunks.text: the provider refuses this text",
                )
                return receipts
            for half in await asyncio.gather(*(_embed_call(part, route) for part in call.halves())):
                receipts += half
            return receipts
        await route.clock.sleep(wait_s)
        backoff_s = min(backoff_s * 2, route.policy.retry_max_s)


def _wait_s(error: ProviderError, backoff_s: float, route: Route) -> float:
    if isinstance(error, InputRejected | CallTooLarge | ModelRejected):
        return 0.0
    if isinstance(error, ProviderThrottled) and error.retry_after_s is not None:
        return min(max(error.retry_after_s, 0.0), 300.0) + route.jitter(0.0, 0.1)
    return route.jitter(0.0, backoff_s)


def _is_poison(call: Call, route: Route) -> bool:
    """Failed k times while the provider succeeded for others: one of its texts is at fault, not the provider."""
    return call.failures >= route.policy.poison_attempts and route.successes > call.successes_seen


async def _attempt(
    call: Call, leaders: Sequence[Work], route: Route, receipts: list[Awaitable[None]]
) -> ProviderError | None:
    """One attempt: None when the folds have their entries, else why not."""
    started = route.clock.monotonic()
    intent = _intent(call, leaders, route)
    await route.outbox.send([Destination("calls", intent)])
    answer: ProviderAnswer | None = None
    error: ProviderError | None = None
    try:
        answer = await route.provider.embed(call.texts, call.function, intent.attempt_id)
        vectors = verify(answer, call)
        route.succeeded()
    except ProviderError as raised:
        error = raised
        route.failed(raised)
        if isinstance(raised, ProviderTransient):  # throttling and pauses say nothing about a text
            if call.failures == 0:
                call.successes_seen = route.successes
            call.failures += 1
        route.events.count("provider_errors", 1, {"code": raised.code})
    receipt = _receipt(intent, call, answer, error, route, started)
    if receipt is not None:
        receipts.append(await route.outbox.post(Destination("calls", receipt)))
    route.events.count(
        "provider_calls", 1, {"outcome": receipt.outcome if receipt and receipt.outcome else "unanswered"}
    )
    route.events.observe("provider_call_seconds", route.clock.monotonic() - started, {})
    if answer is None or error is not None:
        return error
    billed, source = _bill(answer, call)
    if call.token_source is TokenSource.TOKENIZER and billed != sum(call.counts):
        route.events.count("counter_drift", 1, {"model": call.function.model.name})
    route.events.count("provider_tokens", billed, {"model": call.function.model.name})
    shares = split(billed, call.counts)
    for fold, leader, vector, tokens, cut in zip(call.folds, leaders, vectors, shares, call.truncated, strict=True):
        fold.entry = Entry(vector, tokens, leader.item, intent.attempt_id, source, cut)
    return None


def _intent(call: Call, leaders: Sequence[Work], route: Route) -> ProviderCall:
    now_ms = route.clock.now_ms()
    model = call.function.model
    price = model.price_at(now_ms)
    return ProviderCall(
        kind=CallKind.INTENT,
        attempt_id=route.new_id(),
        at_ms=now_ms,
        worker_id=route.policy.worker_id,
        provider=route.provider.name,
        model=model.name,
        vector_space=str(call.function.space),
        items=[
            CallItem(work.item.request_id, work.item.index, work.job.request.payer_id, tokens)
            for work, tokens in zip(leaders, call.counts, strict=True)
        ],
        estimated_tokens=sum(call.counts),
        confirm_by_ms=now_ms + int(route.policy.confirm_after_s * 1000),
        price_nanos_per_million=price.nanos_per_million if price else None,
        price_version=price.version if price else None,
    )


def _receipt(
    intent: ProviderCall,
    call: Call,
    answer: ProviderAnswer | None,
    error: ProviderError | None,
    route: Route,
    started: float,
) -> ProviderCall | None:
    """U1: `ok`, `invalid` only if its usage was readable, `failed` only for an answered HTTP error; else none."""
    if answer is not None and error is None:
        outcome, billed, status = CallOutcome.OK, _bill(answer, call)[0], 200
    elif answer is not None and answer.billed_tokens is not None:
        outcome, billed, status = CallOutcome.INVALID, answer.billed_tokens, 200
    elif answer is None and error is not None and error.http_status is not None and error.http_status >= 400:
        outcome, billed, status = CallOutcome.FAILED, 0, error.http_status
    else:
        return None
    return ProviderCall(
        kind=CallKind.RECEIPT,
        attempt_id=intent.attempt_id,
        at_ms=route.clock.now_ms(),
        worker_id=intent.worker_id,
        provider=intent.provider,
        model=intent.model,
        vector_space=intent.vector_space,
        outcome=outcome,
        billed_tokens=billed,
        http_status=status,
        time_taken_ms=int((route.clock.monotonic() - started) * 1000),
        price_nanos_per_million=intent.price_nanos_per_million,
        price_version=intent.price_version,
    )


def _bill(answer: ProviderAnswer, call: Call) -> tuple[int, TokenSource]:
    """What the provider says it billed; a server that says nothing is taken at the local count, which is named."""
    if answer.billed_tokens is None:
        return sum(call.counts), call.token_source
    return answer.billed_tokens, TokenSource.PROVIDER


def verify(answer: ProviderAnswer, call: Call) -> list[Vector]:
    """The vectors in the order of the call's texts, each finite, of the right dimension and not all zero.

    Raises ProviderTransient with what is wrong; a paid answer that fails here is an `invalid` receipt.
    """
    count, dimensions = len(call.folds), call.function.dimensions
    accepted = call.function.model.answers_as
    if len(answer.vectors) != count or sorted(answer.indices) != list(range(count)):
        raise ProviderTransient("wrong_count_or_indices")
    if accepted is not None and answer.model not in accepted:
        raise ProviderTransient("wrong_model")
    ordered: list[Vector] = [answer.vectors[0]] * count
    for vector, index in zip(answer.vectors, answer.indices, strict=True):
        if vector.shape != (dimensions,):
            raise ProviderTransient("wrong_dimension")
        if not np.isfinite(vector).all():
            raise ProviderTransient("not_finite")
        if not vector.any():
            raise ProviderTransient("all_zero")
        ordered[index] = vector
    return ordered


def split(bill: int, counts: Sequence[int]) -> list[int]:
    """Share a bill by local counts: largest remainder, ties by lower position (U1). The shares sum to the bill.

    With exact counts (their sum is the bill) each share is the local count, in any batch.
    """
    total = sum(counts)
    if total == 0:
        counts, total = [1] * len(counts), len(counts)
    shares = [bill * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(bill * counts[i] % total), i))
    for i in by_remainder[: bill - sum(shares)]:
        shares[i] += 1
    return shares


def _fail(call: Call, code: ErrorCode, field: str, message: str) -> None:
    for fold in call.folds:
        fold.fault = Fault(code, field, message)
