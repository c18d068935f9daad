"""Which entry of a bounded cache goes first: the least recently used, or those that are used least often."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from processor.ports import Found

MOST_USES = 3
"""Further uses are not counted: what is no longer asked for is gone after so many looks at it."""
MOST_LOOKS = 100
"""In search of one that may go: then the next one goes, however often it was used. A look takes up to 0.7 us, and a
call's vectors are let in 256 at a time before anybody else has a turn. A Zipf trace finds as much as with 1,000."""
SMALL_PARTS = 10


class Slot:
    """A kept entry. All that a look-up needs lies in one place: of a full cache each object more is a cache miss."""

    __slots__ = ("dimensions", "expires_at", "found", "key", "uses")

    def __init__(self, key: bytes, found: Found, dimensions: int, expires_at: float) -> None:
        self.key = key
        self.found = found
        self.dimensions = dimensions
        self.expires_at = expires_at
        self.uses = 0


class Eviction(Protocol):
    """Knows the slots of a cache; each call is O(1)."""

    def added(self, slot: Slot) -> None:
        """There was none of its key."""
        ...

    def used(self, slot: Slot) -> None: ...

    def removed(self, slot: Slot) -> None:
        """It has gone for a reason of its own."""
        ...

    def victim(self) -> Slot:
        """The one that goes now: it is known no more. Only while there is one."""
        ...


class Lru:
    """The least recently used goes."""

    def __init__(self) -> None:
        self._slots: OrderedDict[bytes, Slot] = OrderedDict()

    def added(self, slot: Slot) -> None:
        self._slots[slot.key] = slot

    def used(self, slot: Slot) -> None:
        self._slots.move_to_end(slot.key)

    def removed(self, slot: Slot) -> None:
        del self._slots[slot.key]

    def victim(self) -> Slot:
        return self._slots.popitem(last=False)[1]


class S3Fifo:
    """What is used least often goes, and what is used once goes soon.

    Three queues, first in, first out (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): what
    is new waits in a small one, a tenth of all; what was used twice there moves to the main one, where each use counted
    is another round; of what the small one lets go the key is remembered, and next time it starts in the main one.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, Slot] = OrderedDict()
        self._main: OrderedDict[bytes, Slot] = OrderedDict()
        self._gone: OrderedDict[bytes, None] = OrderedDict()

    def added(self, slot: Slot) -> None:
        if slot.key in self._gone:
            del self._gone[slot.key]
            self._main[slot.key] = slot
        else:
            self._small[slot.key] = slot

    def used(self, slot: Slot) -> None:
        if slot.uses < MOST_USES:
            slot.uses += 1

    def removed(self, slot: Slot) -> None:
        del (self._main if slot.key in self._main else self._small)[slot.key]

    def victim(self) -> Slot:
        small, main = self._small, self._main
        looks = 0
        while True:
            looks += 1
            if SMALL_PARTS * len(small) >= len(small) + len(main):
                key, slot = small.popitem(last=False)
                if slot.uses < 2 or looks == MOST_LOOKS:
                    self._remember(key)
                    return slot
                slot.uses = 0
            else:
                key, slot = main.popitem(last=False)
                if slot.uses == 0 or looks == MOST_LOOKS:
                    return slot
                slot.uses -= 1
            main[key] = slot

    def _remember(self, key: bytes) -> None:
        """As many as the main queue has; when that shrinks (a purge, larger vectors) they go two at a time."""
        self._gone[key] = None
        for _ in range(min(2, len(self._gone) - len(self._main))):
            self._gone.popitem(last=False)
