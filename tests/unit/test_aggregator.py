"""The aggregator over its real store and a log in memory, ended at any moment, with its store kept, old or lost."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.accounts import LedgerSummary, TaskKey, TaskProgress, UsageTotal
from processor.adapters.avro_records import MAX_CALL_TOKENS
from processor.adapters.sqlite_store import SqliteStore
from processor.aggregator import Aggregator
from processor.domain import MAX_PRICE, Amounts, CallKind, CallOutcome, Part, Source, TokenType, Usage
from processor.ports import Destination, Run
from tests.support.aggregation import (
    DAY_MS,
    HORIZON_MS,
    PARTITIONS,
    PAYERS,
    TOPIC_OF,
    TOPICS,
    Bench,
    Event,
    History,
    MemoryLog,
    Steps,
    a_bench,
    append,
    charges,
    is_late,
    recomputed,
)
from tests.support.builders import a_call, a_request, a_usage
from tests.support.steps import FakeLease


def events(gaps: Sequence[int], ages: Sequence[int]) -> st.SearchStrategy[list[Event]]:
    return st.lists(
        st.builds(
            Event,
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from(gaps),
            st.sampled_from(ages),
        ),
        max_size=14,
    )


NEAR = events([0, 1_000, DAY_MS], [0, 5_000])
FAR = events([0, DAY_MS, 20 * DAY_MS, 69 * DAY_MS, 71 * DAY_MS], [0, DAY_MS, 34 * DAY_MS, 36 * DAY_MS])


class Life(NamedTuple):
    """What comes, where the process ends while it folds that, and what is left of its store."""

    coming: list[Event]
    crash_at: int | None
    store: str


def lives(coming: st.SearchStrategy[list[Event]]) -> st.SearchStrategy[list[Life]]:
    return st.lists(
        st.builds(
            Life, coming, st.one_of(st.none(), st.integers(0, 25)), st.sampled_from(["kept", "kept", "old", "lost"])
        ),
        min_size=1,
        max_size=4,
    )


async def live(bench: Bench, history: History, past: Sequence[Life]) -> None:
    """Go through these lives and then fold to the end."""
    for life in past:
        append(bench.log, history, life.coming)
        await bench.run(crash_at=life.crash_at)
        bench.leave_store(life.store)
    await bench.run()


@settings(max_examples=60, deadline=None)
@given(past=lives(NEAR))
async def test_totals_are_those_of_a_set_of_first_copies(past: list[Life]) -> None:
    """Law 5: wherever the process ends, with its store kept, old or lost, totals equal a recomputation with a set."""
    with a_bench() as bench:
        history: History = []
        await live(bench, history, past)

        first: dict[tuple[int, str], tuple[Source, Usage]] = {}
        for source, usage in history:
            first.setdefault((source.partition, usage.request_id), (source, usage))
        assert await bench.log.totals() == recomputed(first.values())


@settings(max_examples=80, deadline=None)
@given(past=lives(FAR))
async def test_the_dedupe_horizon_and_quarantine_hold_across_crashes(past: list[Life]) -> None:
    """Copies over two horizons apart are charges of their own, late charges are quarantined and all others counted."""
    with a_bench() as bench:
        history: History = []
        await live(bench, history, past)

        firsts = charges(history)
        assert await bench.log.totals() == recomputed(firsts)
        quarantined = {usage.request_id for _, usage in await bench.log.contents("late", Usage)}
        assert quarantined == {usage.request_id for source, usage in firsts if is_late(source, usage)}


@settings(max_examples=60, deadline=None)
@given(past=lives(NEAR))
async def test_progress_counts_first_copies_across_partitions(past: list[Life]) -> None:
    """A task's done and failed texts are those of the first copies of its usage events, whatever happened."""
    with a_bench() as bench:
        history: History = []
        await live(bench, history, past)

        done: dict[TaskKey, list[int]] = {}
        for _, usage in charges(history):
            counts = done.setdefault(TaskKey(usage.request.tenant_id, usage.request.task_id or ""), [0, 0])
            counts[0] += usage.texts - usage.failed_texts
            counts[1] += usage.failed_texts
        assert {key: [task.done, task.failed] for key, task in (await bench.log.progress()).items()} == done


