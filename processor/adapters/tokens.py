"""TokenCounter: what a text will cost, counted by the model's own tokenizer where it is at hand.

Special tokens ("<|endoftext|>", "[SEP]") in a text are ordinary text. Without a tokenizer a count is an
estimate: max(1, ceil(UTF-8 bytes / 4)).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from processor.domain import ModelSpec, TokenSource
from processor.ports import TokenCounts

BPE = frozenset({"cl100k_base", "o200k_base"})
WORDPIECE = "wordpiece:"
"""Followed by the path of a tokenizer.json."""

_ESTIMATED_BYTES_PER_TOKEN = 4


class LocalTokenCounter:
    """Counts by `model.tokenizer`. About 20 ns a byte (cl100k) and 0.3 us a byte (word pieces) of CPU."""

    def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
        tokenizer = tokenizer_of(model.tokenizer)
        if tokenizer is None:
            return TokenCounts([estimate(text) for text in texts], TokenSource.ESTIMATE)
        return TokenCounts([tokenizer.count(text) for text in texts], TokenSource.TOKENIZER)

    def truncate(self, text: str, model: ModelSpec, limit: int, *, keep_end: bool) -> str:
        tokenizer = tokenizer_of(model.tokenizer)
        if tokenizer is None:
            kept = limit * _ESTIMATED_BYTES_PER_TOKEN
            raw = text.encode()
            return (raw[-kept:] if keep_end else raw[:kept]).decode(errors="ignore") if kept else ""
        if tokenizer.count(text) <= limit:
            return text
        length = tokenizer.length_of(text, limit, keep_end=keep_end)
        # A cut text is tokenized anew and may come out longer by a token: step back until it fits.
        while length > 0:
            cut = text[-length:] if keep_end else text[:length]
            if tokenizer.count(cut) <= limit:
                return cut
            length -= 1
        return ""


def estimate(text: str) -> int:
    """At least 1, so that a split by estimates gives every text a share."""
    return max(1, -(-len(text.encode()) // _ESTIMATED_BYTES_PER_TOKEN))


class Tokenizer(Protocol):
    """Of one model."""

    def count(self, text: str) -> int:
        """Tokens that the model processes and the provider bills, special ones that it adds included."""
        ...

    def length_of(self, text: str, limit: int, *, keep_end: bool) -> int:
        """Characters of the first (or last) `limit` tokens of a text that has more."""
        ...


@functools.cache
def tokenizer_of(name: str | None) -> Tokenizer | None:
    """The tokenizer that a ModelSpec names; None when it names none or the extra is not installed."""
    if name in BPE:
        return _bpe(name)
    if name is not None and name.startswith(WORDPIECE) and importlib.util.find_spec("tokenizers"):
        return WordPiece(Path(name.removeprefix(WORDPIECE)))
    return None


class _BytePairs:
    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def count(self, text: str) -> int:
        counted: int = self._binding.count(text)
        return counted

    def length_of(self, text: str, limit: int, *, keep_end: bool) -> int:
        ids = self._binding.encode(text)
        kept = ids[-limit:] if keep_end and limit else ids[:limit]
        while kept:
            try:
                return len(self._binding.decode(kept))
            except ValueError:  # the cut goes through a character
                kept = kept[1:] if keep_end else kept[:-1]
        return 0


def _bpe(name: str) -> Tokenizer | None:
    spec = importlib.util.find_spec("bpe_openai")
    if spec is None or spec.origin is None:
        return None
    # The binding alone: the package around it costs 0.5 s and 68 MB, and refuses special tokens in a text.
    file = next(Path(spec.origin).parent.glob("_bindings*.so"), None)
    if file is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader("bpe_openai._bindings", str(file))
    module_spec = importlib.util.spec_from_file_location("bpe_openai._bindings", file, loader=loader)
    assert module_spec is not None
    module: Any = importlib.util.module_from_spec(module_spec)
    loader.exec_module(module)
    return _BytePairs(module.tokenizer_for_encoding(name))


class WordPiece:
    """A tokenizer.json of Hugging Face. Counter and bill of the local model are both this class."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFace

        self._tokenizer = HuggingFace.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._added = len(self._tokenizer.encode("").ids)

    def ids(self, text: str) -> Sequence[int]:
        """Token ids with the special ones that frame a text."""
        ids: Sequence[int] = self._tokenizer.encode(text).ids
        return ids

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def length_of(self, text: str, limit: int, *, keep_end: bool) -> int:
        kept = limit - self._added
        if kept <= 0:
            return 0
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return len(text) - offsets[-kept][0] if keep_end else int(offsets[kept - 1][1])
