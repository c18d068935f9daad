"""`cache warm`, `stats` and `purge` with real processes: what is found afterwards, and that the bill still adds up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from processor.adapters.redis_cache import L1_PURGED_WITHIN_S
from processor.adapters.redis_quota import RedisQuota
from processor.cli.cache import count, purge, read_stats, stats_fields, stats_sentences
from processor.cli.console import exit_code
from processor.cli.warm import warm_from_files
from processor.domain import CacheLevel, ReceivedResult, Request, Usage
from processor.errors import ProcessorError
from processor.identity import request_id
from processor.ports import QuotaAsk
from processor.settings import Settings, load
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.builders import a_request
from tests.support.provider_server import expected_vector
from tests.support.redis_server import own_redis
from tests.support.stack import ROOT, until
from tests.support.traffic import hard_requests
from tests.support.world import DIMENSIONS, MODEL, PATIENT, Begin, World, beginner

CHUNKS = 5
CANARY = "canary-90b2"


@pytest.fixture
def begin(kafka: Broker, unique: str, tmp_path: Path) -> Begin:
    """Starts provider, cache, topics and aggregator; see `tests.support.world`."""
    return partial(beginner(kafka, unique, tmp_path), **PATIENT)


async def cli(environment: dict[str, str], *arguments: str, answer: str = "") -> tuple[int, str, str]:
    """Exit code, output and errors of a command; no text is in them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "processor", "cache", *arguments),
        env=os.environ | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(answer.encode()), 300)
    assert process.returncode is not None
    assert CANARY not in (out + err).decode()
    return process.returncode, out.decode(), err.decode()


