"""The gate of a deployment in virtual time, by itself and before simulated providers."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
    RateLimits,
)
from processor.limits import BREAKER_FAILURES, START_CALLS, Gate, LimitPolicy


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def now_ms(self) -> int:
        return int(self.now * 1000)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("the gate never sleeps")


def a_gate(clock: Clock | None = None, **policy: Any) -> Gate:
    """With no luck: a backoff takes all of its time."""
    return Gate(clock or Clock(), LimitPolicy(**({"max_concurrent_calls": 16} | policy)), lambda low, high: high)


Answer = RateLimits | ProviderError | None
Provider = Callable[[float, int, int], tuple[float, Answer]]
"""(now, tokens, calls in flight with this one) -> seconds it takes, and its headers or its error."""


@dataclass
class Simulation:
    """A backlog of calls of these sizes before gates of one provider, which makes them as soon as a gate lets it."""

    clock: Clock
    gates: Sequence[Gate]
    provider: Provider
    sizes: Sequence[int] = (1000,)
    began: list[tuple[float, int]] = field(default_factory=list)
    refused: list[tuple[float, int]] = field(default_factory=list)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._sizes = itertools.cycle(self.sizes)
        self._turns = itertools.count()
        self._next = [next(self._sizes) for _ in self.gates]
        self._ends: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while True:
            wakes: list[float] = []
            for i, gate in enumerate(self.gates):
                while gate.admits(self._next[i]):
                    self._call(gate, self._next[i])
                    self._next[i] = next(self._sizes)
                ready_at = gate.ready_at(self._next[i])
                if ready_at is not None:
                    assert ready_at > self.clock.now, "ready now, and yet it admits nothing"
                    wakes.append(ready_at)
            if self._ends:
                wakes.append(self._ends[0][0])
            if min(wakes) > until:
                self.clock.now = until
                return
            self.clock.now = min(wakes)
            while self._ends and self._ends[0][0] <= self.clock.now:
                heapq.heappop(self._ends)[2]()

    def _call(self, gate: Gate, tokens: int) -> None:
        permit = gate.begin(tokens)
        in_flight = sum(gate.in_flight for gate in self.gates)
        self.most_in_flight = max(self.most_in_flight, in_flight)
        seconds, answer = self.provider(self.clock.now, tokens, in_flight)

        def end() -> None:
            if isinstance(answer, ProviderError):
                permit.failed(answer)
            else:
                permit.succeeded(tokens, answer)

        (self.refused if isinstance(answer, ProviderError) else self.began).append((self.clock.now, tokens))
        heapq.heappush(self._ends, (self.clock.now + seconds, next(self._turns), end))

    def tokens(self, since: float) -> int:
        return sum(tokens for at, tokens in self.began if at >= since)


class Account:
    """A provider with buckets: `burst_s` of the rate at once, refusals with a Retry-After, headers if it has them."""

    def __init__(
        self,
        clock: Clock,
        *,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float,
        burst_s: float = 60.0,
        headers: bool = True,
        retry_after: bool = True,
        seconds: float = 1.0,
        network_s: float = 0.0,
    ) -> None:
        self.rates = [requests_per_minute / 60, tokens_per_minute / 60]
        self.burst_s = burst_s
        self.headers = headers
        self.retry_after = retry_after
        self.seconds = seconds
        self.network_s = network_s
        self.dice = random.Random(1)
        self.at = clock.now
        self.levels = [self.capacity(0), self.capacity(1)]

    def capacity(self, i: int) -> float:
        return max(1.0, self.rates[i] * self.burst_s)

    def change(self, part: float) -> None:
        """The limits are so much of what they were; what was used stays used."""
        used = [self.capacity(i) - self.levels[i] for i in (0, 1)]
        self.rates = [rate * part for rate in self.rates]
        self.levels = [max(0.0, self.capacity(i) - used[i]) if used[i] < math.inf else math.inf for i in (0, 1)]

    def __call__(self, now: float, tokens: int, in_flight: int) -> tuple[float, Answer]:
        arrives = max(self.at, now + self.network_s * self.dice.random())
        for i in (0, 1):
            self.levels[i] = min(self.capacity(i), self.levels[i] + (arrives - self.at) * self.rates[i])
        self.at = arrives
        amounts = (1.0, float(tokens))
        waits = [(min(a, self.capacity(i)) - self.levels[i]) / self.rates[i] for i, a in enumerate(amounts)]
        if max(waits) > 0:
            self.levels[0] = max(0.0, self.levels[0] - 1)
            error = ProviderThrottled(
                "rate_limited", http_status=429, retry_after_s=max(waits) if self.retry_after else None
            )
            error.limits = self.told()
            return 0.05, error
        self.levels = [level - amount for level, amount in zip(self.levels, amounts, strict=True)]
        return self.seconds, self.told()

    def told(self) -> RateLimits | None:
        if not self.headers:
            return None
        requests = self.rates[0] * 60
        return RateLimits(
            requests if requests < math.inf else None,
            self.rates[1] * 60,
            max(0.0, self.levels[0]) if requests < math.inf else None,
            max(0.0, self.levels[1]),
        )


def steady(seconds_a_call: float) -> Provider:
    return lambda now, tokens, in_flight: (seconds_a_call, None)


# --- calls in flight


def test_a_provider_that_bears_it_has_all_calls_in_flight_after_a_few_round_trips() -> None:
    """From 4 calls the concurrency doubles every round trip up to the cap, while that is what holds calls up."""
    clock = Clock()
    simulation = Simulation(clock, [a_gate(clock)], steady(0.6))
    simulation.run(0.1)
    assert simulation.most_in_flight == START_CALLS
    simulation.run(1.2)
    assert simulation.most_in_flight == 16


def test_a_cap_below_the_start_is_kept() -> None:
    """The hard cap holds from the first call on."""
    clock = Clock()
    simulation = Simulation(clock, [a_gate(clock, max_concurrent_calls=2)], steady(0.6))
    simulation.run(60)
    assert simulation.most_in_flight == 2


def test_concurrency_does_not_grow_while_something_else_holds_calls_up() -> None:
    """A rate that lets one call at a time through teaches nothing about concurrency."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=60_000)
    Simulation(clock, [gate], steady(0.6)).run(120)
    assert gate.snapshot()["concurrency"] == START_CALLS


