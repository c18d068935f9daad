"""What a warmed cache entry is made of, and who can ever be charged for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from processor.adapters.avro import Codec
from processor.adapters.catalogue import load_catalogue
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.tokens import LocalTokenCounter
from processor.aggregate import DAY_MS
from processor.app import worker_policy
from processor.cache import CacheKeys
from processor.cli.warm import NOBODY, REASONS, Join, Offered, Warmer, entries_of_files, safe_after_ms
from processor.decode import Checker
from processor.domain import CacheLevel, Entry, Item, Part, ReceivedResult, ReplyTo, Request, Status, TokenSource, Usage
from processor.errors import RequestRefused
from processor.identity import request_id
from processor.ports import Destination
from processor.settings import load
from processor.work import Plan
from tests.support.builders import NOW_MS, a_request, a_result, a_usage, a_vector

SAFE_AFTER_MS = NOW_MS - 1000
SETTINGS = load(_env_file=None, cache_secret="tests")
KEYS = CacheKeys.of(worker_policy(SETTINGS, {}))
CHECKER = Checker(worker_policy(SETTINGS, {}), load_catalogue(SETTINGS))
CANARY = "canary-31aa"


def asked(texts: list[str] | None = None, **overrides: Any) -> Request:
    return a_request(texts, **({"dimensions": 8} | overrides))


def key(text: str, tenant_id: str = "acme") -> bytes:
    plan = CHECKER.check(asked([text]), 0)
    assert isinstance(plan, Plan)
    assert plan.function is not None
    return KEYS.present(tenant_id, plan.function, text, None)


def join(request: Request, charge: Usage | None = None, append_ms: int = NOW_MS, **options: Any) -> Join:
    """One that knows this request, and its charge."""
    made = Join(KEYS, **({"tenant_id": None, "safe_after_ms": SAFE_AFTER_MS} | options))
    made.take_request(request, 0, CHECKER)
    if charge is not None:
        made.take_charge(charge, append_ms)
    return made


async def received(request: Request, index: int = 0, **overrides: Any) -> ReceivedResult:
    """The result as it is read from the topic."""
    _, value, _ = Codec().encode(Destination("results", a_result(request, index, **overrides)))
    read = await Codec().read(ReceivedResult, value)
    assert isinstance(read, ReceivedResult)
    return read


async def test_an_entry_of_a_billed_result_names_leader_and_attempt() -> None:
    """U3: the same item found again is the leader, so its copy of the charge is that of the first one."""
    request = asked(["one", "two"], first_chunk_index=5)
    offered = join(request, a_usage(request)).entry_of(await received(request, 1, token_count=7))
    assert isinstance(offered, Offered)
    assert offered.key == key("two")
    assert (offered.entry.leader, offered.entry.attempt_id) == (Item(request_id(request), 6), "attempt-1")
    assert (offered.entry.tokens, offered.entry.token_source) == (7, TokenSource.PROVIDER)
    assert np.array_equal(offered.entry.vector, a_vector(8, seed=1))
    assert offered.paid


async def test_an_entry_whose_payer_is_not_certain_is_nobodys() -> None:
    """Two attempts, a charge so old that its copy would be another one, somebody else's vector: saved to all."""
    request = asked(["one"])
    two = a_usage(request, parts=(Part("a", 1), Part("b", 2)))
    result = await received(request)
    for made, found in (
        (join(request, two), result),
        (join(request, a_usage(request), SAFE_AFTER_MS), result),
        (join(request, a_usage(request)), await received(request, cache=CacheLevel.L2)),
        (join(request, a_usage(request)), await received(request, cache=CacheLevel.COALESCED)),
    ):
        offered = made.entry_of(found)
        assert isinstance(offered, Offered)
        assert (offered.entry.leader, offered.entry.attempt_id) == (NOBODY, "")