@pytest.mark.parametrize("crash_at", range(0, 24, 3))
async def test_a_task_of_several_payers_is_counted_as_one(crash_at: int) -> None:
    """Where agents of other owners work for a tenant its task lies in several partitions."""
    with a_bench() as bench:
        places = set()
        for number in range(6):
            owner = PAYERS[-(number % 2)]
            request = a_request(["one", "two"], correlation_id=f"r{number}", task_id="t", agent_owner_id=owner)
            places.add(bench.log.append(Destination("usage", a_usage(request, payer_id=owner))).partition)
        assert places == set(range(PARTITIONS))
        await bench.run(run_length=1, crash_at=crash_at)
        bench.lose_store()
        await bench.run(run_length=1)

        counts = [(task.done, task.failed) for _, task in await bench.log.contents("progress", TaskProgress)]
        assert counts == sorted(counts)
        assert counts[-1] == (12, 0)


async def test_progress_never_goes_back() -> None:
    """Who starts without a store publishes progress once the backlog is folded, crashed on the way or not."""
    with a_bench() as bench:
        history: History = []
        append(bench.log, history, [Event(0, n, 1, 1_000, 0) for n in range(6)])
        await bench.run(run_length=1)
        bench.lose_store()
        await bench.run(run_length=1, crash_at=4)
        await bench.run(run_length=1)

        done = [task.done + task.failed for _, task in await bench.log.contents("progress", TaskProgress)]
        assert done == [12, 12]


@settings(max_examples=60, deadline=None)
@given(before=FAR, after=FAR, quiet_days=st.sampled_from([0, 40, 200]))
async def test_a_rebuild_from_a_log_whose_head_has_expired_changes_no_total(
    before: list[Event], after: list[Event], quiet_days: int
) -> None:
    """A store lost after the head of the log has expired neither forgets a charge nor counts one twice."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, before)
        await bench.run()
        log.now_ms += quiet_days * DAY_MS
        retention_ms = 2 * HORIZON_MS + 30 * DAY_MS
        for partition in range(PARTITIONS):
            young = (
                record.source.offset
                for record in log.after(TOPICS.usage, partition, 0)
                if record.source.append_ms >= log.now_ms - retention_ms
            )
            log.expire(TOPICS.usage, partition, next(young, log.ends[TOPICS.usage, partition]))
        log.compact(TOPICS.totals)
        bench.lose_store()
        for event in after:  # one by one: the aggregator is never thirty days behind
            append(log, history, [event])
            await bench.run()

        assert await log.totals() == recomputed(charges(history))


async def test_a_rebuild_quarantines_no_late_charge_again() -> None:
    """Somebody settles them by hand: what was acknowledged before its offset was committed is not sent once more."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(0, n, 1, 0, HORIZON_MS + 1) for n in range(2)])
        await bench.run()
        bench.lose_store()
        append(log, history, [Event(0, 2, 1, 0, HORIZON_MS + 1)])
        await bench.run()

        quarantined = [usage.request_id for _, usage in await log.contents("late", Usage)]
        assert sorted(quarantined) == sorted(usage.request_id for _, usage in history)


async def test_a_charge_in_a_quiet_partition_is_counted_after_a_rebuild() -> None:
    """Where the whole log but young records has expired, the young ones are charges and not only seen."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        await bench.run()
        partition = history[0][0].partition
        log.expire(TOPICS.usage, partition, 1)
        bench.lose_store()
        append(log, history, [Event(0, 1, 1, 200 * DAY_MS, 0)])
        await bench.run()

        assert await log.totals() == recomputed(history)


async def test_a_log_whose_first_offset_is_no_record_has_lost_none() -> None:
    """Other services may write in transactions: an aborted one at offset 0 is not a head that has expired."""
    with a_bench() as bench:
        log, history = bench.log, History()
        for partition in range(PARTITIONS):
            log.ends[TOPICS.usage, partition] = 1
        append(log, history, [Event(0, 0, 1, 0, 0)])
        log.now_ms += 31 * DAY_MS
        await bench.run()

        assert await log.totals() == recomputed(history)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("run_length", [1, 2, 100])
async def test_order_of_partitions_and_length_of_runs_do_not_matter(order: tuple[int, int], run_length: int) -> None:
    """Totals, progress and ledger are the same in whatever portions the partitions arrive."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(n % 4, n % 3, n % 2, 1_000, 0) for n in range(20)])
        with closing(SqliteStore(bench.path)) as store:
            aggregator = bench.aggregator(store, Steps(None))
            await aggregator.positions([(TOPICS.usage, partition) for partition in order])
            for partition in order:
                records = log.after(TOPICS.usage, partition, 0)
                for start in range(0, len(records), run_length):
                    await aggregator.on_run(
                        Run(FakeLease(TOPICS.usage, partition), records[start : start + run_length])
                    )
            ledger = aggregator.ledger_summary()

        assert await log.totals() == recomputed(charges(history))
        assert ledger.sums.unmatched_tokens == sum(usage.billed.tokens for _, usage in charges(history))


