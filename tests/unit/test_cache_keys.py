"""Whose vectors a text may be answered with: keys, scopes, and a secret that changes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.cache import TEXT_HASH_BYTES, CacheKeys
from processor.domain import CacheLevel, Item, Truncate
from processor.identity import encode_int, encode_text
from processor.ports import SCOPE_TAG_BYTES
from tests.support.builders import a_request
from tests.support.folds import TINY, a_function
from tests.support.steps import Bench, MemoryCache

OTHER = a_function(truncate=Truncate.END)


@given(
    st.sets(
        st.tuples(
            st.sampled_from(["a", "b", "ab"]),
            st.sampled_from([TINY, OTHER]),
            st.sampled_from(["", "1", "t", "1:t", "ü"]),
            st.sampled_from([None, Item("r", 1), Item("r1", 1), Item("r", 11)]),
            st.sampled_from([b"one", b"two"]),
        ),
        min_size=2,
        max_size=20,
    )
)
def test_each_part_of_a_key_makes_another_key(cases: set[tuple[str, object, str, Item | None, bytes]]) -> None:
    """Secret, tenant, function, text and own item: no two differ in any of them and share a key."""
    keys = {CacheKeys(secret).present(tenant, function, text, own) for tenant, function, text, own, secret in cases}  # type: ignore[arg-type]
    assert len(keys) == len({key[-TEXT_HASH_BYTES:] for key in keys}) == len(cases)


def test_no_text_is_taken_for_another_ones_own_entry() -> None:
    """A text that ends as the name of an item is hashed: its length stands before it."""
    keys, own = CacheKeys(b"s", shared=True), Item("r", 1)
    forged = "t" + (encode_text(own.request_id) + encode_int(own.index)).decode()
    assert keys.present("mallory", TINY, forged, None) != keys.present("acme", TINY, "t", own)


def test_a_key_begins_with_the_tag_of_its_tenant_and_names_nobody() -> None:
    """All of a tenant's keys under one secret, whatever the text and function, and no other tenant's."""
    keys = CacheKeys(b"new", b"old")
    new, old = keys.tags("acme")
    for function, text, own in itertools.product((TINY, OTHER), ("x", "y"), (None, Item("r", 0))):
        assert keys.present("acme", function, text, own)[:SCOPE_TAG_BYTES] == new
        assert keys.former("acme", function, text, own)[:SCOPE_TAG_BYTES] == old
        assert keys.present("other", function, text, own)[:SCOPE_TAG_BYTES] != new
        assert b"acme" not in keys.present("acme", function, text, own)
    assert CacheKeys(b"new").tags("acme") == [new] == CacheKeys(b"old", b"new").tags("acme")[1:]


def test_a_shared_scope_takes_no_tenant_into_a_key() -> None:
    """Equal texts of all tenants have one key, with one tag; own entries stay apart by their items."""
    keys = CacheKeys(b"s", shared=True)
    assert keys.present("a", TINY, "x", None) == keys.present("b", TINY, "x", None)
    assert keys.tags("a") == keys.tags("b")
    assert keys.present("a", TINY, "x", Item("r", 0)) != keys.present("b", TINY, "x", Item("s", 0))
    assert keys.present("a", TINY, "x", None) != CacheKeys(b"s").present("a", TINY, "x", None)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_shared_text_is_billed_to_the_first_and_saved_by_the_others(shared: bool) -> None:
    """U2 over tenants: one call, whose bill the first item's tenant pays alone; by default each pays for its own."""
    async with Bench(cache_shared=shared) as bench:
        sent = await bench.handle(
            a_request(["one two", "a b c"], tenant_id="zeta"), a_request(["a b c", "one two", "d"], tenant_id="acme")
        )
        charges = {usage.payer_id: (usage.billed.tokens, usage.saved.tokens) for usage in sent.usage}
        assert charges == ({"zeta": (5, 0), "acme": (1, 5)} if shared else {"zeta": (5, 0), "acme": (6, 0)})
        billed = sum(tokens for usage in sent.usage for _, tokens in usage.parts)
        assert billed == sum(bench.provider.bills.values()) == (6 if shared else 11)
        assert all(result.vector is not None for result in sent.results)


async def test_use_cache_false_stays_alone_in_a_shared_scope() -> None:
    """U2: an item that refuses the cache neither joins another tenant's text nor lends its own."""
    async with Bench(cache_shared=True) as bench:
        sent = await bench.handle(
            a_request(["x"], tenant_id="a", use_cache=False), a_request(["x"], tenant_id="b", use_cache=False)
        )
        assert [usage.billed.tokens for usage in sent.usage] == [1, 1]


@pytest.mark.parametrize("use_cache", [True, False])
async def test_a_new_secret_changes_no_payer(use_cache: bool) -> None:
    """U3 over a rotation: the item that paid is billed that share again from that attempt, others are saved it."""
    cache = MemoryCache()
    async with Bench(cache=cache, cache_secret=b"old") as bench:
        first = (await bench.handle(a_request(["one two"], use_cache=use_cache))).usage[0]
    async with Bench(cache=cache, cache_secret=b"new", cache_secret_former=b"old") as bench:
        again = (await bench.handle(a_request(["one two"], use_cache=use_cache))).usage[0]
        later = (await bench.handle(a_request(["one two"], correlation_id="c2", use_cache=use_cache))).usage[-1]
        assert len(bench.provider.asked) == (0 if use_cache else 1)
    assert (again.parts, again.billed.tokens) == (first.parts, 2)
    assert (later.billed.tokens, later.saved.tokens) == ((0, 2) if use_cache else (2, 0))


async def test_what_was_found_once_needs_the_former_secret_no_more() -> None:
    """It is kept under the present key from then on; what nobody asked for meanwhile is lost with the old secret."""
    cache = MemoryCache()
    async with Bench(cache=cache, cache_secret=b"old") as bench:
        await bench.handle(a_request(["one", "two"]))
    async with Bench(cache=cache, cache_secret=b"new", cache_secret_former=b"old") as bench:
        await bench.handle(a_request(["one"], correlation_id="c2"))
    async with Bench(cache=cache, cache_secret=b"new") as bench:
        sent = await bench.handle(a_request(["one", "two"], correlation_id="c3"))
        assert [result.cache for result in sent.results] == [CacheLevel.L2, CacheLevel.MISS]


def test_a_former_secret_that_is_the_present_one_is_none() -> None:
    """Whoever has named one secret twice still finds everything, and purges once."""
    keys = CacheKeys(b"same", b"same")
    assert (keys.rotating, len(keys.tags("acme"))) == (False, 1)
