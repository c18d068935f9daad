"""Cache keys, and steps 3 and 6: look vectors up before paying, keep what was paid for.

A key is a keyed BLAKE2b of tenant, embedding function and exact text, length-prefixed: nobody without the secret can
tell from Redis what was embedded, and no tenant finds another's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from processor.domain import EmbeddingFunction, Item
from processor.identity import encode_int, encode_text
from processor.ports import VectorCache
from processor.work import Fold

KEY_BYTES = 20


def hash_key(secret: bytes) -> bytes:
    """A secret of any length as a BLAKE2b key (at most 64 bytes)."""
    return blake2b(secret, digest_size=64, person=b"embedding-cache").digest()


def cache_key(key: bytes, tenant_id: str, function: EmbeddingFunction, text: str, own: Item | None) -> bytes:
    """The key of a text's entry. `own` is the item of a `use_cache=false` chunk, which has an entry to itself (U2)."""
    raw = text.encode()
    parts = b"%b%d:%b" % (_scope(tenant_id, function.name), len(raw), raw)
    if own is not None:
        parts += encode_text(own.request_id) + encode_int(own.index)
    return blake2b(parts, key=key, digest_size=KEY_BYTES).digest()


@lru_cache(maxsize=4096)
def _scope(tenant_id: str, function: str) -> bytes:
    return encode_text(tenant_id) + encode_text(function)


async def look_up(folds: Sequence[Fold], cache: VectorCache) -> list[Fold]:
    """Step 3: fill in the entries that are known; returns the misses. A cache that is gone is gone without."""
    if not folds:
        return []
    found = await cache.get_many([fold.key for fold in folds], folds[0].function.dimensions)
    misses = []
    for fold in folds:
        hit = found.get(fold.key)
        if hit is None:
            misses.append(fold)
        else:
            fold.entry, fold.level = hit
    return misses


async def remember(paid: Sequence[Fold], cache: VectorCache) -> None:
    """Step 6: keep vector, tokens, leader item and attempt, so that a replay finds the vector and its payer."""
    await cache.put_many({fold.key: fold.entry for fold in paid if fold.entry is not None})
