"""The pure parts of the fold: which buckets, which sums, whose version stands."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.accounts import BucketKey, Cursor, Ledger, TaskKey, UsageSums
from processor.aggregate import (
    UsageState,
    buckets_of,
    copy_of,
    fold_usage,
    newest_totals,
    seen_only_until,
    sums_as_tuple,
    sums_of,
    total_of,
)
from processor.domain import Amounts, Usage
from tests.support.aggregation import DAY_MS, HORIZON_MS
from tests.support.builders import NOW_MS, a_request, a_usage

NOTHING = UsageState({}, {}, {}, {}, Ledger())


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def fold(*usages: Usage, state: UsageState = NOTHING) -> dict[BucketKey, UsageSums]:
    """The totals after these charges, all appended now, at offsets 0, 1, ..."""
    folded = fold_usage(
        [copy_of(usage, offset, NOW_MS) for offset, usage in enumerate(usages)],
        state,
        partition=0,
        seen_only_until_ms=None,
        horizon_ms=HORIZON_MS,
        now_ms=NOW_MS,
    )
    return {total.key: total_of(total.partitions) for total in folded.totals}


@pytest.mark.parametrize(
    "gaps_ms, charged",
    [
        ([0, 2 * HORIZON_MS], 1),
        ([0, 2 * HORIZON_MS + 1], 2),
        ([0, 2 * HORIZON_MS, 2 * HORIZON_MS], 1),
        ([0, -50, 2 * HORIZON_MS + 50], 1),
        ([0, -50, 2 * HORIZON_MS + 51], 2),
    ],
)
def test_a_copy_is_one_for_two_horizons_after_the_newest_before_it(gaps_ms: list[int], charged: int) -> None:
    """To the millisecond, and by the greatest append time: that of a new partition leader may step back."""
    times = [NOW_MS + gap_ms for gap_ms in accumulate(gaps_ms)]
    copies = [copy_of(a_usage(charged_at_ms=at_ms), offset, at_ms) for offset, at_ms in enumerate(times)]
    folded = fold_usage(copies, NOTHING, partition=0, seen_only_until_ms=None, horizon_ms=HORIZON_MS, now_ms=NOW_MS)
    assert (folded.first, folded.duplicates) == (charged, len(gaps_ms) - charged)


@pytest.mark.parametrize("age_ms, late", [(HORIZON_MS, 0), (HORIZON_MS + 1, 1)])
def test_a_charge_is_late_beyond_the_horizon(age_ms: int, late: int) -> None:
    """To the millisecond, as the SQL has it."""
    copies = [copy_of(a_usage(charged_at_ms=NOW_MS - age_ms), 0, NOW_MS)]
    folded = fold_usage(copies, NOTHING, partition=0, seen_only_until_ms=None, horizon_ms=HORIZON_MS, now_ms=NOW_MS)
    assert (len(folded.late), bool(folded.totals)) == (late, not late)


@pytest.mark.parametrize(
    "charged_at, day, month",
    [
        ("2026-02-28T23:59:59.999", "2026-02-28", "2026-02"),
        ("2026-03-01T00:00:00.000", "2026-03-01", "2026-03"),
        ("2025-12-31T23:59:59.999", "2025-12-31", "2025-12"),
        ("1970-01-01T00:00:00.000", "1970-01-01", "1970-01"),
    ],
)
def test_a_charge_counts_in_the_utc_day_and_month_of_its_time(charged_at: str, day: str, month: str) -> None:
    """The bucket goes by the time of charge alone, in UTC."""
    usage = a_usage(charged_at_ms=at(charged_at))
    assert {key.bucket for key in buckets_of(usage)} == {day, month}


def test_a_charge_counts_once_in_each_dimension_that_it_has() -> None:
    """Dimensions are all, model and operation, and agent and collection where the request names one, even empty."""
    request = a_request(tenant_id="acme", agent_id="helper", agent_owner_id="owner", collection="")
    named = buckets_of(a_usage(request, charged_at_ms=at("2026-11-21T00:00:00")))
    assert [key for key in named if key.bucket == "2026-11"] == [
        BucketKey("owner", "2026-11", "all", ""),
        BucketKey("owner", "2026-11", "model", "text-embedding-3-small"),
        BucketKey("owner", "2026-11", "operation", "document"),
        BucketKey("owner", "2026-11", "agent", "helper"),
        BucketKey("owner", "2026-11", "collection", ""),
    ]
    unnamed = buckets_of(a_usage(a_request(collection=None)))
    assert {key.dimension for key in unnamed} == {"all", "model", "operation"}


def test_the_sums_of_two_charges_are_added_field_by_field() -> None:
    """Every figure of a charge reaches the figure of its bucket that bears its name."""
    usages = [
        a_usage(
            a_request(correlation_id=name),
            billed=Amounts(1 * n, 2 * n, 3 * n, 5 * n),
            saved=Amounts(7 * n, 11 * n, 13 * n, 17 * n),
            failed_texts=19 * n,
            cached_texts=23 * n,
        )
        for name, n in [("one", 1), ("ten", 10)]
    ]
    assert set(fold(*usages).values()) == {
        UsageSums(
            requests=2,
            billed_texts=11,
            billed_tokens=22,
            billed_characters=33,
            billed_cost_nanos=55,
            saved_texts=77,
            saved_tokens=121,
            saved_characters=143,
            saved_cost_nanos=187,
            unpriced_tokens=0,
            failed_texts=209,
            cached_texts=253,
        )
    }


def test_tokens_without_a_price_are_summed_apart() -> None:
    """No price is not a price of zero: its tokens are counted as unpriced besides, a price of zero is not."""
    unpriced = a_usage(a_request(correlation_id="a"), billed=Amounts(1, 5, 5, None))
    free = a_usage(a_request(correlation_id="b"), billed=Amounts(1, 7, 7, 0))
    priced = a_usage(a_request(correlation_id="c"), billed=Amounts(1, 11, 11, 220))
    (sums,) = set(fold(unpriced, free, priced).values())
    assert (sums.billed_tokens, sums.unpriced_tokens, sums.billed_cost_nanos) == (23, 5, 220)


def test_a_bucket_that_is_ahead_takes_only_what_is_above_its_last_offset() -> None:
    """Totals that came from the topic already hold the charges up to their last_offset."""
    usages = [a_usage(a_request(correlation_id=f"r{n}")) for n in range(4)]
    known = {key: {0: (2, UsageSums(requests=3)), 1: (9, UsageSums(requests=5))} for key in buckets_of(usages[0])}
    sums = set(fold(*usages, state=UsageState({}, known, {}, {}, Ledger())).values())
    assert {each.requests for each in sums} == {3 + 5 + 1}


@given(
    charged=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), max_size=12),
    ahead=st.lists(st.integers(-1, 13), min_size=6, max_size=6),
)
def test_charges_folded_together_are_those_folded_one_by_one(charged: list[tuple[str, str]], ahead: list[int]) -> None:
    """Whatever run a charge comes in, and however far each of its buckets is ahead: the totals are the same."""
    usages = [
        a_usage(a_request(tenant_id=payer, correlation_id=f"r{n}", collection=collection))
        for n, (payer, collection) in enumerate(charged)
    ]
    buckets = sorted({key for usage in usages for key in buckets_of(usage)})
    known = {
        key: {0: (offset, UsageSums(requests=100))}
        for key, offset in zip(buckets, ahead * len(buckets), strict=False)
        if offset >= 0
    }
    expected = {key: partitions[0] for key, partitions in known.items()}
    for offset, usage in enumerate(usages):
        for key in buckets_of(usage):
            last_offset, sums = expected.get(key, (-1, UsageSums()))
            if offset > last_offset:
                added = (have + more for have, more in zip(sums_as_tuple(sums), sums_of(usage), strict=True))
                expected[key] = (offset, UsageSums(*added))
    folded = fold_usage(
        [copy_of(usage, offset, NOW_MS) for offset, usage in enumerate(usages)],
        UsageState({}, known, {}, {}, Ledger()),
        partition=0,
        seen_only_until_ms=None,
        horizon_ms=HORIZON_MS,
        now_ms=NOW_MS,
    )
    changed = {total.key: total.partitions[0] for total in folded.totals}
    assert {key: partitions[0] for key, partitions in known.items()} | changed == expected
    assert all(known.get(key, {}).get(0) != value for key, value in changed.items())


def test_of_published_versions_the_highest_offset_stands_per_partition() -> None:
    """A version that is published again later does not take a reader back."""
    old = {0: (5, UsageSums(requests=3)), 1: (2, UsageSums(requests=1))}
    new = {0: (9, UsageSums(requests=7))}
    for versions in [(old, new), (new, old), (old, new, old)]:
        assert total_of(newest_totals(*versions)) == UsageSums(requests=8)


def test_a_task_keeps_the_largest_total_that_was_named() -> None:
    """Progress counts texts done and failed; its total does not depend on the order of events."""
    usages = [
        a_usage(a_request(["a", "b", "c"], correlation_id=f"r{n}", task_id="t", task_total=total), failed_texts=n)
        for n, total in enumerate([None, 9, 6, None])
    ]
    for ordered in (usages, usages[::-1]):
        folded = fold_usage(
            [copy_of(usage, offset, NOW_MS) for offset, usage in enumerate(ordered)],
            NOTHING,
            partition=0,
            seen_only_until_ms=None,
            horizon_ms=HORIZON_MS,
            now_ms=NOW_MS,
        )
        task = folded.tasks[TaskKey("acme", "t")]
        assert (task.done, task.failed, task.total) == (6, 6, 9)


def test_only_the_head_of_a_log_that_has_lost_records_is_seen_and_not_counted() -> None:
    """From offset 0 everything counts; else two horizons from the first record, and never the last thirty days."""

    def until(cursor: Cursor | None, offset: int, age_days: int) -> int | None:
        return seen_only_until(cursor, offset, NOW_MS - age_days * DAY_MS, horizon_ms=HORIZON_MS, now_ms=NOW_MS)

    assert until(None, 0, 400) is None
    assert until(None, 7, 110) == NOW_MS - 40 * DAY_MS
    assert until(None, 7, 0) == NOW_MS - 30 * DAY_MS
    assert until(Cursor(7, 6, 0, 0, None), 7, 110) is None
    assert until(Cursor(7, 6, 0, 0, 1_234), 7, 110) == 1_234


def test_progress_counts_where_charges_are_only_seen() -> None:
    """No topic gives a lost store its tasks back: what is retained of them counts, each request once."""
    usage = a_usage(a_request(["a", "b", "c"], task_id="t"))
    folded = fold_usage(
        [copy_of(usage, offset, NOW_MS) for offset in (7, 9)],
        NOTHING,
        partition=0,
        seen_only_until_ms=NOW_MS,
        horizon_ms=HORIZON_MS,
        now_ms=NOW_MS,
    )
    assert folded.totals == []
    assert folded.tasks[TaskKey("acme", "t")].done == 3
