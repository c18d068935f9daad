"""Step 5: intent, call, verify, receipt, split. An attempt is one HTTP request and has an intent of its own.

What a provider's failure means for the texts is decided here, once, from the class of the error; what it means for the
pace of calls is the gate's (`limits.py`):

    throttled, paused, transient   the whole call again, later; a paused deployment is probed by one call at a time
    composition (size, timeout)    smaller calls from now on, of the same texts; the same call once more if it only
                                   got no answer and calls of its size have succeeded
    input, or failed k times       a binary search for the text at fault, which fails alone as `provider_rejects`
    model                          `provider_model_error` for its chunks
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from processor.answers import bill, split, verify
from processor.domain import (
    CallItem,
    CallKind,
    CallOutcome,
    Entry,
    ErrorCode,
    Fault,
    ProviderCall,
    TokenSource,
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
from processor.limits import Gate, Permit
from processor.packing import Packer
from processor.ports import Clock, Destination, EmbeddingProvider, Events, Outbox, ProviderAnswer
from processor.work import Call, Fold, Outcome, Policy, Work

REJECTED = Fault(ErrorCode.PROVIDER_REJECTS, "chunks.text", "chunks.text: the provider refuses this text")
MODEL_REFUSED = Fault(ErrorCode.PROVIDER_MODEL_ERROR, "model", "model: the provider refuses it; see the worker's log")


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """One place that serves the route's models: an account, a region. `name` stands in the ledger."""

    name: str
    provider: EmbeddingProvider
    gate: Gate

    def retry_at(self, call: Call, now: float) -> float:
        """When the budget for retries allows this call on the monotonic clock; a first try needs none."""
        if call.attempts == 0 or self.gate.admits(call.tokens, retry=True):
            return now
        return self.gate.ready_at(call.tokens, retry=True) or now

    def begin(self, call: Call) -> Permit:
        return self.gate.begin(call.tokens, retry=call.attempts > 0)


@dataclass(slots=True, eq=False)
class Route:
    """The deployments of one set of vector spaces, in order of preference, and what an attempt needs beside them."""

    deployments: Sequence[Deployment]
    outbox: Outbox
    clock: Clock
    policy: Policy
    new_id: Callable[[], str]
    events: Events = field(default_factory=Events)
    jitter: Callable[[float, float], float] = random.uniform
    successes: int = 0

    @property
    def provider_name(self) -> str:
        """In results and usage: the same whichever deployment answered."""
        return self.deployments[0].provider.name

    @property
    def paused(self) -> str | None:
        """Why nothing gets through: the first deployment's reason when all of them are paused."""
        reasons = [deployment.gate.paused for deployment in self.deployments]
        return reasons[0] if None not in reasons else None

    @property
    def in_flight(self) -> int:
        return sum(deployment.gate.in_flight for deployment in self.deployments)

    @property
    def call_seconds(self) -> float:
        """How long a call typically takes at present."""
        return max(deployment.gate.call_seconds for deployment in self.deployments)

    @property
    def max_call_tokens(self) -> int | None:
        """The least of what the deployments want in one call."""
        limits = [gate.max_call_tokens for gate in self._open_gates() if gate.max_call_tokens is not None]
        return min(limits, default=None)

    def choose(self, tokens: int) -> Deployment | None:
        """The first that takes a call of about so many tokens now."""
        return next((deployment for deployment in self.deployments if deployment.gate.admits(tokens)), None)

    def ready_at(self, tokens: int) -> float | None:
        """When to ask again on the monotonic clock; None: when a call in flight ends."""
        times = [deployment.gate.ready_at(tokens) for deployment in self.deployments]
        return min((at for at in times if at is not None), default=None)

    def _open_gates(self) -> list[Gate]:
        gates = [deployment.gate for deployment in self.deployments]
        return [gate for gate in gates if gate.paused is None] or gates


class Embedded(NamedTuple):
    """`done`: folds with an entry or a fault, or that nobody wants; `receipts`: acknowledgements to await in step 7."""

    done: list[Fold]
    receipts: list[Awaitable[None]]


