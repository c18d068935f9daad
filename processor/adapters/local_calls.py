"""What the runtimes of models on this machine share: no text is ever cut, and what went wrong becomes our errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TypeVar

from processor.adapters.tokens import WordPiece
from processor.errors import CallTooLarge, InputRejected, ProviderError, ProviderTransient

_NO_MEMORY = re.compile(r"out of memory|not enough memory|(failed|unable|can't|cannot) (to )?alloc|bad_?\s?alloc", re.I)

T = TypeVar("T")


async def together(pieces: Sequence[asyncio.Future[T]]) -> list[T]:
    """What the pieces of a call come to. Of a call that failed or was cancelled, none is begun any more."""
    try:
        return await asyncio.gather(*pieces)
    finally:
        for piece in pieces:
            piece.cancel()


def tokenized(tokenizer: WordPiece, texts: Sequence[str], limit: int) -> list[Sequence[int]]:
    """The tokens of each text. InputRejected when one has more than `limit`: nothing is cut, nothing was run then."""
    tokens = [tokenizer.ids(text) for text in texts]
    if max(map(len, tokens), default=0) > limit:
        # With a status, so that the attempt's receipt says: answered, nothing billed.
        raise InputRejected("text_too_long", http_status=400)
    return tokens


def failure(error: Exception, texts: int) -> ProviderError:
    """The error of ours for a runtime's, in a call of so many texts: of one alone, no smaller call could pass.

    The runtimes' classes share no base, and their messages may quote input.
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return (CallTooLarge if texts > 1 else ProviderTransient)("out_of_memory", http_status=507)
    return ProviderTransient(f"inference_{type(error).__name__.lower()}")
