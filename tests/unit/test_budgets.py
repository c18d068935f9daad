"""Budgets of the aggregator: states that are worked out from the totals, and follow them through any crash."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import EVERYBODY_ELSE, Budget, BudgetKey, BudgetPlan, BudgetState, UsageSums, month_of
from processor.adapters.sqlite_store import SqliteStore
from processor.budgets import reached_percent, state_of
from processor.domain import Record
from processor.ports import Destination
from tests.support.aggregation import (
    DAY_MS,
    HORIZON_MS,
    TOPICS,
    Bench,
    Event,
    History,
    Steps,
    a_bench,
    append,
    charges,
    recomputed,
)
from tests.support.builders import NOW_MS, a_usage
from tests.support.lives import FAR, NEAR, Life, lives


def a_budget(tokens: int | None = None, nanos: int | None = None, *, hard: bool = True) -> Budget:
    return Budget(max_tokens=tokens, max_cost_nanos=nanos, hard=hard)


BUDGETS = st.builds(
    a_budget, st.sampled_from([None, 3, 10, 1_000]), st.sampled_from([None, 50, 400]), hard=st.booleans()
)
PLANS = st.builds(
    BudgetPlan,
    named=st.dictionaries(st.sampled_from(["p0", "p1", "p2", "unknown"]), BUDGETS, max_size=3),
    default=st.none() | BUDGETS,
)


def expected(bench: Bench, history: History) -> dict[BudgetKey, BudgetState]:
    """The states by a recomputation of all totals from the log, whenever they were made."""
    oldest = month_of(bench.log.now_ms - HORIZON_MS)
    return {
        key: state_of(key, budget, sums, 0)
        for bucket, sums in recomputed(charges(history)).items()
        if bucket.dimension == "all" and len(bucket.bucket) == 7 and bucket.bucket >= oldest
        if (budget := bench.budgets.of(bucket.payer_id)) is not None
        for key in [BudgetKey(bucket.payer_id, bucket.bucket)]
    }


async def one_state(bench: Bench) -> tuple[Record, History]:
    """A payer that has spent its budget: the record of that, and the charges so far."""
    history: History = []
    bench.budgets = BudgetPlan(named={"p0": a_budget(4)})
    append(bench.log, history, [Event(0, 0, 1, 0, 0)])
    await bench.run()
    (record,) = bench.log.all_of(TOPICS.budgets)
    return record, history


async def published(bench: Bench) -> dict[BudgetKey, BudgetState]:
    """The states of who has spent anything."""
    states = await bench.log.budgets()
    return {key: replace(state, updated_at_ms=0) for key, state in states.items() if state.billed_tokens}


async def unspent(bench: Bench, month: str) -> dict[str, Budget]:
    """The budgets of a month that nobody has spent from."""
    states = (await bench.log.budgets()).items()
    return {key.payer_id: state.budget for key, state in states if key.month == month and not state.billed_tokens}


@pytest.mark.parametrize(
    "tokens, nanos, percent",
    [
        *[(0, 0, 0), (49, 0, 0), (50, 0, 50), (79, 0, 50), (80, 0, 80), (99, 0, 80), (100, 0, 100), (101, 0, 100)],
        *[(0, 2, 0), (0, 3, 50), (0, 5, 80), (0, 6, 100), (50, 5, 80), (100, 3, 100)],
    ],
)
def test_a_percentage_is_reached_exactly(tokens: int, nanos: int, percent: int) -> None:
    """Of 100 tokens and 6 nano-dollars the further one counts, at the token and not one before."""
    sums = UsageSums(billed_tokens=tokens, billed_cost_nanos=nanos)
    assert reached_percent(a_budget(100, 6), sums) == percent
    assert reached_percent(a_budget(None, 6), replace(sums, billed_cost_nanos=0)) == 0


class Planned(NamedTuple):
    """A life with the budgets that its process was started with."""

    life: Life
    plan: BudgetPlan


async def go_through(bench: Bench, history: History, past: list[Planned]) -> None:
    for life, plan in past:
        bench.budgets = plan
        append(bench.log, history, life.coming)
        await bench.run(crash_at=life.crash_at)
        bench.leave_store(life.store)
    await bench.run()


def planned(coming: st.SearchStrategy[list[Event]]) -> st.SearchStrategy[list[Planned]]:
    return st.tuples(lives(coming), st.lists(PLANS, min_size=4, max_size=4)).map(
        lambda drawn: [Planned(life, plan) for life, plan in zip(*drawn, strict=False)]
    )


@settings(max_examples=50, deadline=None)
@given(past=planned(st.one_of(NEAR, FAR)))
async def test_the_last_state_of_each_budget_is_the_recomputation(past: list[Planned]) -> None:
    """Wherever processes ended, with stores kept, old or lost, and whatever budgets came, went or were raised."""
    with a_bench() as bench:
        history: History = []
        await go_through(bench, history, past)
        assert await published(bench) == expected(bench, history)
        month = month_of(bench.log.now_ms)
        spenders = {key.payer_id for key in expected(bench, history) if key.month == month}
        others = {*bench.budgets.named, *([EVERYBODY_ELSE] if bench.budgets.default else [])} - spenders
        found = await unspent(bench, month)
        assert found.keys() >= others, "a worker that sees no state lets a first burst of any size pass"
        assert found == {payer_id: bench.budgets.of(payer_id) for payer_id in found}


@pytest.mark.parametrize("store", ["kept", "lost"])
async def test_no_state_goes_back_and_no_event_is_missed(store: str) -> None:
    """Cut anywhere and folded again in other portions, nobody reads less than was known; every event is told."""
    cut, crash_at = True, 0
    while cut:
        with a_bench() as bench:
            bench.budgets = BudgetPlan(named={"p0": a_budget(24)})
            bench.log.partitions[TOPICS.usage] = 1
            append(bench.log, [], [Event(0, 0, 1, 0, 0)])
            await bench.run()  # with an offset committed everywhere, the published totals are not read again
            append(bench.log, [], [Event(0, n, 1, 0, 0) for n in range(1, 6)])
            cut = await bench.run(crash_at=crash_at, run_length=6) is None
            if store == "lost":
                bench.lose_store()
            await bench.run(run_length=1)
            states = [state for _, state in await bench.log.contents("budgets", BudgetState)]
            assert states == sorted(states, key=lambda state: state.billed_tokens)
            assert (states[-1].billed_tokens, states[-1].reached_percent) == (24, 100)
            assert all(bench.counts["budgets_reached", percent] >= 1 for percent in ("50", "80", "100"))
        crash_at += 1
    assert crash_at > 5


async def test_a_jump_over_two_percentages_tells_both() -> None:
    """One record whose reached_percent is 80 after none; the metric counts 50 and 80, once, however often it runs."""
    with a_bench() as bench:
        bench.budgets = BudgetPlan(named={"p0": a_budget(10)})
        append(bench.log, [], [Event(0, n, 1, 0, 0) for n in range(2)])
        for _ in range(3):
            await bench.run()
        states = [state for _, state in await bench.log.contents("budgets", BudgetState)]
        assert [(state.billed_tokens, state.reached_percent) for state in states] == [(8, 80)]
        assert {key: count for key, count in bench.counts.items() if key[0] == "budgets_reached"} == {
            ("budgets_reached", "50"): 1,
            ("budgets_reached", "80"): 1,
        }


async def test_an_event_is_told_again_when_its_publishing_was_cut() -> None:
    """A process that ends before the record is out leaves the telling to the next one."""
    with a_bench() as bench:
        bench.budgets = BudgetPlan(named={"p0": a_budget(4)})
        append(bench.log, [], [Event(0, 0, 1, 0, 0)])
        crashes = 0
        while await bench.run(crash_at=crashes) is None:
            crashes += 1
        assert crashes >= 4
        assert bench.counts["budgets_reached", "100"] >= 1
        states = [state for _, state in await bench.log.contents("budgets", BudgetState)]
        assert [state.reached_percent for state in states] == [100]


async def test_limits_change_with_the_file_at_a_start() -> None:
    """Raised, softened, removed and come lately: without a single new charge the states are those of the new file."""
    with a_bench() as bench:
        history: History = []
        append(bench.log, history, [Event(payer, 0, 1, 0, 0) for payer in range(3)])
        bench.budgets = BudgetPlan(named={"p0": a_budget(4), "p1": a_budget(4)})
        await bench.run()
        assert {key.payer_id: state.refuses for key, state in (await bench.log.budgets()).items()} == {
            "p0": True,
            "p1": True,
        }
        bench.budgets = BudgetPlan(named={"p0": a_budget(5), "p1": a_budget(4, hard=False)}, default=a_budget(None, 1))
        await bench.run()
        states = await published(bench)
        assert {key.payer_id: (state.refuses, state.reached_percent) for key, state in states.items()} == {
            "p0": (False, 80),
            "p1": (False, 100),
            "p2": (True, 100),
        }
        bench.budgets = BudgetPlan()
        await bench.run()
        assert await published(bench) == {}
        log_before = len(bench.log.all_of(TOPICS.budgets))
        await bench.run()
        assert len(bench.log.all_of(TOPICS.budgets)) == log_before


async def test_each_assignment_compares_all_anew() -> None:
    """A process that gets its partitions back puts right what another one, with another file, has published."""
    with a_bench() as bench:
        record, history = await one_state(bench)
        with closing(SqliteStore(bench.path)) as store:
            aggregator = bench.aggregator(store, Steps(None))
            for _ in range(2):
                bench.log.append_bytes(TOPICS.budgets, record.source.partition, None, key=record.key)
                await aggregator.positions([(TOPICS.usage, 0), (TOPICS.usage, 1)])
                assert await published(bench) == expected(bench, history)


async def test_a_month_that_begins_after_quiet_days_has_its_budget() -> None:
    """Workers know of the next month's budget some days before it, so that its first burst is bound though nobody
    spent anything just before."""
    with a_bench() as bench:
        bench.budgets = BudgetPlan(named={"p0": a_budget(4)}, default=a_budget(9))
        append(bench.log, [], [Event(0, 0, 1, 0, 0), Event(0, 1, 0, 5 * DAY_MS, 0)])
        await bench.run()
        assert {key for key in await bench.log.budgets() if key.month == "2026-10"} == {
            BudgetKey("p0", "2026-10"),
            BudgetKey(EVERYBODY_ELSE, "2026-10"),
        }


async def test_a_month_of_its_own_and_none_for_ever() -> None:
    """A charge of the next month begins a new state, also in a process that keeps running; an old month's goes."""
    with a_bench() as bench:
        history: History = []
        bench.budgets = BudgetPlan(named={"p0": a_budget(4)})
        append(bench.log, history, [Event(0, 0, 1, 0, 0)])
        await bench.run()
        append(bench.log, history, [Event(0, 1, 0, 10 * DAY_MS, 0)])
        await bench.run()
        assert {key.month: state.reached_percent for key, state in (await bench.log.budgets()).items()} == {
            "2026-09": 100,
            "2026-10": 50,
        }
        bench.log.now_ms += HORIZON_MS
        await bench.run()
        assert {key.month: state.reached_percent for key, state in (await bench.log.budgets()).items()} == {
            "2026-10": 50,
            "2026-11": 0,
        }


