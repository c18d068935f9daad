"""Order of what is sent for one chunk or one document of a source partition (law 8).

A chunk's outcome goes out only when every earlier offset of its partition with the same document and chunk id has its
own; a manifest only when all earlier offsets of its document have theirs. A parcel waits for lower offsets alone and
never holds a window's slot while it waits, so waiting can't go round in a circle.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from processor.ports import Lease
from processor.work import DocumentKey, Parcel


class DocumentOrder:
    """Entered in offset order as records are admitted, left as outcomes are acknowledged."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[Lease, DocumentKey, str], deque[int]] = {}
        self._documents: dict[tuple[Lease, DocumentKey], dict[int, int]] = {}
        self._changed = asyncio.Event()

    def enter(self, lease: Lease, offset: int, document: DocumentKey, chunk_ids: Sequence[str]) -> None:
        """A request about these chunks was admitted; with no chunk ids it is about the document itself."""
        for chunk_id in chunk_ids:
            self._chunks.setdefault((lease, document, chunk_id), deque()).append(offset)
        self._documents.setdefault((lease, document), {})[offset] = max(1, len(chunk_ids))

    def ready(self, parcel: Parcel) -> bool:
        if parcel.document is None:
            return True
        lease, offset = parcel.ticket.lease, parcel.ticket.source.offset
        if parcel.chunk_id is not None:
            earlier = self._chunks.get((lease, parcel.document, parcel.chunk_id))
            return not earlier or earlier[0] >= offset
        entries = self._documents.get((lease, parcel.document))
        return not entries or next(iter(entries)) >= offset

    def leave(self, parcel: Parcel) -> None:
        """The parcel is acknowledged."""
        if parcel.document is None:
            return
        lease, offset = parcel.ticket.lease, parcel.ticket.source.offset
        if parcel.chunk_id is not None:
            key = (lease, parcel.document, parcel.chunk_id)
            if waiting := self._chunks.get(key):
                waiting.remove(offset)
                if not waiting:
                    del self._chunks[key]
        if entries := self._documents.get((lease, parcel.document)):
            entries[offset] -= 1
            if not entries[offset]:
                del entries[offset]
            if not entries:
                del self._documents[lease, parcel.document]
        self._changed.set()

    def abandon(self, leases: Sequence[Lease]) -> None:
        """These leases are over: whoever waits wakes up and finds that its ticket is no longer live."""
        gone = set(map(id, leases))
        self._chunks = {key: value for key, value in self._chunks.items() if id(key[0]) not in gone}
        self._documents = {key: value for key, value in self._documents.items() if id(key[0]) not in gone}
        self._changed.set()

    async def changed(self) -> None:
        """Returns after the next `leave` or `abandon`."""
        self._changed.clear()
        await self._changed.wait()