class OneAtATime:
    """A local server that works on one call after the other."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def __call__(self, now: float, tokens: int, in_flight: int) -> tuple[float, Answer]:
        self.free_at = max(now, self.free_at) + 0.5
        return self.free_at - now, None


def test_a_server_that_only_queues_is_not_flooded_and_never_idle() -> None:
    """Where more calls in flight only wait longer, few are kept in flight, and always one in work."""
    clock = Clock()
    gate = a_gate(clock)
    simulation = Simulation(clock, [gate], OneAtATime())
    simulation.run(30)
    since = clock.now
    simulation.most_in_flight = 0
    simulation.run(100)
    assert simulation.most_in_flight <= 11
    assert simulation.tokens(since) >= 0.99 * 1000 * 100 / 0.5


def test_a_server_whose_calls_share_its_cores_is_not_flooded() -> None:
    """The same where all calls in flight get slower together."""
    clock = Clock()
    simulation = Simulation(clock, [a_gate(clock)], lambda now, tokens, in_flight: (0.5 * in_flight, None))
    simulation.run(100)
    simulation.most_in_flight = 0
    simulation.run(300)
    assert simulation.most_in_flight <= 11


def test_a_server_that_bears_some_calls_gets_them() -> None:
    """Slowness that begins beyond eight calls in flight leaves about so many."""
    clock = Clock()
    gate = a_gate(clock, max_concurrent_calls=64)
    simulation = Simulation(clock, [gate], lambda now, tokens, in_flight: (0.5 * max(1, in_flight / 8), None))
    simulation.run(120)
    simulation.most_in_flight = 0
    since = clock.now
    simulation.run(120)
    assert simulation.most_in_flight <= 20
    assert simulation.tokens(since) >= 0.95 * 1000 * 120 * 8 / 0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_provider_whose_times_vary_is_used_in_full(seed: int) -> None:
    """Calls that take half or thrice as long by chance, whatever their company, are no queue."""
    clock = Clock()
    dice = random.Random(seed)
    simulation = Simulation(
        clock,
        [a_gate(clock)],
        lambda now, tokens, in_flight: (dice.lognormvariate(-1.0, 0.5) + tokens / 100_000, None),
        sizes=[dice.randint(100, 50_000) for _ in range(997)],
    )
    simulation.run(300)
    mean = 0.4169 + 25_000 / 100_000
    assert len(simulation.began) >= 0.8 * 16 * 300 / mean


def test_a_provider_that_is_slower_for_good_is_used_in_full_again() -> None:
    """What was usual once, for one call or for many, is forgotten when few calls in flight are no faster."""
    clock = Clock()
    gate = a_gate(clock)
    for _ in range(10):
        permit = gate.begin(1000)
        clock.now += 0.2
        permit.succeeded(1000, None)
    simulation = Simulation(clock, [gate], steady(0.2))
    simulation.run(30)
    simulation.provider = steady(2.0)
    simulation.run(120)
    simulation.most_in_flight = 0
    simulation.run(120)
    assert simulation.most_in_flight == 16


@pytest.mark.parametrize(
    "error",
    [
        ProviderThrottled("rate_limited", http_status=429, retry_after_s=0.0),
        ProviderTransient("timeout"),
        CallTooLarge("timeout"),
        ProviderTransient("no_connection"),
    ],
)
def test_a_round_trip_of_failures_is_one_decrease(error: ProviderError) -> None:
    """Calls that were in flight together and failed together say one thing, not sixteen."""
    clock = Clock()
    gate = a_gate(clock)
    permits = [gate.begin(1000) for _ in range(4)]
    for permit in permits:
        clock.now += 0.3
        permit.failed(error)
    assert gate.snapshot()["concurrency"] == pytest.approx(2.8)


# --- rates


def test_there_is_no_burst_at_the_start() -> None:
    """From the first second on no more is asked for than the limits allow, and one call of any size."""
    clock = Clock()
    gate = a_gate(clock, requests_per_minute=600, tokens_per_minute=1_000_000)
    simulation = Simulation(clock, [gate], steady(0.3), sizes=[5_000])
    simulation.run(60)
    start = simulation.began[0][0]
    for at, _ in simulation.began:
        asked = sum(tokens for begun, tokens in simulation.began if begun <= at)
        assert asked <= 5_000 + (at - start) * 1_000_000 / 60


def test_after_a_pause_no_more_than_one_call_waits_to_be_made_at_once() -> None:
    """What gathers while there is nothing to do is one call of the largest size seen, and a tenth."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    for _ in range(3):
        gate.begin(10_000).succeeded(10_000, None)
        clock.now += 60
    assert gate.admits(10_000)
    gate.begin(10_000)
    assert not gate.admits(10_000)


