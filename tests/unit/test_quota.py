"""Gates supplied from a shared quota, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from processor.app import open_gate
from processor.errors import ProviderThrottled, RateLimits
from processor.limits import Gate, LimitPolicy
from processor.quota import PAUSE_S, QuotaShare
from processor.settings import load
from tests.support.quota import MemoryQuota
from tests.support.steps import VirtualClock

TOKENS_PER_MINUTE = 600_000
CALL_TOKENS = 5_000
CALL_S = 0.5
DICE = random.Random(7)


class Worker:
    """One of `sharers` workers: a gate, its part in the quota, and calls as soon as the gate lets them."""

    def __init__(self, clock: VirtualClock, quota: MemoryQuota, sharers: int) -> None:
        self.clock = clock
        self.gate = Gate(
            clock,
            LimitPolicy(max_concurrent_calls=16, tokens_per_minute=TOKENS_PER_MINUTE / sharers, share=1 / sharers),
            jitter=lambda low, high: high,
        )
        self.share = QuotaShare(self.gate, quota, clock, account="a", sharers=sharers, jitter=DICE.uniform)
        self.busy = True
        self.limits: RateLimits | None = None
        self.spent: list[tuple[float, int]] = []
        self._work = asyncio.Event()
        self.gate.changed = self._work.set

    async def run(self) -> None:
        async with asyncio.TaskGroup() as calls:
            while True:
                self._work.clear()
                while self.busy and self.gate.admits(CALL_TOKENS):
                    calls.create_task(self._call())
                    await asyncio.sleep(0)
                at = self.gate.ready_at(CALL_TOKENS) if self.busy else None
                if at is None:
                    await self._work.wait()
                else:
                    await self.clock.sleep(at - self.clock.monotonic())

    async def _call(self) -> None:
        permit = self.gate.begin(CALL_TOKENS)
        self.spent.append((self.clock.monotonic(), CALL_TOKENS))
        await self.clock.sleep(CALL_S)
        permit.succeeded(CALL_TOKENS, self.limits)

    def start_again(self) -> None:
        self.busy = True
        self._work.set()

    def tokens(self, since: float) -> int:
        return sum(tokens for at, tokens in self.spent if at >= since)


@asynccontextmanager
async def workers(clock: VirtualClock, quota: MemoryQuota, count: int) -> AsyncIterator[list[Worker]]:
    crew = [Worker(clock, quota, count) for _ in range(count)]
    tasks = [asyncio.ensure_future(each) for worker in crew for each in (worker.share.run(), worker.run())]
    try:
        yield crew
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pass_s(clock: VirtualClock, seconds: float) -> None:
    end = asyncio.ensure_future(clock.sleep(seconds))
    while not end.done():
        for _ in range(12):
            await asyncio.sleep(0)
        if not end.done():
            clock.wake_next()


def tokens(crew: Sequence[Worker], since: float) -> int:
    return sum(worker.tokens(since) for worker in crew)


async def tokens_of_a_minute(clock: VirtualClock, crew: Sequence[Worker]) -> int:
    since = clock.now_s
    await pass_s(clock, 60)
    return tokens(crew, since)


def rest(crew: Sequence[Worker]) -> None:
    for worker in crew:
        worker.busy = False


async def test_workers_use_the_limit_together_and_no_more() -> None:
    """Four workers with more to do than the limit allows spend nearly all of it, from the first second on no more."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        await pass_s(clock, 5)
        since = clock.now_s
        assert 0.95 * TOKENS_PER_MINUTE <= await tokens_of_a_minute(clock, crew) <= 1.02 * TOKENS_PER_MINUTE
        assert tokens(crew, 0.0) <= TOKENS_PER_MINUTE / 20 * 1.1 + TOKENS_PER_MINUTE * 65 / 60
        assert min(worker.tokens(since) for worker in crew) >= 0.5 * TOKENS_PER_MINUTE / 4


