"""Order of what is sent for one chunk or one document of a source partition (law 8).

A chunk's outcome goes out only when every earlier offset of its partition with the same document and chunk id has its
own; a manifest only when all earlier offsets of its document have theirs. Works wait for lower offsets alone and
never hold a window's slot while they wait, so waiting can't go round in a circle.
"""

from __future__ import annotations

import asyncio
from collections import deque

DocumentKey = tuple[str, str | None, str]


class DocumentOrder:
    """One per lease. Entered in offset order as records are admitted, left as outcomes are acknowledged."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[DocumentKey, str], deque[int]] = {}
        self._documents: dict[DocumentKey, dict[int, int]] = {}
        self._changed = asyncio.Event()

    def enter(self, offset: int, document: DocumentKey, chunk_ids: list[str]) -> None:
        """A request about these chunks was admitted; with no chunk ids it stands for the document itself."""
        for chunk_id in chunk_ids:
            self._chunks.setdefault((document, chunk_id), deque()).append(offset)
        self._documents.setdefault(document, {})[offset] = max(1, len(chunk_ids))

    def chunk_ready(self, offset: int, document: DocumentKey, chunk_id: str) -> bool:
        waiting = self._chunks.get((document, chunk_id))
        return not waiting or waiting[0] >= offset

    def document_ready(self, offset: int, document: DocumentKey) -> bool:
        waiting = self._documents.get(document)
        return not waiting or next(iter(waiting)) >= offset

    def leave(self, offset: int, document: DocumentKey, chunk_id: str | None) -> None:
        """One chunk (or, with None, the document's own entry) has its acknowledged outcome."""
        if chunk_id is not None:
            waiting = self._chunks.get((document, chunk_id))
            if waiting is not None:
                waiting.remove(offset)
                if not waiting:
                    del self._chunks[document, chunk_id]
        entries = self._documents.get(document)
        if entries is not None:
            entries[offset] -= 1
            if entries[offset] <= 0:
                del entries[offset]
            if not entries:
                del self._documents[document]
        self._changed.set()

    async def changed(self) -> None:
        """Returns after the next `leave` or `abandon`."""
        self._changed.clear()
        await self._changed.wait()

    def abandon(self) -> None:
        """The lease is over: nothing waits any more (its works find that they are not live)."""
        self._chunks.clear()
        self._documents.clear()
        self._changed.set()
