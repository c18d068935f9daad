"""Misses that wait for a call, and the calls made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from processor.domain import EmbeddingFunction, InputType, Item, Truncate
from processor.packing import Packer
from processor.work import Call, Fold, Job, Policy, Work
from tests.support.builders import NOW_MS, a_request, a_source
from tests.support.steps import MODEL, FakeLease

NUMBERS = itertools.count()


def a_function(prefix: str = "", truncate: Truncate = Truncate.ERROR, **model: Any) -> EmbeddingFunction:
    """Of the tiny model (10 words a text, 8 texts and 40 words a call) unless fields of it are given."""
    spec = replace(MODEL, **model)
    return EmbeddingFunction(spec, spec.space(4), InputType.DOCUMENT, prefix, truncate)


TINY = a_function()


def a_fold(
    text: str = "hello",
    tokens: int = 1,
    *,
    function: EmbeddingFunction = TINY,
    tenant: str = "acme",
    arrived: float = 0.0,
    deadline_ms: int | None = None,
    lease: FakeLease | None = None,
) -> Fold:
    """A measured miss of one work; its text is what its size in bytes is taken from."""
    number = next(NUMBERS)
    request = a_request([text], tenant_id=tenant, deadline_ms=deadline_ms)
    job = Job(lease or FakeLease(), a_source(number), 1, arrived, request=request, request_id=f"r{number}")
    work = Work(job, chunk_id="c0", chunk=request.chunks[0], item=Item(f"r{number}", 0))
    fold = work.fold = Fold(b"%d" % number, function, [work], arrived, tokens)
    fold.sent, fold.tokens, fold.estimated, fold.sent_bytes = text, tokens, tokens, len(text.encode())
    return fold


def a_packer(*folds: Fold, now: float = 0.0, **policy: Any) -> Packer:
    packer = Packer(Policy(**policy))
    packer.add(folds, now, NOW_MS)
    return packer


def taken(packer: Packer, *, now: float = 0.0, max_tokens: int | None = None) -> Call:
    """The next call, without any patience."""
    call, ended = packer.take(now, NOW_MS, 0.0, max_tokens)
    assert call is not None
    assert not ended
    return call


def all_calls(packer: Packer, max_tokens: int | None = None) -> list[Call]:
    calls = []
    while packer.next_tokens(0.0, 0.0, max_tokens) is not None:
        calls.append(taken(packer, max_tokens=max_tokens))
    return calls


def tenants(folds: Iterable[Fold]) -> list[str]:
    return [fold.works[0].job.request.tenant_id for fold in folds]