async def embed(call: Call, on: Deployment, permit: Permit, route: Route, packer: Packer) -> Embedded:
    """Step 5 for a call: one attempt. What is to be tried again is back in the packer when this returns."""
    _refuse(call)
    leaders = [(fold, fold.begin()) for fold in call.folds]
    wanted = [(fold, leader) for fold, leader in leaders if leader is not None]
    done = [fold for fold, leader in leaders if leader is None]
    call.folds = [fold for fold, _ in wanted]
    if not wanted:
        permit.cancelled()
        packer.give_back([*call.rest, *call.spared], route.clock.monotonic())
        return Embedded(done, [])
    error, receipts = await _attempt(call, [leader for _, leader in wanted], on, permit, route)
    if error is None:
        done += call.folds
        packer.fitted(call)
        _search_rest(call, route, packer)
        return Embedded(done, receipts)
    # Before the call is made anew, so that no offset can be committed while the ledger may still lose this attempt.
    for receipt in receipts:
        await receipt
    return Embedded(done + _again(call, error, route, packer), [])


def _refuse(call: Call) -> None:
    """End the works that joined the call since it was formed, and whose requests were refused since: they lead none."""
    for fold in call.folds:
        for work in fold.live_works():
            if work.job.refused is not None:
                work.outcome = Outcome(fault=work.job.refused)


def _again(call: Call, error: ProviderError, route: Route, packer: Packer) -> list[Fold]:
    """Decide what becomes of a failed call. The folds that it ends."""
    now = route.clock.monotonic()
    if isinstance(error, ModelRejected):
        return _fail([*call.folds, *call.rest, *call.spared], MODEL_REFUSED)
    single = len(call.folds) == 1
    # No answer to a size that has passed before may be chance: once. A cap for each would leave one text a call.
    by_chance = isinstance(error, CallTooLarge) and error.http_status is None and not call.attempts
    by_chance = by_chance and packer.has_fitted(call)
    if isinstance(error, CallTooLarge) and not (single or by_chance):
        packer.give_back([*call.rest, *call.spared], now)
        packer.too_large(call)
        return []
    refused = isinstance(error, InputRejected | CallTooLarge) and not by_chance
    if refused or _is_poison(call, error, route):
        if single:
            packer.give_back([*call.rest, *call.spared], now)
            return _fail(call.folds, REJECTED)
        call.searching = call.searching or ("refusal" if refused else "failures")
        _search(call, call.folds, packer, spared=[*call.spared, *call.rest])  # innocent unless they fail too
        return []
    if call.failures >= route.policy.poison_attempts:  # nobody else succeeds: those that a search keeps waiting may
        packer.give_back([*call.rest, *call.spared], now)
        call.rest, call.spared = [], []
    call.attempts += 1
    call.not_before = now
    if not isinstance(error, ProviderThrottled | ProviderPaused):  # for those the gate waits
        backoff_s = min(route.policy.retry_initial_s * 2 ** min(call.attempts - 1, 30), route.policy.retry_max_s)
        call.not_before += route.jitter(0.0, backoff_s)
    if route.paused is not None:
        # The next probe is for a call that did not just fail, if there is one: a text that always fails keeps nobody.
        call.not_before = max(call.not_before, (route.ready_at(call.tokens) or now) + route.policy.retry_initial_s)
    packer.retry(call)
    return []


def _is_poison(call: Call, error: ProviderError, route: Route) -> bool:
    """Failed k times while the provider succeeded for others: one of its texts is at fault, not the provider.

    In a search for such a text one failure is enough to look closer, until it is alone: an outage convicts nobody.
    """
    if not isinstance(error, ProviderTransient):  # throttling and pauses say nothing about a text
        return False
    if call.failures == 0 and (call.searching != "failures" or len(call.folds) == 1):
        call.successes_seen = route.successes
    call.failures += 1
    if route.successes <= call.successes_seen:
        return False
    return call.failures >= route.policy.poison_attempts or (call.searching == "failures" and len(call.folds) > 1)