async def test_folding_the_whole_log_twice_changes_nothing() -> None:
    """A run that is fetched again publishes no total, and leaves the ledger and the cursor as they were."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(n % 4, n % 3, 1, 1_000, 0) for n in range(20)])
        once = await bench.run()
        published = len(log.all_of(TOPICS.totals))
        with closing(SqliteStore(bench.path)) as store:
            aggregator = bench.aggregator(store, Steps(None))
            await aggregator.positions([(TOPICS.usage, 0)])
            for partition in range(PARTITIONS):
                lease = FakeLease(TOPICS.usage, partition)
                records = log.after(TOPICS.usage, partition, 0)
                cursor = store.cursor(TOPICS.usage, partition)
                await aggregator.on_run(Run(lease, records))
                await aggregator.on_run(Run(lease, records[:2]))
                assert lease.finished == [record.source.offset for record in (*records, *records[:2])]
                assert store.cursor(TOPICS.usage, partition) == cursor
            assert aggregator.ledger_summary() == once

        assert len(log.all_of(TOPICS.totals)) == published


async def test_a_store_that_is_behind_takes_what_another_published_meanwhile() -> None:
    """A standby with an old store never publishes a bucket at a lower last_offset than is published already."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(n % 4, n, 1, 1_000, 0) for n in range(4)])
        await bench.run()
        assert {source.partition for source, _ in history} == set(range(PARTITIONS))  # one that is empty hides it
        standby = bench.path.with_name("standby.sqlite")
        bench.copy_store(standby)
        append(log, history, [Event(n % 4, n, 1, 1_000, 0) for n in range(8)])
        await bench.run()
        before = len(log.all_of(TOPICS.totals))
        append(log, history, [Event(0, 9, 1, 1_000, 0)])
        await Bench(log, standby).run(run_length=1)

        assert await log.totals() == recomputed(charges(history))
        again = await log.contents("totals", UsageTotal)
        assert len(again) - before == len(recomputed(history[-1:]))


async def test_a_record_that_cannot_be_read_goes_to_the_dlq_and_stops_nothing() -> None:
    """Undecodable bytes on a folded topic are set aside untouched, and their neighbours are folded."""
    with a_bench() as bench:
        log, history = bench.log, History()
        append(log, history, [Event(0, 0, 1, 0, 0)])
        partition = history[0][0].partition
        log.append_bytes(TOPICS.usage, partition, b"not ours", key=b"k")
        append(log, history, [Event(0, 1, 1, 0, 0)])
        await bench.run()

        (letter,) = log.all_of(TOPIC_OF["dlq"])
        assert (letter.key, letter.value) == (b"k", b"not ours")
        assert await log.totals() == recomputed(history)
        assert bench.counts["usage_events", "charged"] == 2


# --- the ledger ------------------------------------------------------------------------------------------


def a_bill(log: MemoryLog, attempt: str, *, tokens: int = 3, outcome: CallOutcome | None = CallOutcome.OK) -> None:
    price: dict[str, Any] = {"price_nanos_per_million": 1_000_000, "attempt_id": attempt}
    log.append(Destination("calls", a_call(estimated_tokens=tokens, confirm_by_ms=log.now_ms + 1_000, **price)))
    if outcome is not None:
        log.append(Destination("calls", a_call(CallKind.RECEIPT, outcome=outcome, billed_tokens=tokens, **price)))


def a_charge(log: MemoryLog, attempt: str, *, number: int = 0, tokens: int = 3) -> None:
    request = a_request(correlation_id=f"r{number}")
    usage = a_usage(request, billed=Amounts(1, tokens, 5, tokens), parts=(Part(attempt, tokens),))
    log.append(Destination("usage", usage))


