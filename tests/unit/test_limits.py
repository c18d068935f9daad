"""The gate of a deployment in virtual time: calls in flight, waits, the breaker, retries."""

from __future__ import annotations

import math
import random

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
from tests.support.gates import Answer, Clock, Simulation, a_gate, a_gate_where_tokens_gathered, steady, throttled

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


# --- waits


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
