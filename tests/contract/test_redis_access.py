"""How Redis is reached: a Cluster, TLS and users; and how entries are found by whose they are, and erased."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from redis import Redis
from redis.asyncio.cluster import ClusterNode

from processor.adapters import redis_cache
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.purge_watch import AGAIN_S, EVERY_S, PurgeWatch
from processor.adapters.redis_cache import L1_PURGED_WITHIN_S, RedisCache
from processor.adapters.redis_client import NODE_SHARE, RedisAccess
from processor.adapters.redis_quota import RedisQuota
from processor.cli.cache import purge, tags_of
from processor.domain import Entry, Item, TokenSource
from processor.errors import CacheUnavailable, QuotaUnavailable, SettingsError
from processor.ports import Found, QuotaAsk
from processor.settings import load
from tests.support.redis_server import SlowProxy, own_redis
from tests.support.redis_variants import Cluster, Guarded, guarded_server, own_cluster
from tests.support.stack import until
from tests.support.steps import VirtualClock
from tests.support.timers import ENDS_WITHIN_S, settled, skip

D = 4
TTL_S = 600
LONGEST_TRIP_S = 3
BUDGET_S = 60.0
"""Of a trip to Redis."""

WORKER_RIGHTS = (
    "~embedding:* +ping +mget +set +get +unlink +eval +evalsha +script|load +zrange +hmget +hset +expire +time +pttl"
)
COMMAND_LINE_RIGHTS = WORKER_RIGHTS + " +scan +info +ttl +memory|usage +zadd +zremrangebyscore"


def entries(tag: bytes, count: int) -> dict[bytes, Entry]:
    """So many whose keys begin with the tag."""
    vector = np.ones(D, np.float32)
    return {
        tag + b"%024d" % number: Entry(vector, number, Item(f"r{number}", 0), "a", TokenSource.PROVIDER)
        for number in range(count)
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes, for this file."""
    with own_cluster() as nodes:
        yield nodes


@pytest.fixture(params=["single", "cluster"])
def access(request: pytest.FixtureRequest) -> RedisAccess:
    """One server, and several."""
    if request.param == "single":
        return RedisAccess(request.getfixturevalue("redis_url"))
    return RedisAccess(request.getfixturevalue("cluster").url, cluster=True)


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is on its way in these tests."""
    monkeypatch.setattr(redis_cache, "PURGE_GRACE_S", 0.0)


# --- whose entries


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize("tag", [b"tenant-1", b"*?[]^-\\{", b"\x00\xff\r\n*\n\\*"])
async def test_a_purge_erases_a_tenants_entries_and_nobody_elses(access: RedisAccess, tag: bytes, unique: str) -> None:
    """On all nodes, whatever bytes the tag is made of; and it says when, for the memory of workers."""
    cache = RedisCache(access, timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode() + b"*:")
    others = entries(b"tenant-2", 300)
    await cache.put_many(entries(tag, 300) | others)
    assert await cache.purge(tag) == 300
    assert (await cache.stats(tag)).entries == 0
    assert set(await cache.get_many(list(others), D)) == set(others)
    assert set(await cache.purged()) == {tag}
    assert await cache.purge(tag) == 0
    await cache.close()


@pytest.mark.usefixtures("no_grace")
async def test_a_purge_leaves_nothing_that_a_change_of_secrets_brings_back(
    redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks a text up while its tenant is purged keeps no entry of the former secret under the present one."""
    loaded = load(_env_file=None, redis_url=redis_url, cache_secret="new", cache_secret_former="old")
    settings = loaded.model_copy(update={"redis_timeout_ms": int(BUDGET_S * 1000)})
    new, old = (tag + b"%024d" % 1 for tag in tags_of(settings, unique))
    worker = RedisCache.from_settings(settings)
    await worker.put_many({old: Entry(np.ones(D, np.float32), 1, Item("r", 0), "a", TokenSource.PROVIDER)})
    erase = RedisCache.purge

    async def looked_up_after(self: RedisCache, tag: bytes) -> int:
        erased = await erase(self, tag)
        await worker.get_many([new], D, {new: old})
        return erased

    monkeypatch.setattr(RedisCache, "purge", looked_up_after)
    assert (await purge(settings, unique)).entries == 1
    assert await worker.get_many([new], D, {new: old}) == {}
    await worker.close()


