"""Which offset of one partition may be committed: the first one whose work is not finished. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Watermark:
    """Contiguous over the offsets that were handed out, in whatever order they are finished.

    `next_offset` is the offset expected of the next record: everything below it was handed out, or is known not
    to be in the log. It begins at the position that reading begins at; 0 is an offset like any other.
    """

    def __init__(self, next_offset: int) -> None:
        self.next_offset = next_offset
        self._handed_out: deque[int] = deque()
        self._unfinished: set[int] = set()

    def __len__(self) -> int:
        """How many records are unfinished."""
        return len(self._unfinished)

    @property
    def first_unfinished(self) -> int:
        """What may be committed: every record below it is finished."""
        return self._handed_out[0] if self._handed_out else self.next_offset

    def hand_out(self, offsets: Iterable[int]) -> None:
        """These records are worked on from now on; they ascend. An offset left out is not in the log.

        ValueError when one was handed out before: its work would be counted twice.
        """
        for offset in offsets:
            if offset < self.next_offset:
                raise ValueError(f"offset {offset} was handed out before: {self.next_offset} is expected")
            self._handed_out.append(offset)
            self._unfinished.add(offset)
            self.next_offset = offset + 1

    def finish(self, offset: int) -> None:
        """The record's work is done; finishing it again changes nothing. ValueError when it was never handed out."""
        if offset >= self.next_offset:
            raise ValueError(f"offset {offset} was never handed out: {self.next_offset} is expected")
        self._unfinished.discard(offset)
        while self._handed_out and self._handed_out[0] not in self._unfinished:
            self._handed_out.popleft()
