"""Cache keys, and steps 3 and 6: look vectors up before paying, keep what was paid for.

A key is made of keyed BLAKE2b hashes of tenant, embedding function and exact text: nobody without the secret can tell
from Redis whose text was embedded, or which, and no tenant finds another's vectors unless the scope is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Self

from processor.domain import EmbeddingFunction, Item
from processor.identity import encode_int, encode_text
from processor.ports import FUNCTION_TAG_BYTES, SCOPE_TAG_BYTES, VectorCache
from processor.work import Fold, Policy

TEXT_HASH_BYTES = 20


class CacheKeys:
    """The keys of texts: SCOPE_TAG_BYTES of the tenant, FUNCTION_TAG_BYTES of the function, TEXT_HASH_BYTES of all.

    By the tag a tenant's entries are found and erased. With `shared` no tenant goes into any of it. With a `former`
    secret, entries made under that one can still be found.
    """

    def __init__(self, secret: bytes, former: bytes | None = None, *, shared: bool = False) -> None:
        self._present = _hash_key(secret)
        self._former = None if former is None or former == secret else _hash_key(former)
        self._shared = shared

    @classmethod
    def of(cls, policy: Policy) -> Self:
        return cls(policy.cache_secret, policy.cache_secret_former, shared=policy.cache_shared)

    @property
    def rotating(self) -> bool:
        """Whether there is a former secret."""
        return self._former is not None

    def present(self, tenant_id: str, function: EmbeddingFunction, text: str, own: Item | None) -> bytes:
        """The key of a text's entry. `own` is the item of a `use_cache=false` chunk, which has one to itself (U2)."""
        return _key(self._present, None if self._shared else tenant_id, function.name, text, own)

    def former(self, tenant_id: str, function: EmbeddingFunction, text: str, own: Item | None) -> bytes:
        """The key of the same text under the former secret; only while `rotating`."""
        assert self._former is not None
        return _key(self._former, None if self._shared else tenant_id, function.name, text, own)

    def tags(self, tenant_id: str) -> list[bytes]:
        """What the keys of a tenant begin with, under the present and the former secret; of everybody if shared."""
        tenant = None if self._shared else tenant_id
        return [_scope_tag(secret, tenant) for secret in (self._present, self._former) if secret is not None]


def _hash_key(secret: bytes) -> bytes:
    """A secret of any length as a BLAKE2b key (at most 64 bytes)."""
    return blake2b(secret, digest_size=64, person=b"embedding-cache").digest()


def _key(secret: bytes, tenant_id: str | None, function: str, text: str, own: Item | None) -> bytes:
    tags, scope = _scope(secret, tenant_id, function)
    raw = text.encode()
    parts = b"%b%d:%b" % (scope, len(raw), raw)
    if own is not None:
        parts += encode_text(own.request_id) + encode_int(own.index)
    return tags + blake2b(parts, key=secret, digest_size=TEXT_HASH_BYTES).digest()


@lru_cache(maxsize=4096)
def _scope(secret: bytes, tenant_id: str | None, function: str) -> tuple[bytes, bytes]:
    """What a key begins with, and what is hashed before the text."""
    name = encode_text(function)
    of_function = blake2b(name, key=secret, digest_size=FUNCTION_TAG_BYTES, person=b"function").digest()
    return _scope_tag(secret, tenant_id) + of_function, encode_text(tenant_id) + name


def _scope_tag(secret: bytes, tenant_id: str | None) -> bytes:
    return blake2b(encode_text(tenant_id), key=secret, digest_size=SCOPE_TAG_BYTES, person=b"tenant").digest()


async def look_up(folds: Sequence[Fold], cache: VectorCache, keys: CacheKeys) -> list[Fold]:
    """Step 3: fill in the entries that are known; returns the misses. A cache that is gone is gone without."""
    if not folds:
        return []
    former = {fold.key: _former(fold, keys) for fold in folds} if keys.rotating else {}
    found = await cache.get_many([fold.key for fold in folds], folds[0].function.dimensions, former)
    misses = []
    for fold in folds:
        hit = found.get(fold.key)
        if hit is None:
            misses.append(fold)
        else:
            fold.entry, fold.level = hit
    return misses


def _former(fold: Fold, keys: CacheKeys) -> bytes:
    work = fold.works[0]
    request = work.job.request
    return keys.former(request.tenant_id, fold.function, fold.text, None if request.use_cache else work.item)


async def remember(paid: Sequence[Fold], cache: VectorCache) -> None:
    """Step 6: keep vector, tokens, leader item and attempt, so that a replay finds the vector and its payer."""
    await cache.put_many({fold.key: fold.entry for fold in paid if fold.entry is not None})
