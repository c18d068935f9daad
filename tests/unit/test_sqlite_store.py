"""The aggregator's store: all or nothing, one owner, few bytes an event, and messages that say what to do."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processor.accounts import (
    Attempt,
    BucketKey,
    Cursor,
    DocumentKey,
    DocumentVectors,
    Ledger,
    Seen,
    TaskKey,
    TaskProgress,
    UsageSums,
    UsageTotal,
)
from processor.adapters.sqlite_store import SqliteStore, pack_id
from processor.domain import CallOutcome
from processor.errors import StoreError, StoreTaken
from processor.ports import StoreChange

TOPIC = "token-usage"
OTHER = BucketKey("acme", "2026-11", "all", "")
KEY = BucketKey("acme", "2026-11", "model", 'a"b,c')
CURSOR = Cursor(8, 7, 1_000, 0xFFFFFFFF, None)


def a_total(last_offset: int, tokens: int, partition: int = 1) -> UsageTotal:
    return UsageTotal(key=KEY, partitions={partition: (last_offset, UsageSums(billed_tokens=tokens))}, updated_at_ms=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a b#c?.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(path)) as store:
        store.claim()
        yield store


def full_change() -> StoreChange:
    """One of everything."""
    task = TaskProgress(tenant_id="acme", task_id="t", done=1, failed=2, total=None, updated_at_ms=5)
    return StoreChange(
        topic=TOPIC,
        partition=1,
        cursor=CURSOR,
        seen={"not a uuid": Seen(7, 1_000), str(uuid.UUID(int=5)): Seen(3, 900)},
        totals=[a_total(7, 40)],
        tasks={TaskKey("acme", "t"): task},
        tasks_published=False,
        attempts={
            "attempt": Attempt(5, 6, 7, 8, CallOutcome.INVALID, 9, 10),
            "open": Attempt(5, confirm_by_ms=6),
            "charged only": Attempt(5, attributed_tokens=6),
        },
        ledger=Ledger(attempts=2, waste_tokens=3),
        documents={
            DocumentKey("acme", None, "d"): DocumentVectors("v1", frozenset({b"x" * 16}), frozenset({b"y" * 16}))
        },
    )


def check_full(store: SqliteStore) -> None:
    change = full_change()
    assert store.cursor(TOPIC, 1) == CURSOR
    assert store.seen(1, [*change.seen, "unknown"]) == change.seen
    assert store.seen(2, list(change.seen)) == {}
    assert store.totals([KEY]) == {KEY: {1: (7, UsageSums(billed_tokens=40))}}
    assert store.tasks([*change.tasks, TaskKey("acme", "u")]) == change.tasks
    assert store.unpublished_tasks() == change.tasks
    assert store.attempts([*change.attempts, "unknown"]) == change.attempts
    assert store.open_attempts() == [change.attempts["open"]]
    assert store.ledger() == change.ledger
    assert store.documents(list(change.documents)) == change.documents
    assert store.stale_documents(1) == change.documents
    assert store.stale_documents(0) == {}


def test_what_is_saved_is_read_again(store: SqliteStore, path: Path) -> None:
    """A change is there as it was given, also for another process that only looks."""
    store.save(full_change())
    check_full(store)
    with closing(SqliteStore(path, read_only=True)) as looking:
        check_full(looking)


def test_nothing_asked_for_is_nothing(store: SqliteStore) -> None:
    """Empty questions have empty answers."""
    answers = [store.seen(0, []), store.totals([]), store.tasks([]), store.attempts([]), store.documents([])]
    assert answers == [{}] * 5


def test_many_keys_are_found(store: SqliteStore) -> None:
    """More keys than one statement takes are looked up in several."""
    seen = {f"request-{number}": Seen(number, 1) for number in range(1_234)}
    store.save(StoreChange(topic=TOPIC, partition=0, cursor=CURSOR, seen=seen))
    assert store.seen(0, list(seen)) == seen


def test_a_change_that_fails_leaves_nothing(store: SqliteStore) -> None:
    """A save is all or nothing."""
    with pytest.raises(StoreError, match="EMBEDDING_AGGREGATOR_STORE"):
        store.save(StoreChange(topic=TOPIC, partition=1, cursor=CURSOR, seen={"r": Seen(1, None)}))  # type: ignore[arg-type]
    assert store.cursor(TOPIC, 1) is None


def test_only_the_last_to_claim_can_save(store: SqliteStore, path: Path) -> None:
    """Whoever claimed the store before can change nothing any more."""
    with closing(SqliteStore(path)) as successor:
        successor.claim()
        with pytest.raises(StoreTaken):
            store.save(full_change())
        with pytest.raises(StoreTaken):
            store.merge_totals([a_total(1, 1)])
        successor.save(full_change())
        check_full(successor)


def test_of_published_totals_the_higher_offset_stands(store: SqliteStore) -> None:
    """Merging takes a partition's sums only from a higher last_offset."""
    store.save(StoreChange(topic=TOPIC, partition=1, cursor=CURSOR, totals=[a_total(7, 40)]))
    store.merge_totals([a_total(6, 30), a_total(3, 1, partition=0)])
    store.merge_totals([a_total(7, 99)])
    assert store.totals([KEY])[KEY] == {1: (7, UsageSums(billed_tokens=40)), 0: (3, UsageSums(billed_tokens=1))}
    store.merge_totals([a_total(9, 50)])
    assert store.totals([KEY])[KEY][1] == (9, UsageSums(billed_tokens=50))


