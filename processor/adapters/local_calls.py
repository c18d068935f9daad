"""A call of a model on this machine, whatever runs it: off the event loop, piece by piece, and no text is ever cut."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from processor.adapters.tokens import WordPiece
from processor.domain import ModelSpec
from processor.errors import CallTooLarge, InputRejected, ProviderError, ProviderTransient
from processor.ports import ProviderAnswer

_NO_MEMORY = re.compile(r"out of memory|not enough memory|(failed|unable|can't|cannot) (to )?alloc|bad_?\s?alloc", re.I)

T = TypeVar("T")


async def embed_in_pieces(
    texts: Sequence[str],
    model: ModelSpec,
    *,
    tokenizer: WordPiece,
    threads: Executor,
    pieces: Callable[[Sequence[int]], Iterable[Sequence[int]]],
    run: Callable[[Sequence[str], Sequence[Sequence[int]]], NDArray[np.float32]],
) -> ProviderAnswer:
    """`pieces` makes of the texts' lengths in tokens the indices that are run at once; `run` gives vectors (n, d).

    Billed tokens are those of the texts, special ones included. InputRejected for a text over the model's limit:
    nothing was run then.
    """
    loop = asyncio.get_running_loop()
    tokens = await loop.run_in_executor(threads, _tokenized, tokenizer, texts, model.max_input_tokens)
    places = list(pieces([len(each) for each in tokens]))

    def run_piece(piece: Sequence[int]) -> NDArray[np.float32]:
        failed: ProviderError
        try:
            return run([texts[index] for index in piece], [tokens[index] for index in piece])
        except Exception as error:  # noqa: BLE001  (the runtimes' classes share no base)
            failed = failure(error, len(texts))
        raise failed

    done = await _together([loop.run_in_executor(threads, run_piece, piece) for piece in places])
    vectors = {
        index: vector
        for piece, found in zip(places, done, strict=True)
        for index, vector in zip(piece, found, strict=True)
    }
    indices = range(len(texts))
    return ProviderAnswer([vectors[index] for index in indices], indices, model.name, sum(map(len, tokens)))


async def _together(pieces: Sequence[asyncio.Future[T]]) -> list[T]:
    """What the pieces of a call come to. Of a call that failed or was cancelled, none is begun any more."""
    try:
        return await asyncio.gather(*pieces)
    finally:
        for piece in pieces:
            piece.cancel()


def _tokenized(tokenizer: WordPiece, texts: Sequence[str], limit: int) -> list[Sequence[int]]:
    """The tokens of each text. InputRejected when one has more than `limit`: nothing is cut, nothing was run then."""
    tokens = [tokenizer.ids(text) for text in texts]
    if max(map(len, tokens), default=0) > limit:
        # With a status, so that the attempt's receipt says: answered, nothing billed.
        raise InputRejected("text_too_long", http_status=400)
    return tokens


def failure(error: Exception, texts: int) -> ProviderError:
    """The error of ours for a runtime's, in a call of so many texts: of one alone, no smaller call could pass.

    Their messages may quote input.
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return (CallTooLarge if texts > 1 else ProviderTransient)("out_of_memory", http_status=507)
    return ProviderTransient(f"inference_{type(error).__name__.lower()}")
