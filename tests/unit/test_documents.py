"""Manifests: what vanished is deleted from the sink view, and nothing that is there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processor.adapters.sqlite_store import SqliteStore
from processor.documents import UNKNOWN, fold_manifest, tombstones
from processor.domain import MAX_MANIFEST_VECTORS, DocumentManifest
from processor.identity import vector_id
from processor.ports import Destination, Run
from tests.support.aggregation import PARTITIONS, TOPIC_OF, TOPICS, Bench, MemoryLog, Steps
from tests.support.steps import FakeLease

OLD, NEW = "a@1/8/l2", "b@1/8/l2"


def version(number: int) -> str:
    return f"{number:013d}-00000-{number:019d}"


def a_manifest(
    chunks: str, number: int, *, spaces: Sequence[str] = (OLD,), document: str = "doc-1"
) -> DocumentManifest:
    """A manifest whose chunk ids are the letters of `chunks`."""
    return DocumentManifest(
        tenant_id="acme",
        collection=None,
        document_id=document,
        chunk_ids=tuple(chunks),
        vector_spaces=tuple(spaces),
        source_version=version(number),
        request_id=f"request-{number}",
    )


def ids(chunks: str, *, spaces: Sequence[str] = (OLD,), document: str = "doc-1") -> set[str]:
    return {vector_id("acme", None, document, chunk, space) for chunk in chunks for space in spaces}


@contextmanager
def a_bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as directory:
        yield Bench(MemoryLog(), Path(directory) / "store.sqlite")


def publish(log: MemoryLog, *manifests: DocumentManifest) -> None:
    for manifest in manifests:
        log.append(Destination("documents", manifest))


@pytest.mark.parametrize(
    "before, after, gone",
    [
        (a_manifest("abc", 1), a_manifest("bcd", 2), ids("a")),
        (a_manifest("abc", 1), a_manifest("", 2), ids("abc")),
        (a_manifest("", 1), a_manifest("abc", 2), set()),
        (a_manifest("ab", 1), a_manifest("ab", 2), set()),
        (a_manifest("ab", 1, spaces=[OLD]), a_manifest("bc", 2, spaces=[NEW]), ids("ab", spaces=[OLD])),
        (
            a_manifest("ab", 1, spaces=[OLD, NEW]),
            a_manifest("b", 2, spaces=[NEW]),
            ids("ab", spaces=[OLD]) | ids("a", spaces=[NEW]),
        ),
    ],
)
def test_what_vanished_is_previous_ids_by_spaces_without_the_new_ones(
    before: DocumentManifest, after: DocumentManifest, gone: set[str]
) -> None:
    """(previous ids x previous spaces) minus (new ids x new spaces) is deleted at the new source version."""
    stones = tombstones(fold_manifest(fold_manifest(UNKNOWN, before), after))
    assert {stone.vector_id for stone in stones} == gone
    assert {stone.source_version for stone in stones} <= {version(2)}


def test_an_older_manifest_changes_nothing() -> None:
    """A manifest that is not newer by source_version is ignored, also when it comes later."""
    newest = fold_manifest(UNKNOWN, a_manifest("ab", 2))
    assert fold_manifest(newest, a_manifest("abc", 1)) is newest
    assert fold_manifest(newest, a_manifest("c", 2)) is newest


async def test_a_change_is_followed_by_its_tombstones() -> None:
    """The aggregator deletes what the next manifest of a document drops, once."""
    with a_bench() as bench:
        for manifest in (a_manifest("abc", 1), a_manifest("ab", 2), a_manifest("ab", 3)):
            publish(bench.log, manifest)
            await bench.run()

        assert bench.log.tombstones() == [(vector, version(2)) for vector in ids("c")]


async def test_a_backlog_is_folded_to_the_newest_manifest_first() -> None:
    """A chunk removed and added again within the backlog is not deleted, one removed for good is."""
    with a_bench() as bench:
        publish(bench.log, a_manifest("abc", 1))
        await bench.run(run_length=1)
        publish(bench.log, a_manifest("a", 2), a_manifest("ab", 3))
        await bench.run(run_length=1)

        assert {vector for vector, _ in bench.log.tombstones()} == ids("c")


async def test_a_rebuild_deletes_nothing_that_was_acted_on_before() -> None:
    """A store lost after its deletes were committed does not repeat them: the chunk may be back since."""
    with a_bench() as bench:
        publish(bench.log, a_manifest("ab", 1))
        await bench.run(run_length=1)
        publish(bench.log, a_manifest("a", 2))
        await bench.run(run_length=1)
        deleted_once = bench.log.tombstones()
        bench.lose_store()
        await bench.run(run_length=1)

        assert deleted_once == [(vector, version(2)) for vector in ids("b")]
        assert bench.log.tombstones() == deleted_once


async def test_a_rebuild_holds_back_only_what_nobody_acted_on_before() -> None:
    """Of a long topic that is read again no more is kept than its records since the commit."""
    with a_bench() as bench, closing(SqliteStore(bench.path.with_name("other.sqlite"))) as store:
        log = bench.log
        publish(log, a_manifest("abc", 1), a_manifest("ab", 2), a_manifest("a", 3))
        await bench.run()
        publish(log, a_manifest("", 4), a_manifest("c", 5))
        partition = next(number for number in range(PARTITIONS) if log.after(TOPICS.documents, number, 0))
        records = log.after(TOPICS.documents, partition, 0)
        lease = FakeLease(TOPICS.documents, partition)
        aggregator = bench.aggregator(store, Steps(None))
        await aggregator.positions([(TOPICS.documents, partition)])
        await aggregator.on_run(Run(lease, records[:4]))
        assert lease.finished == [0, 1, 2]
        await aggregator.on_run(Run(lease, records[4:]))
        assert lease.finished == [0, 1, 2, 3, 4]


async def test_a_rebuild_from_the_compacted_topic_still_finds_what_the_next_manifest_drops() -> None:
    """The newest manifest of each document is enough to go on from."""
    with a_bench() as bench:
        publish(bench.log, a_manifest("ab", 1), a_manifest("bc", 2), a_manifest("x", 1, document="doc-2"))
        await bench.run()
        bench.log.compact(TOPICS.documents)
        bench.lose_store()
        publish(bench.log, a_manifest("c", 3))
        before = len(bench.log.tombstones())
        await bench.run()

        assert [vector for vector, _ in bench.log.tombstones()[before:]] == list(ids("b"))


@settings(max_examples=80, deadline=None)
@given(
    lives=st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(["d1", "d2"]), st.text("abcd", max_size=3)), max_size=4),
            st.one_of(st.none(), st.integers(0, 12)),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
async def test_whatever_happens_the_dropped_are_deleted_and_the_live_stay(
    lives: list[tuple[list[tuple[str, str]], int | None, bool]],
) -> None:
    """After any crash or lost store each id that a document once had and has no more was deleted after it was dropped,
    and none that its newest manifest at that time held."""
    with a_bench() as bench:
        log = bench.log
        manifests: dict[str, list[set[str]]] = {"d1": [set()], "d2": [set()]}
        number = 0
        for coming, crash_at, lose in lives:
            for document, chunks in coming:
                number += 1
                publish(log, a_manifest("".join(set(chunks)), number, document=document))
                manifests[document].append(ids(chunks, document=document))
            await bench.run(crash_at=crash_at, run_length=1)
            held = manifests["d1"][-1] | manifests["d2"][-1]
            now_deleted = {
                (record.key or b"").decode()
                for record in log.all_of(TOPIC_OF["sink"])
                if record.source.append_ms == log.now_ms
            }
            assert not held & now_deleted
            log.now_ms += 1
            if lose:
                bench.lose_store()
        await bench.run(run_length=1)

        stones = {vector for vector, _ in log.tombstones()}
        assert stones >= {vector for held in manifests.values() for vector in set().union(*held[:-1]) - held[-1]}


async def test_a_manifest_of_too_many_vectors_holds_nobody_up() -> None:
    """Whoever wrote it: to derive the ids of millions would take the aggregator's time and memory."""
    with a_bench() as bench:
        spaces = tuple(map(str, range(MAX_MANIFEST_VECTORS // 2)))
        publish(bench.log, a_manifest("ab", 1), a_manifest("abc", 2, spaces=spaces), a_manifest("b", 3))
        await bench.run()
        assert {stone for stone, _ in bench.log.tombstones()} == ids("a")
        assert len(bench.log.all_of(TOPIC_OF["dlq"])) == 1


async def test_offsets_committed_of_a_topic_that_is_no_more_hide_no_delete() -> None:
    """A mirror may bring them: beyond the end they say nothing of what was acted on."""
    with a_bench() as bench:
        for partition in range(PARTITIONS):
            bench.log.commits[TOPICS.documents, partition] = 50
        publish(bench.log, a_manifest("ab", 1))
        await bench.run()
        publish(bench.log, a_manifest("b", 2))
        await bench.run()
        assert {stone for stone, _ in bench.log.tombstones()} == ids("a")