@pytest.mark.parametrize("order", [("calls", "usage"), ("usage", "calls")])
async def test_each_residual_has_its_class(order: tuple[str, str]) -> None:
    """Bill = attributed + waste + uncharged, and what has no receipt in time lies between 0 and its estimate."""
    with a_bench() as bench:
        log = bench.log
        a_bill(log, "charged")
        a_charge(log, "charged", number=1)
        a_bill(log, "partly charged", tokens=7)
        a_charge(log, "partly charged", number=2, tokens=2)
        a_bill(log, "wasted", tokens=11, outcome=CallOutcome.INVALID)
        a_bill(log, "refused", tokens=0, outcome=CallOutcome.FAILED)
        a_bill(log, "unanswered", tokens=13, outcome=None)
        a_bill(log, "recovered", tokens=17, outcome=None)
        a_charge(log, "recovered", number=3, tokens=16)
        a_charge(log, "elsewhere", number=4, tokens=19)
        folded = [TOPIC_OF[name] for name in order]
        early = await bench.run(order=folded)
        log.now_ms += 2_000
        late = await bench.run(order=folded)

    assert early is not None
    assert late is not None
    assert (early.in_flight_attempts, early.sums.unconfirmed_attempts) == (2, 0)
    assert late.in_flight_attempts == 0
    assert late.sums._asdict() == {
        "attempts": 6,
        "billed_tokens": 3 + 7 + 11,
        "attributed_tokens": 3 + 2 + 16,
        "waste_attempts": 1,
        "waste_tokens": 11,
        "waste_cost_nanos": 11,
        "uncharged_attempts": 1,
        "uncharged_tokens": 5,
        "uncharged_cost_nanos": 5,
        "unconfirmed_attempts": 2,
        "unconfirmed_max_tokens": 13 + 1,
        "unconfirmed_max_cost_nanos": 13 + 1,
        "unpriced_tokens": 0,
        "over_attributed_attempts": 0,
        "over_attributed_tokens": 0,
        "unmatched_tokens": 19,
        "recovered_attempts": 1,
        "recovered_tokens": 16,
    }
    assert late.residual_tokens == 11 + 5 + 14


async def test_no_price_and_bill_of_two_records_end_the_aggregator() -> None:
    """An attempt has its price from one record and its bill from another: each must be one that any sum can hold."""
    greatest: dict[str, Any] = {"price_nanos_per_million": MAX_PRICE, "estimated_tokens": 0}
    bill: dict[str, Any] = {"kind": CallKind.RECEIPT, "billed_tokens": MAX_CALL_TOKENS, "price_nanos_per_million": None}
    with a_bench() as bench:
        for attempt, price, tokens in [("a", 0, 0), ("b", 1, 0), ("c", 0, 1)]:
            intent = greatest | {"price_nanos_per_million": MAX_PRICE + price, "attempt_id": attempt}
            bench.log.append(Destination("calls", a_call(**intent)))
            receipt = bill | {"billed_tokens": MAX_CALL_TOKENS + tokens, "attempt_id": attempt}
            bench.log.append(Destination("calls", a_call(**receipt)))
        summary = await bench.run()
        assert summary is not None
        assert summary.sums.uncharged_cost_nanos == MAX_CALL_TOKENS * MAX_PRICE // 10**6
        assert len(bench.log.all_of(TOPIC_OF["dlq"])) == 2


async def test_an_attempt_that_charged_more_than_its_bill_raises_the_alarm() -> None:
    """Over-attribution is counted, once."""
    with a_bench() as bench:
        a_bill(bench.log, "a", tokens=5)
        a_charge(bench.log, "a", number=1, tokens=3)
        assert (await bench.run()).sums.over_attributed_attempts == 0  # type: ignore[union-attr]
        a_charge(bench.log, "a", number=2, tokens=3)
        summary = await bench.run()

    assert summary is not None
    assert (summary.sums.over_attributed_attempts, summary.sums.over_attributed_tokens) == (1, 1)
    assert bench.counts["ledger_over_attributed_attempts", ""] == 1