def test_many_small_calls_keep_to_the_requests_of_every_second() -> None:
    """A limit of 600 requests a minute is held second by second: ten in each."""
    clock = Clock()
    simulation = Simulation(clock, [a_gate(clock, requests_per_minute=600)], steady(0.2), sizes=[10])
    simulation.run(60)
    times = [at for at, _ in simulation.began]
    assert 0.95 * 600 <= len(times) <= 601
    assert max(sum(1 for other in times if at <= other < at + 1) for at in times) <= 11


def test_a_low_limit_of_requests_leaves_room_for_some_that_come_together() -> None:
    """Of 60 a minute three may go at once after a pause, of 3 a minute one."""
    for per_minute, together in ((60, 3), (3, 1)):
        clock = Clock()
        gate = a_gate(clock, requests_per_minute=per_minute)
        gate.begin(1).cancelled()
        clock.now += 60
        made = 0
        while gate.admits(1):
            gate.begin(1)
            made += 1
        assert made == together


def test_a_call_beyond_what_gathers_passes_and_leaves_a_debt() -> None:
    """An input larger than a twentieth of a minute's tokens does not starve: it waits for a full bucket, then others
    wait for it."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=6_000)
    assert gate.max_call_tokens == 300
    assert gate.admits(8_000)
    gate.begin(8_000).succeeded(8_000, None)
    at = gate.ready_at(10)
    assert at is not None
    assert at - clock.now == pytest.approx(8_010 / 98.5)
    clock.now = at
    assert gate.admits(10)
    assert not gate.admits(8_000)


def test_without_a_limit_nothing_bounds_the_tokens() -> None:
    """Unknown limits are none."""
    gate = a_gate()
    assert gate.max_call_tokens is None
    assert gate.admits(10**9)


def test_an_absurd_bill_stops_nothing_for_long() -> None:
    """A provider that says it billed billions is believed as far as an account can go: a minute's worth."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=60_000)
    gate.begin(100).succeeded(2**31 - 1, None)
    ready_at = gate.ready_at(100)
    assert ready_at is not None
    assert 30 < ready_at - clock.monotonic() < 70


