"""Which entry of a bounded cache goes first: the least recently used, or those that are used least often."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

MOST_USES = 3
"""Further uses are not counted: what is no longer asked for is gone after so many looks at it."""
SMALL_PARTS = 10


class Eviction(Protocol):
    """Knows the keys that a cache holds; each call is O(1), `victim` on average."""

    def added(self, key: bytes) -> None:
        """The key was not there before."""
        ...

    def used(self, key: bytes) -> None: ...

    def removed(self, key: bytes) -> None:
        """The key has gone for a reason of its own."""
        ...

    def victim(self) -> bytes:
        """The key that goes now: it is known no more. Only while there is one."""
        ...


class Lru:
    """The least recently used goes."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self.used = self._keys.move_to_end

    def added(self, key: bytes) -> None:
        self._keys[key] = None

    def removed(self, key: bytes) -> None:
        del self._keys[key]

    def victim(self) -> bytes:
        return self._keys.popitem(last=False)[0]


class S3Fifo:
    """What is used least often goes, and what is used once goes soon.

    Three queues, first in, first out (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): what
    is new waits in a small one, a tenth of all; what was used twice there moves to the main one, where each use counted
    is another round; of what the small one lets go the key is remembered, and next time it starts in the main one.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._gone: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes) -> None:
        if key in self._gone:
            del self._gone[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def used(self, key: bytes) -> None:
        queue = self._main if key in self._main else self._small
        uses = queue[key]
        if uses < MOST_USES:
            queue[key] = uses + 1

    def removed(self, key: bytes) -> None:
        del (self._main if key in self._main else self._small)[key]

    def victim(self) -> bytes:
        small, main = self._small, self._main
        while True:
            if SMALL_PARTS * len(small) >= len(small) + len(main):
                key, uses = small.popitem(last=False)
                if uses < 2:
                    self._remember(key)
                    return key
                main[key] = 0
            else:
                key, uses = main.popitem(last=False)
                if uses == 0:
                    return key
                main[key] = uses - 1

    def _remember(self, key: bytes) -> None:
        self._gone[key] = None
        if len(self._gone) > len(self._main):
            self._gone.popitem(last=False)