@settings(max_examples=60, deadline=None)
@given(
    past=lives(NEAR),
    bills=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.sampled_from(CallOutcome))),
)
async def test_the_ledger_is_that_of_first_copies_and_receipts_across_crashes(
    past: list[Life], bills: list[tuple[int, int, int, CallOutcome]]
) -> None:
    """U6: attributed tokens are the parts of first copies, and the running sums equal a recomputation."""
    with a_bench() as bench:
        history: History = []
        billed: dict[str, tuple[int, CallOutcome]] = {}
        for payer, number, attempt, outcome in bills:
            name = f"a{payer}{number}{attempt}"
            tokens = 0 if outcome is CallOutcome.FAILED else 100
            a_bill(bench.log, name, tokens=tokens, outcome=outcome)
            billed.setdefault(name, (tokens, outcome))
        await live(bench, history, past)
        summary = await bench.run()

    attributed: dict[str, int] = {}
    for _, usage in charges(history):
        for part in usage.parts:
            attributed[part.attempt_id] = attributed.get(part.attempt_id, 0) + part.tokens
    residuals = {name: (tokens - attributed.get(name, 0), outcome) for name, (tokens, outcome) in billed.items()}
    assert summary is not None
    assert summary.sums.attempts == len(billed)
    assert summary.sums.billed_tokens == sum(tokens for tokens, _ in billed.values())
    assert summary.sums.attributed_tokens == sum(attributed.get(name, 0) for name in billed)
    assert summary.sums.unmatched_tokens == sum(n for name, n in attributed.items() if name not in billed)
    assert summary.sums.waste_tokens == sum(
        n for n, outcome in residuals.values() if n > 0 and outcome is CallOutcome.INVALID
    )
    assert summary.sums.uncharged_tokens == sum(
        n for n, outcome in residuals.values() if n > 0 and outcome is not CallOutcome.INVALID
    )
    assert summary.sums.over_attributed_tokens == -sum(n for n, _ in residuals.values() if n < 0)


async def test_a_late_charge_stays_uncharged() -> None:
    """A quarantined charge is attributed to nobody, so its attempt keeps its residual."""
    with a_bench() as bench:
        a_bill(bench.log, "a")
        usage = a_usage(parts=(Part("a", 3),), charged_at_ms=bench.log.now_ms - HORIZON_MS - 1)
        bench.log.append(Destination("usage", usage))
        summary = await bench.run()

        assert summary is not None
        assert (summary.sums.attributed_tokens, summary.sums.uncharged_tokens) == (0, 3)
        assert await bench.log.totals() == {}


# --- a topic that is shared -------------------------------------------------------------------------------


def of_another_service(log: MemoryLog) -> None:
    """A charge of ours, and what another service wrote of one request of its own: input and output."""
    a_bill(log, "a")
    a_charge(log, "a", number=1, tokens=3)
    for word, tokens in ((TokenType.INPUT, 100), (TokenType.OUTPUT, 10), (TokenType.OUTPUT, 11)):
        request = a_request(task_id="t", correlation_id="theirs")
        theirs = a_usage(
            request,
            token_type=word,
            event_key=f"theirs-{word}",
            billed=Amounts(1, tokens, 5, None),
            parts=(Part("theirs", tokens),),
        )
        log.append(Destination("usage", theirs))


async def test_usage_of_other_token_types_is_passed_over() -> None:
    """By default what other services write counts in nothing but a metric."""
    with a_bench() as bench:
        of_another_service(bench.log)
        summary = await bench.run()

        assert {sums.billed_tokens for sums in (await bench.log.totals()).values()} == {3}
        assert await bench.log.progress() == {}
        assert summary is not None
        assert (summary.sums.attributed_tokens, summary.sums.unmatched_tokens) == (3, 0)
        assert bench.counts["usage_events", "other"] == 3
        assert bench.counts["usage_events", "charged"] == 1


@pytest.mark.parametrize(
    "token_types, tokens", [(None, 113), (frozenset({"input"}), 100), (frozenset({"embedding", "output"}), 13)]
)
async def test_token_types_that_are_named_are_totalled(token_types: frozenset[str] | None, tokens: int) -> None:
    """First copies by their idempotency key, which two events of one request need not share; never in our ledger."""
    with a_bench() as bench:
        bench.token_types = token_types
        of_another_service(bench.log)
        summary = await bench.run()

        totals = await bench.log.totals()
        assert {s.billed_tokens for key, s in totals.items() if key.dimension in ("all", "model")} == {tokens}
        assert await bench.log.progress() == {}
        assert summary is not None
        assert summary.sums.unmatched_tokens == 0


# --- upkeep ----------------------------------------------------------------------------------------------


async def pruned(bench: Bench, store: SqliteStore, *, minutes: int = 256) -> tuple[Aggregator, LedgerSummary]:
    """The aggregator once all is folded and a part was pruned each minute, by default all; its ledger before that."""
    aggregator = bench.aggregator(store, Steps(None))
    places = [(topic, partition) for topic in (TOPICS.usage, TOPICS.calls) for partition in range(PARTITIONS)]
    await aggregator.positions(places)
    for topic, partition in places:
        if records := bench.log.after(topic, partition, 0):
            await aggregator.on_run(Run(FakeLease(topic, partition), records))
    summary = aggregator.ledger_summary()
    for _ in range(minutes):
        bench.clock.now_s += 61
        await aggregator.on_run(Run(FakeLease(TOPICS.usage, 0), []))
    return aggregator, summary