async def said(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What a command says in JSON."""
    code, out, err = await cli(environment, *arguments, "--json")
    assert code == 0, err
    spoken: dict[str, Any] = json.loads(out)
    return spoken


def a_file(folder: Path, texts: Sequence[str], *, tenant_id: str = "acme", tokens: int = 7) -> Path:
    """Vectors as the tests' provider would give them."""
    path = folder / f"{tenant_id}.jsonl"
    lines = (
        {"tenant": tenant_id, "model": MODEL, "dimensions": DIMENSIONS, "text": text, "tokens": tokens}
        | {"vector": expected_vector(text, DIMENSIONS).tolist()}
        for text in texts
    )
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


async def carried(world: World, requests: Sequence[Request]) -> None:
    await world.traffic.send(requests)
    await until(world.traffic.all_committed, within_s=300, what="every request is committed")


def charges_of(books: audit.Books) -> dict[str, Usage]:
    """By request id."""
    return {charge.usage.request_id: charge.usage for charge in books.charges()}


async def test_a_cache_that_was_lost_is_warm_again_and_nobody_pays_twice(begin: Begin) -> None:
    """U3, U6, U7: after a warming from the results nothing is embedded again, and the charges are right."""
    requests = [request for request in hard_requests(150, chunks=CHUNKS) if request.use_cache]
    newcomers = [replace(request, correlation_id=f"new-{i}") for i, request in enumerate(requests)]
    async with begin("--base-ms", "5") as world:
        first = await world.a_worker()
        await carried(world, requests)
        assert first.stop() == 0, first.tail()
        async with Redis.from_url(world.cache_url) as redis:
            await redis.flushall()
        warmed = await said(world.stack.environment, "warm", "--from-results")
        again = await said(world.stack.environment, "warm", "--from-results")
        calls = len(world.provider.admin("ledger")["requests"])
        await world.a_worker()
        await carried(world, [*requests, *newcomers])
        books, residuals, _ = await world.finish_and_audit()
    distinct = {(request.tenant_id, chunk.text) for request in requests for chunk in request.chunks}
    assert (warmed["stored"], warmed["skipped"]) == (len(distinct), {})
    assert (again["stored"], again["known"]) == (0, len(distinct))
    assert len(books.bills) == calls, "something was embedded again"
    assert residuals.total == 0
    charges = charges_of(books)
    copies = [(usage, charges[usage.request_id]) for _, usage in books.usage]
    same = [(copy.billed.tokens, copy.parts) == (charge.billed.tokens, charge.parts) for copy, charge in copies]
    assert sum(same) > len(copies) * 0.8, "replays did not find their own entries"
    assert all(
        equal or copy.billed.tokens <= charge.billed.tokens for equal, (copy, charge) in zip(same, copies, strict=True)
    )
    fresh = [usage for usage in charges.values() if usage.request.correlation_id.startswith("new-")]
    assert len(fresh) == len({request_id(request) for request in newcomers})
    assert all(usage.billed.tokens == 0 and usage.saved.texts == CHUNKS for usage in fresh)


async def test_vectors_from_a_file_are_saved_to_whoever_asks_and_billed_to_nobody(begin: Begin, tmp_path: Path) -> None:
    """U3: no attempt stands behind them, so no charge may name one; what is not in the file is paid for as ever."""
    texts = [f"{CANARY} sentence number {i}" for i in range(40)]
    requests = [
        a_request(texts[i : i + CHUNKS], correlation_id=f"c{i}", document_id=f"d{i}") for i in range(0, 40, CHUNKS)
    ]
    async with begin("--base-ms", "5") as world:
        warmed = await said(world.stack.environment, "warm", str(a_file(tmp_path, texts[:35])))
        await world.a_worker()
        await carried(world, [*requests, *requests])
        books, residuals, _ = await world.finish_and_audit()
    assert (warmed["stored"], warmed["known"]) == (35, 0)
    assert residuals.total == 0
    (paid,) = [usage for usage in charges_of(books).values() if usage.parts]
    assert (paid.billed.texts, paid.saved.texts) == (CHUNKS, 0)
    assert {usage.saved.tokens for usage in charges_of(books).values()} == {0, 7 * CHUNKS}


async def test_a_purge_reaches_the_memory_of_running_workers(begin: Begin) -> None:
    """Within the time that the command states, a text of the tenant is embedded anew; another tenant's is not."""
    asks = 0
    async with begin("--base-ms", "5") as world:
        await world.a_worker()

        async def levels() -> dict[str, str]:
            """Where the answer of each tenant's next request came from."""
            nonlocal asks
            asks += 1
            name = f"ask-{asks}"
            await carried(world, [a_request(["hello"], tenant_id=tenant, correlation_id=name) for tenant in ("a", "b")])
            settings = world.stack.settings()
            results = [result async for _, result in audit.read_topic(settings, "results", ReceivedResult)]
            return {result.tenant_id: result.cache for result in results if result.correlation_id == name}

        assert await levels() == {"a": CacheLevel.MISS, "b": CacheLevel.MISS}
        assert await levels() == {"a": CacheLevel.L1, "b": CacheLevel.L1}
        purged = await said(world.stack.environment, "purge", "--tenant", "a", "--yes")

        async def gone() -> bool:
            found = await levels()
            assert found["b"] == CacheLevel.L1
            return found["a"] == CacheLevel.MISS

        await until(gone, within_s=L1_PURGED_WITHIN_S + 5, what="the worker has let go of the tenant", every_s=1)
        await world.finish_and_audit()
    assert purged["entries"] == 1


@pytest.fixture
def environment(redis_url: str, unique: str) -> dict[str, str]:
    """A cache of this test alone within the run's Redis: its secret is its own."""
    return {"EMBEDDING_REDIS_URL": redis_url, "EMBEDDING_CACHE_SECRET": unique}


@pytest.fixture
def settings(redis_url: str, unique: str) -> Settings:
    """The same for what is called here."""
    return load(_env_file=None, redis_url=redis_url, cache_secret=unique)


async def test_stats_count_what_was_warmed(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    """Entries of the tenant alone, with size and life; for people the same in sentences."""
    await warm_from_files(settings, [a_file(tmp_path, [f"{CANARY} {i}" for i in range(300)])], None)
    await warm_from_files(settings, [a_file(tmp_path, ["other"], tenant_id="beta")], None)
    stats = await said(environment, "stats", "--tenant", "acme")
    assert (stats["entries"], stats["former_entries"]) == (300, 0)
    assert 4 * DIMENSIONS < stats["entry_bytes"] < 4 * DIMENSIONS + 400
    assert 0 < stats["ttl_s"][0] <= stats["ttl_s"][2] <= settings.cache_ttl_s
    assert stats["used_memory_bytes"] > 0
    assert (await read_stats(settings, None))[0].entries >= 301
    assert next(stats_sentences(await read_stats(settings, "acme"))).startswith("300 entries of about ")


async def test_only_one_tenant_is_warmed_when_one_is_named(settings: Settings, tmp_path: Path) -> None:
    """The other lines of the file are left alone."""
    both = [a_file(tmp_path, ["one", "two"]), a_file(tmp_path, ["one"], tenant_id="beta")]
    assert (await warm_from_files(settings, both, "beta")).stored == 1
    assert [await count(settings, tenant) for tenant in ("acme", "beta")] == [0, 1]


async def test_a_purge_erases_one_tenant_under_both_secrets(settings: Settings, tmp_path: Path) -> None:
    """What was stored before and after the secret was changed is gone, of this tenant alone."""
    former = settings.cache_secret.get_secret_value()
    changed = load(_env_file=None, redis_url=settings.redis_url, cache_secret=f"{former}-2", cache_secret_former=former)
    await warm_from_files(
        settings, [a_file(tmp_path, ["one", "two"]), a_file(tmp_path, ["one"], tenant_id="beta")], None
    )
    warmed = await warm_from_files(changed, [a_file(tmp_path, ["one", "two", "three"])], None)
    assert (warmed.known, warmed.stored) == (2, 1), "what lies under the former secret is there already"
    assert stats_fields(await read_stats(changed, "acme"))["former_entries"] == 2
    assert (await purge(changed, "acme")).entries == 5  # both old ones, the same where they were found, the third
    assert [await count(changed, tenant) for tenant in ("acme", "beta")] == [0, 1]


async def test_a_purge_asks_first(settings: Settings, environment: dict[str, str], tmp_path: Path) -> None:
    """It says how many there are; without a yes nothing is erased and it ends with 1."""
    await warm_from_files(settings, [a_file(tmp_path, ["one", "two"])], None)
    code, _, err = await cli(environment, "purge", "--tenant", "acme", answer="n\n")
    assert code == 1
    assert "Erase 2 entries of acme?" in err
    code, out, _ = await cli(environment, "purge", "--tenant", "acme", answer="y\n")
    assert (code, "erased 2 entries" in out) == (0, True)
    assert "EMBEDDING_CACHE_SECRET?" in (await purge(settings, "acme")).sentence(), (
        "there is a hint when none was there"
    )


async def test_the_user_of_the_docs_may_do_all_that_is_needed(unique: str, tmp_path: Path) -> None:
    """The ACL of docs/cache.md is enough for look-ups, stores, repairs, the commands and the quota; not for a flush."""
    docs = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    rule = re.search(r"ACL SETUSER embedding on >PASSWORD (.*)", docs)
    assert rule is not None
    server, url = own_redis()
    with server:
        admin: Any
        async with Redis.from_url(url) as admin:
            await admin.execute_command("ACL", "SETUSER", "embedding", "on", ">secret", *rule.group(1).split())
        mine = load(
            _env_file=None, redis_url=url, redis_username="embedding", redis_password="secret", cache_secret=unique
        )
        assert (await warm_from_files(mine, [a_file(tmp_path, ["one", "two"])], None)).stored == 2
        async with Redis.from_url(url) as admin:
            key = await anext(admin.scan_iter(_type="string"))
            await admin.set(key, b"broken")
        assert (await warm_from_files(mine, [a_file(tmp_path, ["one", "two"])], None)).stored == 1
        assert (await read_stats(mine, "acme"))[0].entries == 2
        assert (await purge(mine, "acme")).entries == 2
        quota = RedisQuota.from_settings(mine, pace=1.0)
        await quota.lease("account", QuotaAsk(1, 60, None), QuotaAsk(1, 60, None), 0)
        await quota.close()
        async with Redis.from_url(url, username="embedding", password="secret") as user:
            with pytest.raises(NoPermissionError):
                await user.flushall()
            with pytest.raises(NoPermissionError):
                await user.get("another's")


async def test_what_can_not_be_done_says_why(settings: Settings, tmp_path: Path) -> None:
    """A shared cache has no tenants to erase; no Redis, or none named; a line with a fault: exit code and fix."""
    shared = load(_env_file=None, redis_url=settings.redis_url, cache_scope="shared")
    gone = load(_env_file=None, redis_url="redis://127.0.0.1:1/0")
    unnamed = load(_env_file=None, redis_url=None)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"tenant": "acme"}\n', encoding="utf-8")
    for code, attempt, told in (
        (1, purge(shared, "acme"), "EMBEDDING_CACHE_SCOPE=shared"),
        (1, read_stats(shared, "acme"), "EMBEDDING_CACHE_SCOPE=shared"),
        (1, purge(settings, ""), "--tenant: must name a tenant"),
        (1, purge(settings, "\udcff"), "--tenant: must name a tenant, in UTF-8"),
        (3, purge(gone, "acme"), "redis: ConnectionError"),
        (3, read_stats(gone, None), "redis: ConnectionError"),
        (1, read_stats(unnamed, None), "EMBEDDING_REDIS_URL: is missing"),
        (1, warm_from_files(settings, [broken], None), "broken.jsonl:1: model: Field required"),
    ):
        with pytest.raises(ProcessorError, match=told) as raised:
            await attempt
        assert exit_code(raised.value) == code