async def test_what_idle_workers_leave_a_busy_one_has() -> None:
    """One of four workers with work may use what four may."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        rest(crew[1:])
        await pass_s(clock, 5)
        assert await tokens_of_a_minute(clock, crew) >= 0.9 * TOKENS_PER_MINUTE


async def test_without_the_quota_each_keeps_to_its_part_until_it_is_back() -> None:
    """A quota out of reach is asked once a pause, a busy worker has a fourth, and all of it again afterwards."""
    clock = VirtualClock()
    quota = MemoryQuota(clock)
    async with workers(clock, quota, 4) as crew:
        rest(crew[1:])
        await pass_s(clock, 5)
        quota.lost = True
        await pass_s(clock, 5)
        assert crew[0].share.shared is False
        since, quota.leases = clock.now_s, 0
        await pass_s(clock, 60)
        assert 0.95 * TOKENS_PER_MINUTE / 4 <= tokens(crew, since) <= 1.05 * TOKENS_PER_MINUTE / 4
        assert quota.leases <= 61 / PAUSE_S
        quota.lost = False
        await pass_s(clock, 5)
        assert await tokens_of_a_minute(clock, crew) >= 0.9 * TOKENS_PER_MINUTE


async def test_a_call_makes_no_round_trip() -> None:
    """Slices are asked for ahead of need, a few a second, and not at all while nothing is spent."""
    clock = VirtualClock()
    quota = MemoryQuota(clock)
    async with workers(clock, quota, 1) as crew:
        await pass_s(clock, 60)
        assert quota.leases <= 60 * 12
        crew[0].busy = False
        await pass_s(clock, 10)
        quota.leases = 0
        await pass_s(clock, 60)
        assert quota.leases == 0
        crew[0].gate.begin(CALL_TOKENS // 50).succeeded(CALL_TOKENS // 50, None)
        await pass_s(clock, 1)
        assert quota.leases == 1, "what was spent is leased again before it is needed"
        crew[0].start_again()
        since = clock.now_s
        await pass_s(clock, 0.001)
        assert tokens(crew, since) >= CALL_TOKENS


async def test_a_drop_that_one_worker_hears_of_is_followed_by_all() -> None:
    """The limit of an answer's header reaches the others by the quota."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        await pass_s(clock, 10)
        crew[2].limits = RateLimits(tokens_per_minute=TOKENS_PER_MINUTE / 3)
        await pass_s(clock, 10)
        assert [worker.gate.tokens.per_minute for worker in crew] == pytest.approx([TOKENS_PER_MINUTE / 12] * 4)
        assert 0.9 * TOKENS_PER_MINUTE / 3 <= await tokens_of_a_minute(clock, crew) <= 1.05 * TOKENS_PER_MINUTE / 3


async def test_a_wait_that_one_was_asked_for_is_kept_by_all() -> None:
    """Once the slices at hand are used up nobody calls before a Retry-After is over, and then all do."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        await pass_s(clock, 10)
        rest(crew)
        await pass_s(clock, 10)
        permit = crew[0].gate.begin(CALL_TOKENS)
        await pass_s(clock, 10)
        permit.failed(ProviderThrottled("rate_limited", http_status=429, retry_after_s=20))
        for worker in crew[1:]:
            worker.start_again()
        since = clock.now_s
        await pass_s(clock, 19)
        assert tokens(crew, since) <= 3 * TOKENS_PER_MINUTE / 4 / 20 * 1.1
        since = clock.now_s
        await pass_s(clock, 31)
        assert tokens(crew, since) >= 0.85 * TOKENS_PER_MINUTE / 2


async def test_what_one_header_says_is_left_is_not_held_against_a_slice() -> None:
    """A slice is of what flows in later, and others spend too: what is left of the account now says nothing."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        await pass_s(clock, 5)
        rest(crew[1:])
        crew[0].limits = RateLimits(tokens_per_minute=TOKENS_PER_MINUTE, remaining_tokens=0)
        await pass_s(clock, 5)
        assert await tokens_of_a_minute(clock, crew) >= 0.9 * TOKENS_PER_MINUTE


async def test_a_slice_grows_with_the_call_that_waits() -> None:
    """A gate that is full for small calls asks for more once a larger one waits, though nothing was spent."""
    clock = VirtualClock()
    async with workers(clock, MemoryQuota(clock), 4) as crew:
        rest(crew)
        gate = crew[0].gate
        gate.begin(100).cancelled()
        await pass_s(clock, 10)
        assert gate.admits(100)
        assert not gate.admits(CALL_TOKENS)
        await pass_s(clock, 2)
        assert gate.admits(CALL_TOKENS)


@pytest.mark.parametrize(
    "lane, percent, sharers, part",
    [
        ("bulk", 10, 1, 0.9),
        ("interactive", 10, 1, 0.1),
        ("bulk", 25, 4, 0.1875),
        ("bulk", 0, 1, 1.0),
        ("interactive", 0, 2, 0.5),
    ],
)
def test_a_worker_has_its_lane_s_part_of_the_limits(lane: str, percent: int, sharers: int, part: float) -> None:
    """The lanes' parts are reserved and make up the whole, and headers are shared out as the settings are."""
    settings = load(lane=lane, interactive_share_percent=percent)
    gate = open_gate(settings, 600, 1_000_000, sharers=sharers, clock=VirtualClock())
    assert gate.tokens.per_minute == pytest.approx(1_000_000 * part)
    assert gate.requests.per_minute == pytest.approx(600 * part)
    gate.begin(1).succeeded(1, RateLimits(300, 500_000))
    assert gate.tokens.per_minute == pytest.approx(500_000 * part)
    assert gate.requests.per_minute == pytest.approx(300 * part)


def test_limits_that_nobody_knows_are_none() -> None:
    """Neither settings nor headers say any, so nothing is paced."""
    gate = open_gate(load(), None, None, sharers=4, clock=VirtualClock())
    assert gate.requests.per_minute is None
    assert gate.max_call_tokens is None
