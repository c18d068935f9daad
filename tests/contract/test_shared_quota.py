"""What every SharedQuota promises: the one in Redis, and the one of the tests."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis

from processor.adapters.embedded import EmbeddedCache
from processor.adapters.redis_client import RedisAccess
from processor.adapters.redis_quota import KEPT_S, RedisQuota
from processor.errors import QuotaUnavailable, SettingsError
from processor.ports import QuotaAsk, QuotaGrant, SharedQuota
from tests.support.quota import MemoryQuota
from tests.support.steps import VirtualClock
from tests.support.timers import ENDS_WITHIN_S, settled, skip

EVERYTHING = 1e9
NOTHING = QuotaAsk(0, None, None)
BUDGET_S = 60.0


@dataclass
class Case:
    quota: SharedQuota
    pass_s: Callable[[float], Awaitable[None]]
    """Lets so much time pass for account "a"."""
    monotonic: Callable[[], float]
    """Of the quota's clock, or of one that goes with it."""

    async def tokens(
        self,
        wanted: float = EVERYTHING,
        per_minute: float | None = 60_000,
        heard_s: float | None = None,
        *,
        wait_s: float = 0.0,
        account: str = "a",
    ) -> QuotaGrant:
        return (await self.quota.lease(account, NOTHING, QuotaAsk(wanted, per_minute, heard_s), wait_s))[1]