def test_forgotten_totals_are_gone(store: SqliteStore) -> None:
    """The bucket in every partition, and no other."""
    other = UsageTotal(key=OTHER, partitions={1: (5, UsageSums())}, updated_at_ms=1)
    store.merge_totals([a_total(6, 30), a_total(3, 1, partition=0), other])
    store.forget_totals([])
    store.forget_totals([KEY])
    assert store.totals([KEY, OTHER]) == {OTHER: {1: (5, UsageSums())}}


def test_payers_of_a_bucket_are_those_with_a_total_of_all(store: SqliteStore) -> None:
    """Each payer once, whatever its id looks like; not those of another bucket or dimension."""
    odd = 'a"b,"2026-11","all",""]'
    keys = [
        BucketKey("acme", "2026-11", "all", ""),
        BucketKey(odd, "2026-11", "all", ""),
        BucketKey("day", "2026-11-21", "all", ""),
        BucketKey("model", "2026-11", "model", "all"),
        BucketKey("before", "2026-10", "all", ""),
    ]
    store.merge_totals(
        [UsageTotal(key=k, partitions={0: (1, UsageSums()), 1: (2, UsageSums())}, updated_at_ms=1) for k in keys]
    )
    assert (store.payers("2026-11"), store.payers("2026-12")) == ({"acme", odd}, set())


def test_the_greatest_and_the_least_retained_offsets_are_told_with_their_buckets(store: SqliteStore) -> None:
    """A least one below the begin of the log can't be looked at, the greatest is told in any case."""
    other = UsageTotal(key=OTHER, partitions={1: (2, UsageSums())}, updated_at_ms=1)
    store.merge_totals([a_total(6, 30), a_total(3, 1, partition=0), other])
    assert store.counted({}) == {(1, 6): {KEY}, (0, 3): {KEY}}
    assert store.counted({1: 2, 0: 4}) == {(1, 6): {KEY}, (1, 2): {OTHER}, (0, 3): {KEY}}


def test_the_partition_count_is_remembered(store: SqliteStore) -> None:
    """The first count stands."""
    assert [store.bind(TOPIC, 8), store.bind(TOPIC, 9), store.bind("other", 9)] == [8, 8, 9]


def test_a_file_that_is_no_store_is_refused_with_what_to_do(path: Path) -> None:
    """Damage and foreign versions name the file and the way out."""
    path.write_bytes(b"no database" * 1_000)
    with pytest.raises(StoreError, match=r"SQLITE_NOTADB.*delete it and start again"):
        SqliteStore(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match=r"schema version 7.*delete the file"):
        SqliteStore(path)


def test_there_is_nothing_to_look_at_before_the_aggregator_ran(path: Path) -> None:
    """A reader makes no store."""
    with pytest.raises(StoreError, match="start the aggregator first"):
        SqliteStore(path, read_only=True)
    assert not path.exists()


@example("--345678-9abc-def0-1234-56789abcdef0", "12345678-9abc-def0-1234-56789abcde--")
@example("--012345-0123-0123-0123-0123456789ab", "0123--45-0123-0123-0123-0123456789ab")
@given(first=st.text(max_size=40) | st.uuids().map(str), second=st.text(max_size=40) | st.uuids().map(str))
def test_different_ids_have_different_blobs(first: str, second: str) -> None:
    """Packing is one to one: a UUID in another spelling is another id."""
    for one, other in [(first, second), (first, first.upper()), (first, f"{{{first}}}")]:
        assert (pack_id(one) == pack_id(other)) == (one == other)


def test_a_usage_event_takes_few_bytes(store: SqliteStore, path: Path) -> None:
    """At most 100 bytes on disk for each request seen, whatever the order of their ids."""
    count = 20_000
    for start in range(0, count, 1_000):
        seen = {
            str(uuid.uuid5(uuid.NAMESPACE_URL, str(n))): Seen(10**9 + n, 1_790_000_000_000)
            for n in range(start, start + 1_000)
        }
        store.save(StoreChange(topic=TOPIC, partition=7, cursor=CURSOR, seen=seen))
    store.close()
    assert path.stat().st_size / count < 100


def test_a_task_that_moved_long_ago_is_forgotten(store: SqliteStore) -> None:
    """Tenants name as many as they like; one that moved since stays."""
    old, young = (
        TaskProgress(tenant_id="acme", task_id=name, done=1, failed=0, total=None, updated_at_ms=at_ms)
        for name, at_ms in (("old", 4), ("young", 5))
    )
    tasks = {TaskKey(task.tenant_id, task.task_id): task for task in (old, young)}
    store.save(StoreChange(topic="usage", partition=0, cursor=Cursor(1, 0, 0, 0), tasks=tasks))
    for part in range(2):
        store.prune(seen_before_ms={}, before_ms=5, part=part, parts=2, close=lambda ledger, _: ledger)
    assert list(store.tasks(tasks)) == [TaskKey("acme", "young")]
