"""The rates of a deployment's gate in virtual time: no burst, nothing wasted, the provider's word taken."""

from __future__ import annotations

import math

import pytest

from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderTransient,
    RateLimits,
)
from tests.support.gates import Account, Clock, Simulation, a_gate, a_gate_where_tokens_gathered, steady


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