async def test_a_state_that_can_not_be_read_is_replaced() -> None:
    """Bytes of somebody else under a key of ours do not stand for its state."""
    with a_bench() as bench:
        record, history = await one_state(bench)
        bench.log.append_bytes(TOPICS.budgets, record.source.partition, b"no state", key=record.key)
        bench.log.append_bytes(TOPICS.budgets, 0, b"no state", key=b"no key")
        await bench.run()
        assert await published(bench) == expected(bench, history)


async def test_a_log_that_ends_in_no_record_is_folded_to_its_end() -> None:
    """Other services may write in transactions, whose markers take offsets: no record ever comes for the last one."""
    with a_bench() as bench:
        bench.budgets = BudgetPlan(named={"p0": a_budget(24)})
        for partition in range(2):
            bench.log.ends[TOPICS.usage, partition] += 2  # of a partition with nothing else, too
        history: History = []
        append(bench.log, history, [Event(0, 0, 1, 0, 0)])
        for partition in range(2):
            bench.log.ends[TOPICS.usage, partition] += 2
        await bench.run()
        assert await published(bench) == expected(bench, history) != {}
        assert await bench.log.progress() != {}


@pytest.mark.parametrize("before", [BudgetPlan(), BudgetPlan(default=a_budget(1))], ids=["made later", "there"])
async def test_nobody_spends_what_everybody_else_has(before: BudgetPlan) -> None:
    """Other services may name no payer; a state of theirs would refuse whoever has spent nothing yet."""
    with a_bench() as bench:
        for plan in (before, BudgetPlan(default=a_budget(1))):
            bench.budgets = plan
            bench.log.append(Destination("usage", a_usage(payer_id="", charged_at_ms=bench.log.now_ms)))
            await bench.run()
        states = [state for key, state in (await bench.log.budgets()).items() if key.payer_id == EVERYBODY_ELSE]
        assert {state.reached_percent for state in states} == {0}