@pytest.mark.usefixtures("no_grace")
async def test_what_is_stored_while_a_tenant_is_purged_is_found_by_the_second_look(
    redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan passes over what comes after it began."""
    cache = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    await cache.put_many(entries(b"tenant-1", 3))
    erase = RedisCache._erase

    async def stored_meanwhile(self: RedisCache, tag: bytes) -> int:
        erased = await erase(self, tag)
        if erased == 3:
            await cache.put_many(entries(tag, 5))
        return erased

    monkeypatch.setattr(RedisCache, "_erase", stored_meanwhile)
    assert await cache.purge(b"tenant-1") == 8
    assert (await cache.stats(b"tenant-1")).entries == 0
    await cache.close()


@pytest.mark.usefixtures("no_grace")
async def test_a_purge_is_noted_for_as_long_as_entries_live(redis_url: str, unique: str) -> None:
    """Not longer: what it erased has expired from every memory by then."""
    cache = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    name = f"{unique}purges"
    with Redis.from_url(redis_url) as client:
        client.zadd(name, {"long-ago": time.time() - TTL_S - 5, "lately": time.time() - TTL_S + 60})
        await cache.purge(b"tenant-1")
        assert set(await cache.purged()) == {b"lately", b"tenant-1"}
        assert TTL_S - 60 < cast("int", client.ttl(name)) <= TTL_S
    await cache.close()


@pytest.mark.usefixtures("no_grace")
async def test_a_purge_reaches_the_memory_of_a_running_worker(redis_url: str, unique: str) -> None:
    """Within the time that is promised, what was on its way from Redis to it included; others keep theirs."""
    clock = VirtualClock()
    l1 = MemoryCache(max_bytes=1_000_000, ttl_s=TTL_S, monotonic=clock.monotonic)
    cache = RedisCache(RedisAccess(redis_url), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    watch = PurgeWatch(cache, l1, clock)
    mine, others = entries(b"tenant-1", 50), entries(b"tenant-2", 50)
    await l1.put_many(mine | others)
    await watch.look()
    assert len(l1) == 100

    await cache.purge(b"tenant-1")
    await watch.look()
    assert len(l1) == 50
    await l1.put_many(mine)  # read from Redis before the purge, kept after it was heard of
    clock.now_s += EVERY_S
    await watch.look()
    assert len(l1) == 50
    clock.now_s += AGAIN_S
    await watch.look()
    await l1.put_many(mine)
    await watch.look()
    assert len(l1) == 100, "what is embedded anew is kept"

    await cache.purge(b"tenant-1")
    await watch.look()
    assert len(l1) == 50, "a second purge is another one"
    with pytest.raises(SettingsError, match="EMBEDDING_REDIS_TIMEOUT_MS"):
        load(_env_file=None, redis_timeout_ms=LONGEST_TRIP_S * 1000 + 1)
    assert LONGEST_TRIP_S < AGAIN_S
    assert 2 * (EVERY_S + LONGEST_TRIP_S) + AGAIN_S <= L1_PURGED_WITHIN_S
    await cache.close()


async def test_a_purge_is_heard_of_once_redis_is_back(unique: str) -> None:
    """A watch whose Redis is away does no harm and ends nothing."""
    cache = RedisCache(RedisAccess("redis://127.0.0.1:1/0"), timeout_s=1, ttl_s=TTL_S, prefix=unique.encode())
    l1 = MemoryCache(max_bytes=1_000_000, ttl_s=TTL_S)
    await l1.put_many(entries(b"tenant-1", 5))
    await PurgeWatch(cache, l1, VirtualClock()).look()
    assert len(l1) == 5
    await cache.close()


@pytest.mark.usefixtures("no_grace")
async def test_stats_tell_entries_and_sizes_over_all_nodes(access: RedisAccess, unique: str) -> None:
    """Counted by scanning, sized by a sample; the note of purges is no entry."""
    cache = RedisCache(access, timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    await cache.purge(b"tenant-0")
    assert ((await cache.stats()).entries, (await cache.stats()).entry_bytes) == (0, None)
    await cache.put_many(entries(b"tenant-1", 700) | entries(b"tenant-2", 20))
    stats, of_one = await cache.stats(), await cache.stats(b"tenant-2")
    await cache.close()
    assert (stats.entries, of_one.entries) == (720, 20)
    assert stats.entry_bytes is not None
    assert 100 < stats.entry_bytes < 400
    assert stats.nodes == (3 if access.cluster else 1)
    assert stats.server.split()[0] in {"redis", "valkey"}
    assert stats.used_memory_bytes > 720 * 100


async def test_a_primary_that_became_a_replica_is_left(unique: str) -> None:
    """Whoever moves its address to another server need not restart the workers: they connect anew, and write there."""
    (one, first), (other, second) = own_redis(), own_redis()
    with one, other, SlowProxy(first) as address:
        access = RedisAccess(address.url)
        cache = RedisCache(access, timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
        quota, ask = RedisQuota(access, timeout_s=BUDGET_S, pace=1.0, prefix=unique), QuotaAsk(1, 60, None)
        await cache.put_many(entries(b"before", 1))
        await quota.lease("a", ask, ask, 0.0)
        with Redis.from_url(first) as admin:
            admin.execute_command("REPLICAOF", "127.0.0.1", "1")  # of nobody: a copy would leave a file here
        address.lead_to(second)
        await cache.put_many(entries(b"after", 1))
        with pytest.raises(QuotaUnavailable, match="ReadOnlyError"):
            await quota.lease("a", ask, ask, 0.0)  # what a first try may have granted would be lost with a second
        await quota.lease("a", ask, ask, 0.0)
        assert set(await cache.get_many(list(entries(b"after", 1)), D)) == set(entries(b"after", 1))
        await cache.close()
        await quota.close()


# --- a Cluster


async def test_a_look_up_in_a_cluster_is_one_trip_to_each_node(
    cluster: Cluster, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slots the keys of a window lie in, each node is asked once, and all at the same time."""
    running = most = trips = 0
    execute = ClusterNode.execute_pipeline

    async def counted(self: ClusterNode, commands: list[object]) -> bool:
        nonlocal running, most, trips
        trips += 1
        running += 1
        most = max(most, running)
        try:
            return await execute(self, commands)  # type: ignore[arg-type]
        finally:
            running -= 1

    cache = RedisCache(RedisAccess(cluster.url, cluster=True), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    stored = entries(b"tenant-1", 512)
    await cache.put_many(stored)
    monkeypatch.setattr(ClusterNode, "execute_pipeline", counted)
    assert set(await cache.get_many(list(stored), D)) == set(stored)
    await cache.close()
    assert (trips, most) == (3, 3)


async def test_a_cluster_that_is_taken_for_one_server_says_so(cluster: Cluster, redis_url: str) -> None:
    """And one server that is taken for a Cluster: health and doctor would say ok, while every look-up is refused."""
    for url, in_cluster in [*((url, False) for url in cluster.urls), (redis_url, True)]:
        cache = RedisCache(RedisAccess(url, cluster=in_cluster), timeout_s=BUDGET_S, ttl_s=TTL_S)
        assert "EMBEDDING_REDIS_CLUSTER" in await cache.ping()
        with pytest.raises(CacheUnavailable, match="EMBEDDING_REDIS_CLUSTER"):
            await cache.get_many([b"a", b"b", b"c"], D)
        await cache.close()


async def test_a_frozen_node_costs_the_budget_and_mixes_up_no_answers(cluster: Cluster, unique: str) -> None:
    """The look-up is gone without; late answers are not taken for those of the next one."""
    cache = RedisCache(RedisAccess(cluster.url, cluster=True), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    first, second = entries(b"tenant-1", 100), entries(b"tenant-2", 100)
    await cache.put_many(first | second)
    loop = asyncio.get_running_loop()
    os.kill(cluster.nodes[1].pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            looked_up = asyncio.create_task(cache.get_many(list(first), D))
            for share in (NODE_SHARE, 1 - NODE_SHARE):  # then the others are asked who has its slots
                await settled()
                skip(share * BUDGET_S)
            with pytest.raises(CacheUnavailable):
                await asyncio.wait_for(looked_up, ENDS_WITHIN_S)
    finally:
        os.kill(cluster.nodes[1].pid, signal.SIGCONT)
    deadline = loop.time() + 60
    while True:
        try:
            found = await cache.get_many(list(second), D)
            break
        except CacheUnavailable:
            assert loop.time() < deadline, "never found again"
    await cache.close()
    assert {key: hit.entry.tokens for key, hit in found.items()} == {key: each.tokens for key, each in second.items()}


async def test_a_trip_whose_connections_another_closes_ends_no_worker(cluster: Cluster, unique: str) -> None:
    """Who finds a node of a Cluster gone closes the connections of all others, whatever they are about to send."""
    cache = RedisCache(RedisAccess(cluster.url, cluster=True), timeout_s=BUDGET_S, ttl_s=TTL_S, prefix=unique.encode())
    client: Any = cache._redis
    ended = list[object]()
    for turns in range(15):
        await client.initialize()
        trips = [asyncio.create_task(cache.get_many([b"%d" % number for number in range(64)], D)) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.aclose()
        if (await asyncio.wait(trips, timeout=1))[1]:
            skip(BUDGET_S)
        ended += await asyncio.gather(*trips, return_exceptions=True)
    await cache.close()
    assert {type(each) for each in ended} <= {dict, CacheUnavailable}


async def test_a_lost_node_is_waited_for_only_until_its_slots_have_another(unique: str) -> None:
    """A node that falls silent, and whose slots are then another's, is asked no more: nobody restarts a worker."""
    with own_cluster() as nodes, ExitStack() as stack:
        patient, cache = (
            RedisCache(RedisAccess(nodes.url, cluster=True), timeout_s=each, ttl_s=TTL_S, prefix=unique.encode())
            for each in (BUDGET_S, 1)
        )
        stored = entries(b"tenant-1", 100)
        await patient.put_many(stored)
        await patient.close()
        lost, *left = (stack.enter_context(Redis.from_url(nodes.urls[number])) for number in (1, 0, 2))
        port = lost.connection_pool.connection_kwargs["port"]
        slots: Any = left[0].execute_command("CLUSTER SLOTS")
        ((begin, end),) = ((first, last) for first, last, (_, owner, *_) in slots if owner == port)
        os.kill(nodes.nodes[1].pid, signal.SIGSTOP)
        stack.callback(os.kill, nodes.nodes[1].pid, signal.SIGCONT)
        with pytest.raises(CacheUnavailable):
            await cache.get_many(list(stored), D)
        for each in left:
            each.execute_command("CLUSTER DELSLOTSRANGE", begin, end)
        left[0].execute_command("CLUSTER ADDSLOTSRANGE", begin, end)
        found, deadline = dict[bytes, Found](), asyncio.get_running_loop().time() + 60
        while not found:
            assert asyncio.get_running_loop().time() < deadline, "never found again"
            with suppress(CacheUnavailable):
                found = dict(await cache.get_many(list(stored), D))
        await cache.close()
        assert 0 < len(found) < 100, "what the lost node had is lost"


async def test_a_quota_is_shared_in_a_cluster(cluster: Cluster, unique: str) -> None:
    """Its script touches one key, so one slot."""
    quota = RedisQuota(RedisAccess(cluster.url, cluster=True), timeout_s=BUDGET_S, pace=1.0, prefix=unique)
    grants = [await quota.lease("a", QuotaAsk(1, 60_000, None), QuotaAsk(0, None, None), 0.0) for _ in range(2)]
    await quota.close()
    assert [requests.per_minute for requests, _ in grants] == [60_000, 60_000]


# --- TLS and users


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Its user may do what a worker and the command line do, and nothing else."""
    try:
        server = guarded_server(tmp_path_factory.mktemp("tls"), COMMAND_LINE_RIGHTS)
        with server as ready:
            yield ready
    except LookupError as error:
        pytest.skip(f"NOT RUN: TLS and users of Redis: {error}")


def settings_of(guarded: Guarded, **overrides: object) -> RedisAccess:
    """As an operator names them."""
    names = {
        "redis_url": guarded.url,
        "redis_username": "worker",
        "redis_password": guarded.password,
        "redis_ca_file": guarded.ca_file,
        "redis_cert_file": guarded.cert_file,
        "redis_key_file": guarded.key_file,
    }
    return RedisAccess.from_settings(load(**(names | overrides), _env_file=None))


@pytest.mark.usefixtures("no_grace")
async def test_tls_and_a_user_with_few_rights_are_enough(guarded: Guarded, tmp_path: Path) -> None:
    """Everything that workers and commands do works with the rights that the docs list."""
    (tmp_path / "password").write_text(f"{guarded.password}\n")
    access = settings_of(guarded, redis_password=None, redis_password_file=tmp_path / "password")
    cache = RedisCache(access, timeout_s=BUDGET_S, ttl_s=TTL_S)
    stored = entries(b"tenant-1", 10)
    await cache.put_many(stored)
    assert set(await cache.get_many(list(stored), D)) == set(stored)
    former = {b"x" + key: key for key in stored}
    assert set(await cache.get_many(list(former), D, former)) == set(former)
    assert await cache.purge(b"xtenant-") == 10
    assert await cache.get_many(list(stored), D + 1) == {}  # of no use to anybody: deleted
    await cache.put_many(stored)
    assert (await cache.stats()).entries == await cache.purge(b"tenant-1") == 10
    assert set(await cache.purged()) == {b"tenant-1", b"xtenant-"}
    assert await cache.ping() == "ok"
    await cache.close()
    quota = RedisQuota(access, timeout_s=BUDGET_S, pace=1.0)
    await quota.lease("a", QuotaAsk(1, 60, None), QuotaAsk(1, 60, None), 0.0)
    await quota.close()


def open_sockets() -> int:
    """Of this process."""
    return sum(
        os.path.realpath(link).rpartition("/")[2].startswith("socket:") for link in Path("/proc/self/fd").iterdir()
    )


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"redis_password": "canary-77"}, "EMBEDDING_REDIS_PASSWORD"),
        ({"redis_username": "nobody"}, "EMBEDDING_REDIS_USERNAME"),
        ({"redis_ca_file": None}, "EMBEDDING_REDIS_CA_FILE"),
        ({"redis_cert_file": None, "redis_key_file": None}, "certificates|EMBEDDING_REDIS_CERT_FILE"),
    ],
)
async def test_what_redis_refuses_names_the_setting(
    guarded: Guarded, wrong: dict[str, object], named: str, cluster: bool
) -> None:
    """Health says which variable to look at, and quotes no secret."""
    open_before = open_sockets()
    cache = RedisCache(settings_of(guarded, **wrong, redis_cluster=cluster), timeout_s=BUDGET_S, ttl_s=TTL_S)
    said = await cache.ping()
    with pytest.raises(CacheUnavailable, match=named) as refused:
        await cache.get_many([b"k"], D)
    await cache.close()
    what = "the client does not wait for TLS to end"
    await until(lambda: open_sockets() <= open_before, within_s=30, what=what, every_s=0.01)
    assert re.search(named, said)
    assert "canary" not in f"{said}{refused.value!r}"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"redis_ca_file": Path("no-such-file")}, "EMBEDDING_REDIS_CA_FILE: can't read it"),
        ({"redis_key_file": Path("no-such-file")}, "EMBEDDING_REDIS_KEY_FILE: can't read it"),
        ({"redis_ca_file": Path(__file__)}, "EMBEDDING_REDIS_CA_FILE: must be a PEM file"),
        ({"redis_cert_file": Path(__file__)}, "EMBEDDING_REDIS_CERT_FILE: must be a PEM file"),
        ({"redis_cert_file": None}, "EMBEDDING_REDIS_CERT_FILE: is missing"),
        ({"redis_url": "redis://localhost:6379"}, "EMBEDDING_REDIS_CA_FILE, .*: for rediss:// alone"),
        (
            {"redis_url": "localhost:6379", "redis_ca_file": None, "redis_cert_file": None, "redis_key_file": None},
            "EMBEDDING_REDIS_URL: must be",
        ),
        ({"redis_url": "rediss://localhost/3", "redis_cluster": True}, "EMBEDDING_REDIS_URL: of a cluster"),
        ({"redis_url": None}, "EMBEDDING_REDIS_URL: is missing"),
        ({"redis_password": None, "redis_password_file": Path("no-such-file")}, "EMBEDDING_REDIS_PASSWORD_FILE"),
    ],
)
def test_what_can_be_told_at_start_is_told_at_start(guarded: Guarded, wrong: dict[str, object], named: str) -> None:
    """A file or an address that can't be used is a fault of the settings, by name."""
    with pytest.raises(SettingsError, match=named):
        settings_of(guarded, **wrong).open(timeout_s=1, retries=0)