def test_a_charge_is_near_enough_while_copies_of_it_are_duplicates() -> None:
    """The last copy of it, an entry's two lives, a horizon until who found it is charged: two horizons in all."""
    settings = load(_env_file=None, cache_ttl_s=3 * 86_400, horizon_days=10)
    last_charged_ms = NOW_MS + 2 * 3 * DAY_MS + 10 * DAY_MS
    assert last_charged_ms - safe_after_ms(settings, NOW_MS) == 2 * 10 * DAY_MS


async def test_a_later_copy_renews_a_charge_and_does_not_change_it() -> None:
    """U5: the first copy names the attempt, the last one says until when copies are duplicates."""
    request = asked(["one"])
    made = join(request, a_usage(request), SAFE_AFTER_MS - 1)
    made.take_charge(a_usage(request, parts=(Part("rework", 3),)), NOW_MS)
    offered = made.entry_of(await received(request))
    assert isinstance(offered, Offered)
    assert offered.entry.attempt_id == "attempt-1"


async def test_what_can_not_be_trusted_is_left_out_and_says_why() -> None:
    """No text, another space, an entry of one's own, no charge yet, an unknown cut: none of them is stored."""
    request, own = asked(["one"]), asked(["one"], use_cache=False)
    charged = join(request, a_usage(request))
    cases = {
        "no_request": (charged, await received(asked(["other"]))),
        "other_function": (charged, await received(request, vector_space="text-embedding-3-small@2/8/l2")),
        "own": (join(own, a_usage(own)), await received(own)),
        "not_charged": (join(request), await received(request)),
        "cut": (charged, await received(request, cut_tokens=9)),
    }
    assert {reason: made.entry_of(result) for reason, (made, result) in cases.items()} == {name: name for name in cases}
    assert cases.keys() == REASONS.keys()
    said = asked(["one"], truncate="truncate_end")
    assert isinstance(join(said, a_usage(said)).entry_of(await received(said, cut_tokens=9)), Offered)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 0.0])
async def test_a_result_without_a_finite_vector_is_no_entry(spoilt: float) -> None:
    """Law 6: whoever wrote it to the topic, it is not put where a worker takes it for one that was paid for."""
    request = asked(["one"])
    vector = np.full(8, 0.0, np.float32)
    vector[3] = spoilt
    result = replace(await received(request), vector=vector)
    assert join(request, a_usage(request)).entry_of(result) == "other_function"


async def test_other_tenants_and_errors_are_nobodys_business() -> None:
    """They are no entries, and are not counted as skipped."""
    request = asked(["one"])
    result = await received(request)
    assert join(request, a_usage(request), tenant_id="acme").entry_of(result) is not None
    assert join(request, a_usage(request), tenant_id="beta").entry_of(result) is None
    failed = await received(request, status=Status.ERROR, vector=None)
    assert join(request, a_usage(request)).entry_of(failed) is None


async def test_words_and_ids_of_others_do_no_harm() -> None:
    """A usage event of another service is passed over; a token source that is not known yet counts as an estimate."""
    request = asked(["one"])
    made = join(request, a_usage(request))
    made.take_charge(replace(a_usage(request), request_id="an invoice of another service"), NOW_MS)
    offered = made.entry_of(replace(await received(request), token_source="oracle"))
    assert isinstance(offered, Offered)
    assert offered.entry.token_source is TokenSource.ESTIMATE
    theirs = join(request, replace(a_usage(request), event_key="theirs"))
    assert theirs.entry_of(await received(request)) == "not_charged"


async def test_a_reply_topic_that_is_gone_does_not_matter() -> None:
    """What was asked for is looked at, not where the answer went."""
    request = asked(["one"], reply_to=ReplyTo("gone", 99))
    assert isinstance(join(request, a_usage(request)).entry_of(await received(request)), Offered)


def an_entry(seed: int) -> Entry:
    return Entry(a_vector(8, seed), seed, Item("r", seed), "a", TokenSource.PROVIDER)