@pytest.mark.parametrize(
    "key",
    [
        *(b"[[], 1]", b"[1, 2, 3, []]", b"[" * 100_000, b"{}", b"\xff", None, b'"ab"', b'"abcd"'),
        *(b'["\\ud800", "2026-09"]', b'["\\ud800", "2026-09", "all", ""]'),
    ],
)
async def test_no_key_of_others_ends_the_aggregator(key: bytes | None) -> None:
    """What anybody wrote to the budgets or the totals stays there for ever: it must not end each start."""
    with a_bench() as bench:
        bench.budgets = BudgetPlan(named={"p0": a_budget(24)})
        for topic in (TOPICS.budgets, TOPICS.totals):
            bench.log.append_bytes(topic, 0, None, key=key)
        state = state_of(BudgetKey("p0", "2026-09"), a_budget(24), UsageSums(), NOW_MS)
        _, value, _ = bench.log.codec.encode(Destination("budgets", state))
        bench.log.append_bytes(TOPICS.budgets, 1, value, key=key)
        append(bench.log, [], [Event(0, 0, 1, 0, 0)])
        await bench.run()
        assert len(await published(bench)) == 1


def test_months_are_utc() -> None:
    """The last millisecond of a month is that month's."""
    assert month_of(NOW_MS) == "2026-09"
    midnight = 1_790_812_800_000  # 2026-10-01T00:00:00Z
    assert (month_of(midnight - 1), month_of(midnight)) == ("2026-09", "2026-10")


def test_a_key_takes_its_state_back_with_a_null_value() -> None:
    """State and key alike have the key [payer, month]."""
    with a_bench() as bench:
        key = BudgetKey('a"c,me', "2026-09")
        state = state_of(key, a_budget(4), UsageSums(), NOW_MS)
        encoded = bench.log.codec.encode(Destination("budgets", state))
        gone = bench.log.codec.encode(Destination("budgets", key))
        assert (gone.key, gone.value) == (encoded.key, None)
        assert encoded.key == b'["a\\"c,me","2026-09"]'
