"""Outcomes as values, and the first-copy rule by which a consumer of results or usage counts nothing twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from processor.domain import WHOLE_REQUEST, Fault, ReceivedResult, Request, Vector

TIMED_OUT = "timed_out"
DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one text (or chunk id, or manifest: index -1).

    `status` is ok, error, valid, invalid, or timed_out: nothing is known yet, and the same call with the same
    correlation id asks again without a second charge. `vector` is float32 of shape (dimensions,), or None. `error`
    holds code, field and message. `result` is the record itself: tokens, cost, cache level, model, ids.
    """

    index: int
    chunk_id: str
    request_id: str
    status: str
    vector: Vector | None = field(default=None, repr=False)
    error: Fault | None = None
    result: ReceivedResult | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def timed_out(self) -> bool:
        return self.status == TIMED_OUT


class Pending:
    """The outcomes of one request as they arrive; `complete` once each of its chunks has one."""

    def __init__(self, request: Request, request_id: str) -> None:
        ids = [chunk.chunk_id for chunk in request.chunks] or list(request.chunk_ids)
        first = request.first_chunk_index
        by_index = dict(enumerate(ids, first))
        self.request_id = request_id
        # The outcome of a manifest stands for the document, whatever it lists.
        self._ids = {WHOLE_REQUEST: ""} if request.action == "document_manifest" else by_index
        self._found: dict[int, ReceivedResult] = {}

    @property
    def complete(self) -> bool:
        return len(self._found) == len(self._ids)

    def take(self, result: ReceivedResult) -> None:
        """The first copy of an outcome stands; a whole request's stands for every chunk that has none."""
        if result.chunk_index == WHOLE_REQUEST:
            for index in self._ids:
                if index == WHOLE_REQUEST or result.stands_for(index):
                    self._found.setdefault(index, result)
        elif result.chunk_index in self._ids:
            self._found.setdefault(result.chunk_index, result)

    def outcomes(self) -> list[Outcome]:
        return [self._outcome(index, chunk_id) for index, chunk_id in self._ids.items()]

    def _outcome(self, index: int, chunk_id: str) -> Outcome:
        result = self._found.get(index)
        return Outcome(
            index=index,
            chunk_id=chunk_id,
            request_id=self.request_id,
            status=result.status if result else TIMED_OUT,
            vector=result.vector if result else None,
            error=result.error if result else None,
            result=result,
        )


class FirstResults:
    """Tells the first copy of each chunk's outcome from later ones, in the order of their partition.

    Remembers the newest `remember` requests (None: all of them); a copy of one it has forgotten passes again.
    """

    def __init__(self, *, remember: int | None) -> None:
        self._remember = remember
        self._seen: OrderedDict[str, set[int]] = OrderedDict()

    def is_first(self, result: ReceivedResult) -> bool:
        """Whether any chunk it stands for had no outcome before."""
        seen = self._seen.setdefault(result.request_id, set())
        self._seen.move_to_end(result.request_id)
        fresh = set(_stands_for(result)) - seen
        seen |= fresh
        if self._remember is not None and len(self._seen) > self._remember:
            self._seen.popitem(last=False)
        return bool(fresh)


class FirstCharges:
    """Tells the charge among the copies of a usage event: the first one by offset.

    A copy counts as one while the copy before it was appended at most twice the horizon earlier; older keys are
    forgotten. `remember` bounds the memory besides (None: no bound); a copy of a forgotten key passes again.
    """

    def __init__(self, *, horizon_days: int, remember: int | None) -> None:
        self._window_ms = 2 * horizon_days * DAY_MS
        self._remember = remember
        self._last_ms: OrderedDict[str, int] = OrderedDict()

    def is_first(self, key: str, append_ms: int) -> bool:
        last_ms = self._last_ms.pop(key, None)
        self._last_ms[key] = append_ms
        while self._remember is not None and len(self._last_ms) > self._remember:
            self._last_ms.popitem(last=False)
        return last_ms is None or append_ms - last_ms > self._window_ms


def _stands_for(result: ReceivedResult) -> Iterable[int]:
    if result.chunk_index != WHOLE_REQUEST:
        return (result.chunk_index,)
    # A manifest's ok stands for its document: index -1 and no chunk.
    return range(result.first_chunk_index, result.first_chunk_index + result.length) or (WHOLE_REQUEST,)