async def test_what_is_in_the_cache_stands() -> None:
    """U3: warming stores where there is nothing, and of two entries for a text the first."""
    cache = MemoryCache(max_bytes=1_000_000, ttl_s=60)
    await cache.put_many({b"there": an_entry(1)})
    warmer = Warmer(cache)
    for name, seed in ((b"there", 2), (b"new", 3), (b"new", 4)):
        await warmer.offer(name, None, an_entry(seed))
    await warmer.flush()
    found = await cache.get_many([b"there", b"new"], 8)
    assert {name: hit.entry.tokens for name, hit in found.items()} == {b"there": 1, b"new": 3}
    assert (warmer.warmed.stored, warmer.warmed.known) == (1, 1)


def a_line(**overrides: Any) -> dict[str, Any]:
    line = {"tenant": "acme", "model": "text-embedding-3-small", "dimensions": 8, "text": f"{CANARY} text"}
    return line | {"vector": a_vector(8).tolist()} | overrides


def a_file(folder: Path, *lines: object) -> Path:
    path = folder / "vectors.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def entries(path: Path) -> list[tuple[Entry, bytes]]:
    return [
        (entry, KEYS.present(line.tenant, function, line.text, None))
        for line, function, entry in entries_of_files([path], CHECKER, LocalTokenCounter())
    ]


def test_a_line_becomes_an_entry_that_nobody_pays_for(tmp_path: Path) -> None:
    """It lies where the request for this text looks; its tokens are the file's, else they are counted."""
    path = a_file(tmp_path, a_line(tokens=77), a_line(tenant="beta"), a_line(input_type="query"))
    (first, at), (second, other), (_, query) = entries(path)
    assert (at, other) == (key(f"{CANARY} text"), key(f"{CANARY} text", "beta"))
    assert query not in {at, other}
    assert (first.tokens, first.token_source, first.leader) == (77, TokenSource.PROVIDER, NOBODY)
    assert (second.token_source, second.leader) == (TokenSource.TOKENIZER, NOBODY)
    assert 0 < second.tokens < 20
    assert np.array_equal(first.vector, a_vector(8))


@pytest.mark.parametrize(
    "line, told",
    [
        ([], "line: Input should be an object"),
        (a_line(vektor=1), "vektor: Extra inputs are not permitted"),
        (a_line(tenant=""), "tenant: String should have at least 1 character"),
        (a_line(model="nobody-knows"), "model: not in the catalogue"),
        (a_line(dimensions=9999), "dimensions: text-embedding-3-small has 1 to 1536"),
        (a_line(input_type="song"), "input_type: must be one of"),
        (a_line(text=" "), "text: is blank"),
        (a_line(text=f"{CANARY} " * 8192), "chunks.text: .* tokens, the model takes 8192"),
        (a_line(vector=[1.0]), "vector: must be 8 finite numbers, not all 0, of length 1"),
        (a_line(vector=[0.0] * 8), "vector: must be 8 finite numbers"),
        (a_line(vector=[2.0] * 8), "vector: must be 8 finite numbers"),
        (a_line(vector=[1e39] * 8), "vector: must be 8 finite numbers"),
        (a_line(vector=["a"] * 8), "vector.0: Input should be a valid number"),
        (a_line(tokens=0), "tokens: Input should be greater than"),
        (a_line(tokens=2**31), "tokens: Input should be less than"),
    ],
)
def test_a_line_that_is_none_is_named_and_not_quoted(tmp_path: Path, line: object, told: str) -> None:
    """File, line, field and fix; no text, no vector."""
    path = a_file(tmp_path, a_line(), line)
    with pytest.raises(RequestRefused, match=f"vectors.jsonl:2: {told}") as refused:
        entries(path)
    assert CANARY not in str(refused.value)


def test_no_item_can_be_the_leader_of_what_nobody_pays_for() -> None:
    """The id of a request is a UUID, and this is none."""
    with pytest.raises(ValueError, match="UUID"):
        UUID(NOBODY.request_id)
    assert str(UUID(request_id(asked(["one"])))) == request_id(asked(["one"]))
