"""The aggregator over its real store and a log in memory: totals and progress, at whatever moment it ends."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import given, settings

from processor.accounts import TaskKey, TaskProgress
from processor.adapters.sqlite_store import SqliteStore
from processor.domain import Amounts, Part, Source, TokenType, Usage
from processor.ports import Destination, Run
from tests.support.aggregation import (
    PARTITIONS,
    PAYERS,
    TOPIC_OF,
    TOPICS,
    Event,
    History,
    MemoryLog,
    Steps,
    a_bench,
    a_bill,
    a_charge,
    append,
    charges,
    is_late,
    recomputed,
)
from tests.support.builders import a_request, a_usage
from tests.support.lives import FAR, NEAR, Life, live, lives
from tests.support.steps import FakeLease


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
