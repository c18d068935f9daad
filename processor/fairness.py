"""Whose text goes next: tenants take turns in tokens, and inside a tenant nearly due texts go first."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from processor.work import Fold

TURN_TOKENS = 1024
"""What a turn grants a tenant of weight 1."""


class Text(NamedTuple):
    """A fold that waits, with the sizes that limits are held against.

    `due` on the monotonic clock; minus infinity when a call was made of it before. `quarters` are quarter tokens by
    the provider's estimator, so that UTF-8 bytes x 0.25 add up exactly. `body_bytes` are those of the text in JSON of
    pure ASCII with quotes, comma and space: a body that escapes less is smaller. `tenant_id`: whose turn it takes; with
    a shared cache scope others can have joined the fold, and its first work can be theirs by now.
    """

    due: float
    number: int
    fold: Fold
    tokens: int
    quarters: int
    body_bytes: int
    tenant_id: str


@dataclass(slots=True, eq=False)
class _Tenant:
    """A tenant with texts waiting: what a turn grants it, what it may still take, and its texts, nearly due first."""

    name: str
    grant: int
    credit: int = 0
    texts: list[Text] = field(default_factory=list)


class Turns:
    """Weighted deficit round robin in tokens: the order in which tenants' texts go out.

    The first tenant of the ring has had its grant. What it can't use it keeps until it has nothing waiting, so over
    any stretch two waiting tenants get shares that differ from their weights by a turn and a text at most.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._tenants: dict[str, _Tenant] = {}
        self._ring: deque[_Tenant] = deque()

    def push(self, text: Text) -> None:
        name = text.tenant_id
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, TURN_TOKENS * self._weights.get(name, 1))
            self._ring.append(tenant)
            if len(self._ring) == 1:
                self._begin_turn()
        heapq.heappush(tenant.texts, text)

    def pop(self) -> Text | None:
        """The next text; None when nothing waits."""
        ring = self._ring
        while ring:
            tenant = ring[0]
            if tenant.texts[0].tokens <= tenant.credit:
                text = heapq.heappop(tenant.texts)
                tenant.credit -= text.tokens
                if not tenant.texts:
                    ring.popleft()
                    del self._tenants[tenant.name]
                    self._begin_turn()
                return text
            ring.rotate(-1)
            self._begin_turn()
        return None

    def borrow(self, most: int) -> list[Text]:
        """Up to so many texts out of turn, each tenant's nearest due; `settle` must follow before anything else."""
        borrowed: list[Text] = []
        for tenant in itertools.islice(self._ring, most):
            some = min(len(tenant.texts), max(1, most // len(self._ring)))
            borrowed += [heapq.heappop(tenant.texts) for _ in range(some)]
        return borrowed

    def settle(self, *, charged: Sequence[Text], returned: Sequence[Text]) -> None:
        """Of the borrowed texts: what is kept is charged, up to a turn's debt; what is returned waits as before."""
        for text in charged:
            tenant = self._tenants[text.tenant_id]
            tenant.credit = max(tenant.credit - text.tokens, -tenant.grant)
        for text in returned:
            heapq.heappush(self._tenants[text.tenant_id].texts, text)
        self._remove_idle()

    def nearest_due(self) -> float:
        return min((tenant.texts[0].due for tenant in self._ring), default=float("inf"))

    def drop(self, unwanted: Callable[[Text], bool]) -> list[Text]:
        dropped: list[Text] = []
        for tenant in self._ring:
            gone = [text for text in tenant.texts if unwanted(text)]
            if gone:
                dropped += gone
                tenant.texts = [text for text in tenant.texts if not unwanted(text)]
                heapq.heapify(tenant.texts)
        self._remove_idle()
        return dropped

    def _remove_idle(self) -> None:
        """Tenants with nothing waiting leave, and their credit or debt with them."""
        if all(tenant.texts for tenant in self._ring):
            return
        first = self._ring[0]
        self._ring = deque(tenant for tenant in self._ring if tenant.texts)
        self._tenants = {tenant.name: tenant for tenant in self._ring}
        if not first.texts:
            self._begin_turn()

    def _begin_turn(self) -> None:
        if self._ring:
            self._ring[0].credit += self._ring[0].grant