async def test_no_clock_of_ours_makes_an_attempt_old() -> None:
    """Where it stands a year ahead, an attempt that may still be charged is kept."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        a_bill(bench.log, "young", tokens=5, outcome=None)
        bench.clock.now_s = 365 * DAY_MS / 1000
        await pruned(bench, store)
        assert len(store.open_attempts()) == 1


async def test_a_partition_whose_records_have_all_expired_holds_up_no_pruning() -> None:
    """It is no backlog: nothing of it will ever be folded."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log = bench.log
        a_bill(log, "old", tokens=5, outcome=None)
        append(log, [], [Event(0, 0, 1, 72 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        for partition in range(PARTITIONS):
            if not log.after(TOPICS.usage, partition, 0):
                log.begins[TOPICS.usage, partition] = log.ends[TOPICS.usage, partition] = 5
        await pruned(bench, store)
        assert store.open_attempts() == []


async def test_an_attempt_whose_charges_are_in_a_backlog_is_not_forgotten() -> None:
    """However old it is: nothing is judged by the clock while charges are still to be read."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log = bench.log
        a_bill(log, "a")
        a_charge(log, "a")
        log.now_ms += 72 * DAY_MS
        bench.clock.now_s = 72 * DAY_MS / 1000
        a_bill(log, "b", outcome=None)
        aggregator = bench.aggregator(store, Steps(None))
        places = [(topic, partition) for topic in (TOPICS.calls, TOPICS.usage) for partition in range(PARTITIONS)]
        await aggregator.positions(places)
        for topic, partition in places:
            if topic == TOPICS.usage:
                for _ in range(256):
                    bench.clock.now_s += 61
                    await aggregator.on_run(Run(FakeLease(topic, partition), []))
            if records := log.after(topic, partition, 0):
                await aggregator.on_run(Run(FakeLease(topic, partition), records))
        sums = aggregator.ledger_summary().sums
        assert (sums.attributed_tokens, sums.uncharged_tokens, sums.unmatched_tokens) == (3, 0, 0)


async def test_a_charge_that_is_read_before_its_call_is_not_forgotten() -> None:
    """The ledger of calls may be behind: what a charge names is as young as the charge."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        a_charge(bench.log, "a")
        aggregator, before = await pruned(bench, store)
        assert before.sums.unmatched_tokens == 3
        a_bill(bench.log, "a")
        for partition in range(PARTITIONS):
            if records := bench.log.after(TOPICS.calls, partition, 0):
                await aggregator.on_run(Run(FakeLease(TOPICS.calls, partition), records))
        sums = aggregator.ledger_summary().sums
        assert (sums.attributed_tokens, sums.uncharged_tokens, sums.unmatched_tokens) == (3, 0, 0)


async def test_a_process_that_never_lives_long_forgets_all_that_is_old() -> None:
    """Started again every hour, it comes to every part of the keys within a day."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        for number in range(20):
            a_bill(bench.log, str(uuid.uuid5(uuid.NAMESPACE_OID, str(number))), outcome=None)
        append(bench.log, [], [Event(0, 0, 1, 72 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        for _ in range(24):
            await pruned(bench, store, minutes=60)
        assert store.open_attempts() == []


async def test_pruning_forgets_only_what_no_copy_can_repeat() -> None:
    """Old keys and attempts go, the ledger keeps their sums, and a copy within two horizons is still a duplicate."""
    with a_bench() as bench, closing(SqliteStore(bench.path)) as store:
        log, history = bench.log, History()
        a_bill(log, "old", tokens=5, outcome=None)
        append(log, history, [Event(0, 0, 1, 0, 0), Event(0, 1, 1, 2 * DAY_MS, 0), Event(0, 2, 1, 70 * DAY_MS, 0)])
        bench.clock.now_s = 72 * DAY_MS / 1000
        aggregator, summary = await pruned(bench, store)

        partition = history[0][0].partition
        kept = store.seen(partition, [usage.request_id for _, usage in history])
        assert set(kept) == {history[1][1].request_id, history[2][1].request_id}
        assert store.open_attempts() == []
        assert aggregator.ledger_summary() == summary
        assert summary.sums.unconfirmed_max_tokens == 5
