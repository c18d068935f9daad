"""Liveness: a record that ends the process each time it is read must not stop its partition for ever.

What is known of a partition's first unfinished record travels in the metadata of the committed offset, so that the
next owner, on whatever machine, knows it too. A life that ends uncleanly without moving the offset counts; after
three of them the partition is read one record at a time; a record that ran alone in two lives that ended uncleanly,
while it waited for no paused dependency, is lethal: it goes to the dead letters by reference.
"""

from __future__ import annotations

from typing import NamedTuple

ISOLATE_AFTER = 3
LETHAL_AFTER = 2

MOVED, OPEN, ALONE, WAITING = "moved", "open", "alone", "waiting"
CLEAN = ""


class Suspicion(NamedTuple):
    """`mark`: how the owner stood when it committed; a clean release leaves an empty mark.

    `moved`: the offset has moved in this life. `open`: it has not. `alone`: one record runs alone.
    `waiting`: it does so and waits for a paused dependency.
    """

    mark: str = CLEAN
    unclean: int = 0
    alone: int = 0

    @classmethod
    def parse(cls, metadata: str | None) -> Suspicion:
        """Of a commit's metadata; anything that is not ours says nothing."""
        mark, _, counts = (metadata or "").partition(":")
        unclean, _, alone = counts.partition(":")
        if mark not in {MOVED, OPEN, ALONE, WAITING} or not (unclean.isdigit() and alone.isdigit()):
            return cls()
        return cls(mark, int(unclean), int(alone))

    def __str__(self) -> str:
        return f"{self.mark}:{self.unclean}:{self.alone}" if self.mark else ""

    def taken_over(self) -> Suspicion:
        """What a new owner begins with: the life before it ended uncleanly unless its mark is empty."""
        if self.mark == OPEN:
            return Suspicion(OPEN, self.unclean + 1, self.alone)
        if self.mark == ALONE:
            return Suspicion(OPEN, self.unclean + 1, self.alone + 1)
        if self.mark == WAITING:
            return Suspicion(OPEN, self.unclean, self.alone)
        return Suspicion(OPEN)

    def running_alone(self, *, waiting: bool) -> Suspicion:
        """Before a record is handed out alone, and when its dependency pauses or resumes meanwhile."""
        return self._replace(mark=WAITING if waiting else ALONE)

    def passed(self) -> Suspicion:
        """The record that ran alone is finished: the next one runs alone too, with nothing held against it."""
        return Suspicion(OPEN, self.unclean, 0)

    @property
    def isolated(self) -> bool:
        """Read one record at a time."""
        return self.unclean >= ISOLATE_AFTER

    @property
    def lethal(self) -> bool:
        """The first unfinished record ends processes."""
        return self.isolated and self.alone >= LETHAL_AFTER