def test_what_was_billed_corrects_the_book() -> None:
    """A call that was estimated at 1,000 tokens and billed 3,000 has spent 3,000."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=60_000)
    left = gate.tokens.level
    gate.begin(1_000).succeeded(3_000, None)
    assert gate.tokens.level == left - 3_000


@pytest.mark.parametrize(
    "error, requests, tokens",
    [
        (InputRejected("input_refused", http_status=400), 1, 0),
        (InputRejected("input_refused"), 1, 0),
        (CallTooLarge("call_too_large", http_status=413), 1, 0),
        (ModelRejected("model_refused", http_status=404), 1, 0),
        (ProviderPaused("key_refused", http_status=401), 1, 0),
        (ProviderTransient("no_connection"), 0, 0),
        (ProviderTransient("timeout"), 1, 1_000),
        (CallTooLarge("timeout"), 1, 1_000),
        (ProviderTransient("server_error", http_status=500), 1, 1_000),
    ],
)
def test_tokens_of_a_refused_call_come_back_and_those_of_a_lost_one_do_not(
    error: ProviderError, requests: int, tokens: int
) -> None:
    """Who refuses a call has counted the request alone, who fails may have counted all, who was not reached nothing."""
    gate = a_gate(requests_per_minute=600, tokens_per_minute=60_000)
    gate.begin(1_000).failed(error)
    assert (gate.requests.level, gate.tokens.level) == (-requests, -tokens)


def test_a_cancelled_call_gives_back_what_it_took() -> None:
    """A permit that was not used leaves slot, request and tokens as they were."""
    clock = Clock()
    gate = a_gate(clock, requests_per_minute=60, tokens_per_minute=60_000)
    before = gate.snapshot()
    gate.begin(1_000).cancelled()
    assert gate.snapshot() == before


def test_a_permit_ends_once() -> None:
    """A second end would free a slot that another call holds."""
    permit = a_gate().begin(1)
    permit.cancelled()
    with pytest.raises(AssertionError):
        permit.succeeded(1, None)


@pytest.mark.parametrize("burst_s", [60.0, 4.0])
@pytest.mark.parametrize("size", [1_500, 8_000, 50_000])
@pytest.mark.parametrize("headers", [True, False])
def test_the_limit_is_used_and_kept(burst_s: float, size: int, headers: bool) -> None:
    """Of the allowed tokens more than 95% are used, and hardly a call is refused, whatever a call's size."""
    clock = Clock()
    account = Account(
        clock,
        requests_per_minute=900,
        tokens_per_minute=1_000_000,
        burst_s=burst_s,
        headers=headers,
        network_s=0.03,
    )
    gate = a_gate(clock, requests_per_minute=900, tokens_per_minute=1_000_000)
    simulation = Simulation(clock, [gate], account, sizes=[size, size // 2, size])
    simulation.run(10)
    since = clock.now
    simulation.run(300)
    assert simulation.tokens(since) >= 0.95 * 1_000_000 * 5
    assert len(simulation.refused) <= max(3, len(simulation.began) // 100)


@pytest.mark.parametrize("configured", [None, 100_000, 3_000_000])
def test_headers_correct_the_limit_either_way(configured: int | None) -> None:
    """An unknown limit is learnt, one that was configured too low or too high is corrected."""
    clock = Clock()
    account = Account(clock, requests_per_minute=6_000, tokens_per_minute=1_000_000)
    gate = a_gate(clock, tokens_per_minute=configured)
    simulation = Simulation(clock, [gate], account, sizes=[20_000])
    simulation.run(20)
    since = clock.now
    simulation.run(120)
    assert 0.95 * 2_000_000 <= simulation.tokens(since) <= 2_000_000
    assert len(simulation.refused) <= 3


def test_a_limit_that_drops_to_a_third_is_followed() -> None:
    """The next answer tells, so hardly a call is refused and the lower limit is used in full."""
    clock = Clock()
    account = Account(clock, requests_per_minute=600, tokens_per_minute=1_000_000)
    simulation = Simulation(
        clock, [a_gate(clock, requests_per_minute=600, tokens_per_minute=1_000_000)], account, sizes=[50_000]
    )
    simulation.run(60)
    account.change(1 / 3)
    simulation.run(20)
    since = clock.now
    simulation.run(180)
    assert simulation.tokens(since) >= 0.95 * 1_000_000
    assert len(simulation.refused) <= 3


def test_a_drop_that_no_header_tells_is_found_by_refusals_and_forgotten_slowly() -> None:
    """Without headers each refusal cuts the rate, which comes back little by little."""
    clock = Clock()
    account = Account(
        clock, requests_per_minute=6_000, tokens_per_minute=1_000_000, burst_s=5, headers=False, retry_after=False
    )
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    simulation = Simulation(clock, [gate], account, sizes=[10_000])
    simulation.run(60)
    account.change(1 / 3)
    simulation.run(60)
    simulation.refused.clear()
    since = clock.now
    simulation.run(300)
    assert simulation.tokens(since) >= 0.6 * 5_000_000 / 3
    assert len(simulation.refused) <= 0.15 * len([at for at, _ in simulation.began if at >= since])
    account.change(3.0)
    simulation.run(600)
    assert gate.snapshot()["tokens_per_minute"] == pytest.approx(985_000)


def test_a_share_is_taken_of_what_headers_say() -> None:
    """Headers tell the account's limit, of which a lane or one of several workers takes its part alone."""
    clock = Clock()
    account = Account(clock, tokens_per_minute=1_000_000)
    gates = [a_gate(clock, share=0.9), a_gate(clock, share=0.1)]
    simulation = Simulation(clock, gates, account, sizes=[2_000])
    simulation.run(30)
    tokens = [gate.snapshot()["tokens_per_minute"] for gate in gates]
    assert tokens == pytest.approx([886_500, 98_500])


def a_gate_where_tokens_gathered(clock: Clock, tokens: int) -> Gate:
    """For a call of so many: idle for long enough since its first call."""
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    gate.admits(tokens)
    gate.begin(1).cancelled()
    clock.now += 10
    return gate


def test_what_the_provider_says_is_left_bounds_what_is_spent() -> None:
    """Somebody else's use of the account shows in what is left, and is respected before anything is refused."""
    clock = Clock()
    gate = a_gate_where_tokens_gathered(clock, 20_000)
    assert gate.admits(20_000)
    gate.begin(1_000).succeeded(1_000, RateLimits(600, 1_000_000, 500, 7_000))
    assert not gate.admits(20_000)
    assert gate.admits(7_000)


def test_an_older_answer_does_not_undo_a_newer_one() -> None:
    """Answers overtake each other: what counts is the one whose call began last."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    older = gate.begin(1_000)
    clock.now += 0.1
    newer = gate.begin(1_000)
    newer.succeeded(1_000, RateLimits(tokens_per_minute=300_000))
    older.succeeded(1_000, RateLimits(tokens_per_minute=1_000_000))
    assert gate.snapshot()["tokens_per_minute"] == pytest.approx(300_000 * 0.985)


@pytest.mark.parametrize("limit", [0.0, -5.0, math.nan, math.inf])
def test_a_limit_that_can_not_be_is_not_believed(limit: float) -> None:
    """Nonsense in a header changes nothing."""
    gate = a_gate(requests_per_minute=600, tokens_per_minute=60_000)
    before = gate.snapshot()
    gate.begin(0).cancelled()
    gate.begin(0).succeeded(0, RateLimits(limit, limit, math.nan, math.nan))
    gate.begin(0).succeeded(0, RateLimits(remaining_requests=-1, remaining_tokens=-1_000))
    after = gate.snapshot()
    assert after["tokens_per_minute"] == before["tokens_per_minute"]
    assert after["tokens_left"] == before["tokens_left"]


# --- waits


def throttled(retry_after_s: float | None) -> ProviderThrottled:
    return ProviderThrottled("rate_limited", http_status=429, retry_after_s=retry_after_s)


def test_a_wait_that_was_asked_for_holds_for_every_call() -> None:
    """Retry-After closes the gate, not only the call that was refused, and its book agrees when it opens."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=1_000_000)
    gate.begin(50_000).failed(throttled(7.0))
    assert not gate.admits(1)
    at = gate.ready_at(50_000)
    assert at is not None
    assert 7.0 < at - clock.now <= 7.2
    clock.now = at
    assert gate.admits(50_000)


def test_after_a_wait_there_is_room_for_the_call_that_was_refused() -> None:
    """What had gathered before a refusal is not there: the provider said when it has room for just that call."""
    clock = Clock()
    gate = a_gate_where_tokens_gathered(clock, 50_000)
    gate.begin(5_000).failed(throttled(1.0))
    clock.now = gate.ready_at(5_000) or 0
    assert gate.admits(5_000)
    gate.begin(5_000)
    assert not gate.admits(5_000)


def test_a_refusal_is_no_sign_of_another_limit_than_headers_tell() -> None:
    """Where an answer says the limit, a 429 without a wait leaves the rate as it is."""
    gate = a_gate(tokens_per_minute=60_000)
    gate.begin(1).succeeded(1, RateLimits(tokens_per_minute=60_000))
    gate.begin(1).failed(throttled(None))
    assert gate.snapshot()["tokens_per_minute"] == pytest.approx(60_000 * 0.985)


def test_a_header_ends_the_doubt_that_refusals_raised() -> None:
    """A rate that was cut since nobody told the limit is whole as soon as somebody does."""
    gate = a_gate(tokens_per_minute=60_000)
    permit = gate.begin(1)
    gate.begin(1).failed(throttled(None))
    assert gate.snapshot()["tokens_per_minute"] == pytest.approx(60_000 * 0.985 * 0.8)
    permit.failed(InputRejected("input_refused", http_status=400))
    gate.begin(1).succeeded(1, RateLimits(tokens_per_minute=60_000))
    assert gate.snapshot()["tokens_per_minute"] == pytest.approx(60_000 * 0.985)


def test_what_had_gathered_before_a_refusal_is_not_spent_after_it() -> None:
    """A 429 that does not say how long to wait says at least that nothing is left."""
    clock = Clock()
    gate = a_gate(clock, tokens_per_minute=60_000)
    gate.begin(1).cancelled()
    clock.now += 10
    gate.begin(100).failed(throttled(None))
    assert gate.tokens.level <= 0


def test_an_absurd_wait_is_cut() -> None:
    """A Retry-After of a year is not waited for."""
    clock = Clock()
    gate = a_gate(clock, retry_after_max_s=300)
    gate.begin(1).failed(throttled(3.2e7))
    at = gate.ready_at(1)
    assert at is not None
    assert at - clock.now <= 301


@pytest.mark.parametrize("said", [None, -1.0, math.nan])
def test_a_throttling_that_does_not_say_how_long_is_waited_out_longer_each_time(said: float | None) -> None:
    """Backoffs double from one throttling to the next, up to the longest, and a success ends that."""
    clock = Clock()
    gate = a_gate(clock, retry_initial_s=1, retry_max_s=8)
    waits = []
    for _ in range(4):
        at = gate.ready_at(1)
        assert at is not None
        clock.now = at
        gate.begin(1).failed(throttled(said))
        waits.append((gate.ready_at(1) or 0) - clock.now)
    assert waits == pytest.approx([1, 2, 4, 8])
    clock.now += 8
    gate.begin(1).succeeded(1, None)
    gate.begin(1).failed(throttled(said))
    assert (gate.ready_at(1) or 0) - clock.now == pytest.approx(1)


# --- the breaker


def fail(gate: Gate, clock: Clock, error: ProviderError) -> None:
    at = gate.ready_at(1)
    assert at is not None
    clock.now = max(clock.now, at)
    gate.begin(1).failed(error)


def test_failures_in_a_row_open_the_breaker_and_one_call_at_a_time_probes() -> None:
    """After five failures nothing goes out but a probe after a backoff, which doubles, until one is answered."""
    clock = Clock()
    gate = a_gate(clock, retry_initial_s=1, retry_max_s=3)
    for _ in range(BREAKER_FAILURES - 1):
        fail(gate, clock, ProviderTransient("server_error", http_status=500))
    assert gate.snapshot()["paused"] is None
    fail(gate, clock, ProviderTransient("server_error", http_status=500))
    assert gate.paused == "server_error"
    for backoff_s in (1, 2, 3, 3):
        at = gate.ready_at(1)
        assert at is not None
        assert at - clock.now == pytest.approx(backoff_s)
        assert not gate.admits(1)
        clock.now = at
        assert gate.admits(1)
        probe = gate.begin(1)
        assert not gate.admits(1)
        assert gate.ready_at(1) is None
        clock.now += 0.5
        probe.failed(ProviderTransient("reset"))
    clock.now += 3
    probe = gate.begin(1)
    probe.succeeded(1, None)
    assert gate.snapshot()["paused"] is None
    assert gate.admits(1)


def test_a_success_between_keeps_the_breaker_closed() -> None:
    """Control: eight failures of which no five come in a row open nothing."""
    clock = Clock()
    gate = a_gate(clock)
    for i in range(2 * BREAKER_FAILURES - 1):
        if i == BREAKER_FAILURES - 1:
            gate.begin(1).succeeded(1, None)
        else:
            fail(gate, clock, ProviderTransient("reset"))
    assert gate.paused is None


def test_a_refused_key_opens_the_breaker_at_once() -> None:
    """A fault of the account is none that trying harder mends; health has its code."""
    gate = a_gate()
    gate.begin(1).failed(ProviderPaused("key_refused", http_status=401))
    assert gate.paused == "key_refused"
    assert gate.snapshot()["paused"] == "key_refused"


@pytest.mark.parametrize(
    "error",
    [
        InputRejected("input_refused", http_status=400),
        InputRejected("input_refused"),
        CallTooLarge("call_too_large", http_status=413),
        ModelRejected("model_refused", http_status=404),
    ],
)
def test_a_refusal_of_the_work_is_an_answer(error: ProviderError) -> None:
    """A provider that judges inputs is up: the breaker closes."""
    clock = Clock()
    gate = a_gate(clock)
    gate.begin(1).failed(ProviderPaused("key_refused", http_status=401))
    clock.now += 60
    gate.begin(1).failed(error)
    assert gate.paused is None
    for _ in range(2 * BREAKER_FAILURES):
        gate.begin(1).failed(error)
    assert gate.paused is None


def test_a_timeout_is_no_answer() -> None:
    """Calls that time out open the breaker, whatever else is made of them."""
    clock = Clock()
    gate = a_gate(clock)
    for _ in range(BREAKER_FAILURES):
        fail(gate, clock, CallTooLarge("timeout"))
    assert gate.paused == "timeout"


def test_calls_that_began_before_the_pause_do_not_lengthen_it() -> None:
    """Sixteen calls that break together are one outage: the first probe waits for one backoff."""
    clock = Clock()
    gate = a_gate(clock, retry_initial_s=1)
    permits = [gate.begin(1) for _ in range(16)]
    for permit in permits:
        permit.failed(ProviderTransient("reset"))
    assert (gate.ready_at(1) or 0) - clock.now == pytest.approx(1)


def test_an_outage_costs_a_probe_per_backoff_and_ends_within_one() -> None:
    """Ten minutes without a provider: few calls are lost to them, and the flow is back one backoff later."""
    clock = Clock()
    gate = Gate(clock, LimitPolicy(max_concurrent_calls=16), random.Random(3).uniform)
    begins, ends = clock.now + 30, clock.now + 630

    def provider(now: float, tokens: int, in_flight: int) -> tuple[float, Answer]:
        return (0.2, None) if not begins <= now < ends else (0.2, ProviderTransient("server_error", http_status=503))

    simulation = Simulation(clock, [gate], provider)
    simulation.run(631 + 30)
    assert len(simulation.refused) <= 100
    assert min(at for at, _ in simulation.began if at >= ends) <= ends + 30.5
    assert gate.paused is None


# --- retries


def test_retries_are_about_half_of_the_first_tries() -> None:
    """Once the reserve is used up a retry waits for two first tries, or for a second to pass."""
    clock = Clock()
    gate = a_gate(clock, max_concurrent_calls=1)
    retries = 0
    while gate.admits(1, retry=True):
        gate.begin(1, retry=True).cancelled()
        retries += 1
    assert retries == 10
    for _ in range(20):
        gate.begin(1).cancelled()
        if gate.admits(1, retry=True):
            gate.begin(1, retry=True).cancelled()
            retries += 1
    assert retries == 20
    assert gate.admits(1)
    assert not gate.admits(1, retry=True)
    at = gate.ready_at(1, retry=True)
    assert at == pytest.approx(clock.now + 1)
    clock.now += 1
    assert gate.admits(1, retry=True)


def test_a_probe_needs_no_budget() -> None:
    """While the breaker is open its own backoff is what spares the provider."""
    clock = Clock()
    gate = a_gate(clock, retry_initial_s=0.1)
    while gate.admits(1, retry=True):
        gate.begin(1, retry=True).cancelled()
    gate.begin(1).failed(ProviderPaused("key_refused", http_status=401))
    clock.now += 0.1
    assert gate.admits(1, retry=True)
    gate.begin(1, retry=True).succeeded(1, None)
    assert (gate.ready_at(1, retry=True) or 0) - clock.now == pytest.approx(1 - 0.5 - 0.1)


# --- telling others


def test_whoever_waits_is_told_when_a_call_ends() -> None:
    """Every end of a call is a reason to ask the gate again."""
    gate = a_gate()
    told: list[int] = []
    gate.changed = lambda: told.append(gate.in_flight)
    first, second, third = gate.begin(1), gate.begin(1), gate.begin(1)
    first.succeeded(1, None)
    second.failed(ProviderTransient("reset"))
    third.cancelled()
    assert told == [2, 1, 0]


def test_a_typical_call_follows_the_recent_ones() -> None:
    """`call_seconds` is 0 before any call, then near what the last ones took."""
    clock = Clock()
    gate = a_gate(clock)
    assert gate.call_seconds == 0
    simulation = Simulation(clock, [gate], steady(0.5))
    simulation.run(5)
    assert gate.call_seconds == pytest.approx(0.5)
    simulation.provider = steady(2.0)
    simulation.run(30)
    assert gate.call_seconds == pytest.approx(2.0, rel=0.05)
