"""What the provider server answers: a vector of its own for every text, and the bill.

All of it follows from the text, so whoever asks can check each vector.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from processor.adapters.tokens import tokenizer_of

_NOISE: NDArray[np.float32] = np.random.default_rng(20_240_125).standard_normal(1 << 20, dtype=np.float32)


def expected_vector(text: str, dimensions: int) -> NDArray[np.float32]:
    """The vector that belongs to a text: float32 of shape (dimensions,), length 1, before jitter.

    The difference of two stretches of a fixed normal sequence, chosen by the text's hash: 7 times faster than
    a generator seeded per text; two texts share a vector with probability 2^-39.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    room = _NOISE.size - dimensions
    one, other = int.from_bytes(digest[:8]) % room, int.from_bytes(digest[8:]) % room
    vector = _NOISE[one : one + dimensions] - _NOISE[other : other + dimensions]
    length = float(np.sqrt(vector @ vector))
    return vector / np.float32(length) if length else _NOISE[:dimensions]


def count_tokens(text: str, tokens: str = "cl100k") -> int:
    """What the server bills for a text."""
    tokenizer = tokenizer_of("cl100k_base") if tokens == "cl100k" else None
    return tokenizer.count(text) if tokenizer else max(1, -(-len(text.encode()) // 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, spoilt by `fault`. `billed_tokens` None: it does not say."""

    fault: str
    model: str
    dimensions: int
    as_base64: bool
    billed_tokens: int | None
    jitter: float
    noise: np.random.Generator = field(default_factory=np.random.default_rng)

    def parts(self, texts: Sequence[str], dice: random.Random) -> Iterator[bytes]:
        """The body, a part a text."""
        indices, last, model = list(range(len(texts))), len(texts) - 1, self.model
        match self.fault:
            case "wrong_count":
                indices = indices[:-1]
            case "shuffled":
                dice.shuffle(indices)
            case "wrong_model":
                model = "another-model"
        yield b'{"object":"list","data":['
        if self.fault == "broken_json":
            yield b"{"
            return
        for place, index in enumerate(indices):
            vector = self._spoilt(texts[index]) if index == last else self._vector(texts[index])
            if self.as_base64 and self.fault != "ignores_base64":
                written = b'"%b"' % binascii.b2a_base64(vector.data, newline=False)
            else:
                written = json.dumps(vector.astype(float).tolist()).encode()
            if self.fault == "duplicate_index" and place == last:
                index = 0 if last else 1
            comma = b"," if place else b""
            yield b'%b{"object":"embedding","index":%d,"embedding":%b}' % (comma, index, written)
        yield b'],"model":%b' % json.dumps(model).encode()
        if self.fault != "no_usage" and self.billed_tokens is not None:
            yield b',"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (self.billed_tokens, self.billed_tokens)
        yield b"}"

    def _vector(self, text: str) -> NDArray[np.float32]:
        vector = expected_vector(text, self.dimensions)
        if not self.jitter:
            return vector
        noise = self.noise.standard_normal(self.dimensions, dtype=np.float32)
        vector = vector + noise * np.float32(self.jitter / np.sqrt(noise @ noise))
        vector /= np.sqrt(vector @ vector)
        return vector

    def _spoilt(self, text: str) -> NDArray[np.float32]:
        match self.fault:
            case "nan":
                vector = self._vector(text).copy()
                vector[0] = np.nan
                return vector
            case "zero_vector":
                return np.zeros(self.dimensions, np.float32)
            case "wrong_dimension":
                return expected_vector(text, max(1, self.dimensions - 1))
        return self._vector(text)