@pytest.fixture(params=["memory", "redis"])
async def case(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[Case]:
    if request.param == "memory":
        clock = VirtualClock()

        async def move(seconds: float) -> None:
            clock.now_s += seconds

        yield Case(MemoryQuota(clock), move, lambda: 0.0)
        return
    url: str = request.getfixturevalue("redis_url")
    quota = RedisQuota(RedisAccess(url), timeout_s=30, pace=1.0, prefix=unique)
    client = Redis.from_url(url)

    async def age(seconds: float) -> None:
        """The server's clock can't be moved, so what it has noted is."""
        for name in ("at", "wait_until", "requests_heard", "tokens_heard"):
            if float(await client.hget(f"{unique}a", name) or 0) > 0:
                await client.hincrbyfloat(f"{unique}a", name, -seconds)

    yield Case(quota, age, time.monotonic)
    await client.aclose()
    await quota.close()


async def test_it_begins_empty_and_fills_at_the_rate(case: Case) -> None:
    """No burst at the start, then what flows in and no more: the clock of a real server goes on meanwhile."""
    began = case.monotonic()
    assert (await case.tokens()).granted == 0
    await case.pass_s(0.3)
    granted = (await case.tokens()).granted
    more = 1000 * (case.monotonic() - began)
    assert 300 - 1e-3 <= granted <= 300 + more + 1
    again = (await case.tokens()).granted
    assert 0 <= again <= 1000 * (case.monotonic() - began) + 1


async def test_it_holds_half_a_second_s_worth(case: Case) -> None:
    """An hour without anybody is no reason for a burst."""
    await case.tokens()
    await case.pass_s(3600)
    assert (await case.tokens()).granted == pytest.approx(500)


async def test_no_more_is_granted_than_wanted(case: Case) -> None:
    """What one worker leaves another one gets."""
    await case.tokens()
    await case.pass_s(60)
    assert (await case.tokens(300)).granted == pytest.approx(300)
    assert (await case.tokens(0)).granted == 0
    assert (await case.tokens()).granted >= 199


async def test_a_rate_below_one_a_second_gathers_to_one(case: Case) -> None:
    """Three requests a minute are one every twenty seconds."""
    ask = QuotaAsk(5, 3, None)
    await case.quota.lease("a", ask, NOTHING, 0)
    await case.pass_s(21)
    requests, _ = await case.quota.lease("a", ask, NOTHING, 0)
    assert requests.granted == pytest.approx(1)


async def test_an_unknown_limit_grants_nothing_and_stays_unknown(case: Case) -> None:
    """Nobody said a rate, so there is none to share."""
    await case.tokens(per_minute=None)
    await case.pass_s(60)
    assert await case.tokens(per_minute=None) == QuotaGrant(0, None, None)


async def test_accounts_are_apart(case: Case) -> None:
    """What one account has used is not missing from another."""
    await case.tokens()
    await case.tokens(account="b", per_minute=6_000)
    await case.pass_s(60)
    assert (await case.tokens()).granted == pytest.approx(500)
    assert (await case.tokens(account="b", per_minute=6_000)).per_minute == 6_000


async def test_the_newest_header_stands_whoever_heard_it(case: Case) -> None:
    """A limit heard later replaces one heard before, and neither gives way to a configured one."""
    assert (await case.tokens(per_minute=60_000)).heard_s is None
    heard = case.monotonic() - 50
    assert (await case.tokens(per_minute=20_000, heard_s=50)).per_minute == 20_000
    assert (await case.tokens(per_minute=60_000, heard_s=90)).per_minute == 20_000
    told = await case.tokens(per_minute=60_000)
    assert told.per_minute == 20_000
    assert told.heard_s is not None
    assert 50 - 1e-3 <= told.heard_s <= case.monotonic() - heard + 1e-3
    assert (await case.tokens(per_minute=90_000, heard_s=1)).per_minute == 90_000


async def test_a_wait_that_one_was_asked_for_is_kept_by_all(case: Case) -> None:
    """Nobody gets anything until the provider's wait is over, and a shorter wait does not end a longer one."""
    await case.tokens()
    await case.pass_s(60)
    assert (await case.tokens(wait_s=300)).granted == 0
    await case.pass_s(150)
    assert (await case.tokens(wait_s=1)).granted == 0
    await case.pass_s(100)
    assert (await case.tokens()).granted == 0
    await case.pass_s(51)
    assert (await case.tokens()).granted == pytest.approx(500)


# --- Redis alone


async def test_what_nobody_uses_is_forgotten(redis_url: str, unique: str) -> None:
    """A key has a life of its own, so accounts that are gone leave nothing behind."""
    quota = RedisQuota(RedisAccess(redis_url), timeout_s=30, pace=1.0, prefix=unique)
    await quota.lease("a", NOTHING, QuotaAsk(EVERYTHING, 60_000, None), 0.0)
    client = Redis.from_url(redis_url)
    assert 0 < await client.ttl(f"{unique}a") <= KEPT_S
    await client.aclose()
    await quota.close()


async def test_many_at_once_never_get_more_than_flows_in(redis_url: str, unique: str) -> None:
    """Slices are cut one after the other: forty workers that ask at the same moment share what is there."""
    quotas = [RedisQuota(RedisAccess(redis_url), timeout_s=30, pace=1.0, prefix=unique) for _ in range(40)]
    loop = asyncio.get_running_loop()
    started = loop.time()
    ask = QuotaAsk(50, 60_000, None)
    granted = 0.0
    for _ in range(5):
        for _, tokens in await asyncio.gather(*(quota.lease("a", NOTHING, ask, 0) for quota in quotas)):
            granted += tokens.granted
    assert granted <= 1000 * (loop.time() - started) + 1
    assert granted > 0
    for quota in quotas:
        await quota.close()


async def test_a_clock_that_is_set_back_holds_nobody_up(redis_url: str, unique: str) -> None:
    """A wait of some minutes does not become one of an hour, and a newer limit is not taken for an older one."""
    quota = RedisQuota(RedisAccess(redis_url), timeout_s=30, pace=1.0, prefix=unique)
    async with Redis.from_url(redis_url) as client:

        async def pass_s(seconds: float) -> None:
            for name in ("at", "wait_until", "tokens_heard"):
                await client.hincrbyfloat(f"{unique}a", name, -seconds)

        case = Case(quota, pass_s, time.monotonic)
        await case.tokens(per_minute=60_000, heard_s=0, wait_s=300)
        await case.pass_s(-3600)
        assert (await case.tokens()).granted == 0
        assert (await case.tokens(per_minute=6_000, heard_s=0)).per_minute == 6_000
        await case.pass_s(301)
        assert (await case.tokens()).granted == pytest.approx(50)
    await quota.close()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_redis_that_does_not_answer_is_said_to_be_unavailable(unique: str, stop: signal.Signals) -> None:
    """Dead or hanging, it costs its time budget and no more, and works again when it is back."""
    server = EmbeddedCache()
    server.start()
    quota = RedisQuota(RedisAccess(server.url), timeout_s=BUDGET_S, pace=1.0, prefix=unique)

    async def lease() -> QuotaGrant:
        return (await quota.lease("a", NOTHING, QuotaAsk(EVERYTHING, 60_000, None), 0.0))[1]

    await lease()
    assert server._process is not None
    server._process.send_signal(stop)
    leased = asyncio.create_task(lease())
    await settled()
    skip(BUDGET_S)
    with pytest.raises(QuotaUnavailable, match="redis: "):
        await asyncio.wait_for(leased, ENDS_WITHIN_S)
    if stop is signal.SIGKILL:
        server.kill()
        server.start()
    else:
        server._process.send_signal(signal.SIGCONT)
    for _ in range(5):  # a connection that is found dead is one refusal
        try:
            assert (await lease()).per_minute == 60_000
            break
        except QuotaUnavailable:
            continue
    else:
        raise AssertionError("it did not come back")
    await quota.close()
    server.stop()


def test_a_url_that_is_none_is_refused() -> None:
    """The setting is named."""
    with pytest.raises(SettingsError, match="EMBEDDING_REDIS_URL"):
        RedisQuota(RedisAccess("localhost:6379"), timeout_s=1, pace=1.0)


@pytest.mark.parametrize(
    "field,value",
    [("tokens_per_minute", "nan"), ("tokens_per_minute", "-5"), ("tokens_per_minute", "inf")],
)
async def test_nonsense_in_redis_is_no_quota(field: str, value: str, redis_url: str, unique: str) -> None:
    """Taken for numbers it would keep the gates of all workers shut, or open them wide."""
    quota = RedisQuota(RedisAccess(redis_url), timeout_s=30, pace=1.0, prefix=unique)
    async with Redis.from_url(redis_url) as client:
        await client.hset(f"{unique}a", mapping={"at": "1", "tokens_per_minute": "600", field: value})
    with pytest.raises(QuotaUnavailable):
        await quota.lease("a", NOTHING, QuotaAsk(100, None, None), 0.0)
    await quota.close()