def _search(call: Call, suspects: list[Fold], packer: Packer, spared: list[Fold]) -> None:
    """Halve the suspects: one half is called next; if that turns out well, the text at fault is in the other.

    So one text among n is found by log2(n) calls, and one more to be certain; who was spared shares a call after them.
    """
    middle = (len(suspects) + 1) // 2
    packer.retry(
        Call(
            call.function,
            suspects[:middle],
            attempts=1,
            successes_seen=call.successes_seen,
            searching=call.searching,
            rest=suspects[middle:],
            spared=spared,
        )
    )


def _search_rest(call: Call, route: Route, packer: Packer) -> None:
    """After a half that turned out well. The last suspect is called alone: what refused it may have passed."""
    if call.rest:
        _search(call, call.rest, packer, call.spared)
    else:
        packer.give_back(call.spared, route.clock.monotonic())


async def _attempt(
    call: Call, leaders: Sequence[Work], on: Deployment, permit: Permit, route: Route
) -> tuple[ProviderError | None, list[Awaitable[None]]]:
    """One attempt: no error when the folds have their entries. With the acknowledgement of its receipt, if any."""
    started = route.clock.monotonic()
    intent = _intent(call, leaders, on, route)
    answer: ProviderAnswer | None = None
    error: ProviderError | None = None
    try:
        await route.clock.sleep(0)  # to make it took 4 ms for 2,048 texts, and to encode it takes 4 more
        await route.outbox.send([Destination("calls", intent)])
        answer = await on.provider.embed([fold.sent for fold in call.folds], call.function, intent.attempt_id)
        vectors = await verify(answer, call.function, len(call.folds), route.clock)
    except ProviderError as raised:
        error = raised
        if answer is not None:
            error.limits = answer.limits
        permit.failed(error)
        route.events.count("provider_errors", 1, {"code": error.code})
    except BaseException:
        permit.cancelled()
        raise
    else:
        route.successes += 1
        permit.succeeded(bill(answer, call)[0], answer.limits)
    took_s = route.clock.monotonic() - started
    receipt = _receipt(intent, call, answer, error, route, took_s)
    outcome = receipt.outcome if receipt and receipt.outcome else "unanswered"
    route.events.count("provider_calls", 1, {"outcome": outcome})
    route.events.observe("provider_call_seconds", took_s, {})
    receipts = [] if receipt is None else [await route.outbox.post(Destination("calls", receipt))]
    if answer is None or error is not None:
        return error, receipts
    billed, source = bill(answer, call)
    counts = [fold.tokens for fold in call.folds]
    if call.folds[0].token_source is TokenSource.TOKENIZER and billed != sum(counts):
        route.events.count("counter_drift", 1, {"model": call.function.model.name})
    route.events.count("provider_tokens", billed, {"model": call.function.model.name})
    for fold, leader, vector, tokens in zip(call.folds, leaders, vectors, split(billed, counts), strict=True):
        fold.entry = Entry(vector, tokens, leader.item, intent.attempt_id, source, fold.cut_tokens)
    return None, receipts


def _intent(call: Call, leaders: Sequence[Work], on: Deployment, route: Route) -> ProviderCall:
    """U1: the leader items with who pays and their local counts, and by when its receipt comes if it ever does."""
    now_ms = route.clock.now_ms()
    model = call.function.model
    price = model.price_at(now_ms)
    return ProviderCall(
        kind=CallKind.INTENT,
        attempt_id=route.new_id(),
        at_ms=now_ms,
        worker_id=route.policy.worker_id,
        provider=on.name,
        model=model.name,
        vector_space=str(call.function.space),
        items=[
            CallItem(work.item.request_id, work.item.index, work.job.request.payer_id, fold.tokens)
            for work, fold in zip(leaders, call.folds, strict=True)
        ],
        estimated_tokens=call.tokens,
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
    took_s: float,
) -> ProviderCall | None:
    """U1: `ok`, `invalid` only if its usage was readable, `failed` only for an answered HTTP error; else none."""
    if answer is not None and error is None:
        outcome, billed, status = CallOutcome.OK, bill(answer, call)[0], 200
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
        time_taken_ms=int(took_s * 1000),
        price_nanos_per_million=intent.price_nanos_per_million,
        price_version=intent.price_version,
    )


def _fail(folds: list[Fold], fault: Fault) -> list[Fold]:
    for fold in folds:
        fold.fault = fault
    return folds
