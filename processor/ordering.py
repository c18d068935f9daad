"""Order of what is sent for one chunk or one document of a source partition (law 8).

A chunk's outcome goes out only when every earlier offset of its partition with the same document and chunk id has its
own; a manifest only when all earlier offsets of its document have theirs. A parcel waits for lower offsets alone and
never holds a window's slot while it waits, so waiting can't go round in a circle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from processor.ports import Lease
from processor.work import DocumentKey, OpenDocument, Parcel


class DocumentOrder:
    """Entered in offset order as records are admitted, left as outcomes are acknowledged."""

    def __init__(self) -> None:
        self._documents: dict[tuple[Lease, DocumentKey], OpenDocument] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """How many documents have outcomes outstanding."""
        return len(self._documents)

    def enter(self, document: DocumentKey, parcels: Sequence[Parcel]) -> None:
        """All outcomes of one record about this document: at least one, in the order of its chunks."""
        ticket = parcels[0].ticket
        key = (ticket.lease, document)
        entry = self._documents.get(key)
        if entry is None:
            entry = self._documents[key] = OpenDocument(key)
        entry.owed[ticket.source.offset] = len(parcels)
        last = entry.last
        for parcel in parcels:
            parcel.document = entry
            if parcel.chunk_id is not None:
                parcel.after = last.get(parcel.chunk_id)
                last[parcel.chunk_id] = parcel

    def ready(self, parcel: Parcel) -> bool:
        if parcel.after is not None:
            if not parcel.after.left:
                return False
            parcel.after = None
        entry = parcel.document
        if entry is None or parcel.chunk_id is not None:
            return True
        return next(iter(entry.owed)) >= parcel.ticket.source.offset

    def leave(self, parcels: Iterable[Parcel]) -> None:
        """These parcels are acknowledged."""
        for parcel in parcels:
            parcel.left = True
            entry = parcel.document
            if entry is None:
                continue
            if parcel.chunk_id is not None and entry.last.get(parcel.chunk_id) is parcel:
                del entry.last[parcel.chunk_id]
            offset = parcel.ticket.source.offset
            owed = entry.owed[offset] - 1
            if owed:
                entry.owed[offset] = owed
                continue
            del entry.owed[offset]
            if not entry.owed and self._documents.get(entry.key) is entry:
                del self._documents[entry.key]
        self._changed.set()

    def abandon(self, leases: Sequence[Lease]) -> None:
        """These leases are over: whoever waits wakes up and finds that its ticket is no longer live."""
        gone = set(map(id, leases))
        for key in [key for key in self._documents if id(key[0]) in gone]:
            self._documents.pop(key).last.clear()  # else its parcels and it would hold one another
        self._changed.set()

    async def changed(self) -> None:
        """Returns after the next `leave` or `abandon`."""
        self._changed.clear()
        await self._changed.wait()
