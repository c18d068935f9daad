"""Step 2: fold equal texts, queue them by embedding function, close windows in which tenants take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from processor.domain import EmbeddingFunction
from processor.work import Fold, Policy, Window, Work

TURN_TEXTS = 32
"""Texts of one tenant before the next one has its turn: a small tenant is looked up before a large one is through."""


def estimated_tokens(text: str) -> int:
    """Bytes / 4, at least 1: good enough to close windows; exact counts are made for misses only."""
    return max(1, (len(text) if text.isascii() else len(text.encode())) // 4)


@dataclass(slots=True, eq=False)
class _Queue:
    """Folds of one function that wait for a window, oldest first. `texts` counts the works that wait with them.

    `tenants` in the order of their turns, with the folds of each; what is not in `folds` any more is passed over.
    """

    function: EmbeddingFunction
    folds: dict[bytes, Fold] = field(default_factory=dict)
    tenants: dict[str, deque[Fold]] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0

    @property
    def oldest(self) -> float:
        return next(iter(self.folds.values())).waiting_since

    def add(self, fold: Fold) -> None:
        self.folds[fold.key] = fold
        self.texts += 1
        self.tokens += fold.size_tokens
        self.enter(fold, fold.tenant_id)

    def enter(self, fold: Fold, tenant_id: str) -> None:
        """It goes in the tenant's turn; one that waits in those of several, as a shared scope has it, in the first."""
        self.tenants.setdefault(tenant_id, deque()).append(fold)

    def in_turn(self) -> Iterator[Fold]:
        """What goes next, again and again. Each is to be removed before the next one is asked for."""
        while self.tenants:
            tenant, folds = next(iter(self.tenants.items()))
            left = TURN_TEXTS
            while folds and left > 0:
                if self.folds.get(folds[0].key) is folds[0]:
                    left -= len(folds[0].works)
                    yield folds[0]
                folds.popleft()
            del self.tenants[tenant]
            if folds:
                self.tenants[tenant] = folds

    def remove(self, fold: Fold) -> None:
        del self.folds[fold.key]
        self.texts -= len(fold.works)
        self.tokens -= fold.size_tokens

    def due_at(self, policy: Policy) -> float:
        full = self.texts >= policy.window_max_texts or self.tokens >= policy.window_max_tokens
        return float("-inf") if full else self.oldest + policy.window_max_wait_s


class Batcher:
    """The queues of folds, one per embedding function, and the table that makes in-flight texts single-flight."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._queues: dict[str, _Queue] = {}
        self._folds: dict[bytes, Fold] = {}

    def __len__(self) -> int:
        """Distinct texts that wait for a window."""
        return sum(len(queue.folds) for queue in self._queues.values())

    def add(self, work: Work, key: bytes, function: EmbeddingFunction, now: float) -> None:
        """Join the fold of an equal text that is queued or in flight, else queue a new one."""
        fold = self._folds.get(key)
        if fold is not None:
            fold.works.append(work)
            work.fold = fold
            if fold.payer == work.item.request_id:  # sent again, or left by a lease before: it is what the call is for
                work.job.begun = True
            if not fold.in_window:
                queue = self._queues[function.name]
                queue.texts += 1
                if (tenant_id := work.job.request.tenant_id) != fold.tenant_id:
                    queue.enter(fold, tenant_id)
            return
        fold = work.fold = Fold(key, function, [work], now, estimated_tokens(work.chunk.text))
        self._folds[key] = fold
        if function.name not in self._queues:
            self._queues[function.name] = _Queue(function)
        self._queues[function.name].add(fold)

    def take(self, now: float, *, flush: bool = False) -> Window | None:
        """The due window whose oldest fold waited longest, or None. Folds that nobody wants any more are let go."""
        for queue in sorted(self._queues.values(), key=lambda queue: queue.oldest):
            if flush or queue.due_at(self._policy) <= now:
                window = self._close(queue)
                if window.folds:
                    return window
        return None

    def due_at(self) -> float | None:
        """When the next window is due on the monotonic clock; None when nothing is queued."""
        return min((queue.due_at(self._policy) for queue in self._queues.values()), default=None)

    def settled(self, fold: Fold) -> None:
        """The fold has its outcome: an equal text that comes later starts anew (and finds the cache)."""
        self._folds.pop(fold.key, None)

    def let_go(self) -> None:
        """Forget works that were dropped: while a provider is out each rebalance would leave as many again."""
        for fold in list(self._folds.values()):
            live = [work for work in fold.works if work.ticket.live]
            if len(live) == len(fold.works):
                continue
            if fold.in_window:
                fold.works = live or fold.works[:1]  # whoever carries the window still asks for its text
                continue
            queue = self._queues[fold.function.name]
            queue.texts -= len(fold.works) - len(live)
            fold.works = live
            if not live:
                del queue.folds[fold.key]
                queue.tokens -= fold.size_tokens
                self.settled(fold)
                if not queue.folds:
                    del self._queues[fold.function.name]

    def _close(self, queue: _Queue) -> Window:
        """Whole folds, tenants in turn, up to the limits; a fold of more works than a window may hold goes alone."""
        policy = self._policy
        window = Window(queue.function, [])
        texts = tokens = 0
        for fold in queue.in_turn():
            works = len(fold.works)
            wanted = fold.wanted
            full = texts + works > policy.window_max_texts or tokens + fold.size_tokens > policy.window_max_tokens
            if full and wanted and window.folds:
                break
            queue.remove(fold)
            if wanted:
                texts += works
                tokens += fold.size_tokens
                fold.in_window = True
                window.folds.append(fold)
            else:
                self.settled(fold)
        if not queue.folds:
            del self._queues[queue.function.name]
        return window
