"""A record that ends processes is found; nothing else is ever called lethal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.suspicion import ALONE, CLEAN, MOVED, OPEN, WAITING, Suspicion

MARKS = st.sampled_from([CLEAN, MOVED, OPEN, ALONE, WAITING])


def test_a_record_that_always_ends_the_process_is_lethal_after_five_lives() -> None:
    """Three unclean ends isolate the partition, two more while the record ran alone make it lethal."""
    suspicion, lives = Suspicion().taken_over(), 1
    while not suspicion.lethal:
        if suspicion.isolated:
            suspicion = suspicion.running_alone(waiting=False)
        suspicion = Suspicion.parse(str(suspicion)).taken_over()
        lives += 1
    assert lives == 6


def test_an_end_while_waiting_for_a_paused_dependency_counts_for_nothing() -> None:
    """A provider that is out for hours, and a worker killed meanwhile, make no record lethal."""
    suspicion = Suspicion(OPEN, 3, 1)
    for _ in range(10):
        suspicion = Suspicion.parse(str(suspicion.running_alone(waiting=True))).taken_over()
    assert not suspicion.lethal


@pytest.mark.parametrize("mark", [CLEAN, MOVED])
def test_a_clean_end_or_a_moved_offset_clears_what_was_counted(mark: str) -> None:
    """The count belongs to one record at one offset, and rises only by unclean ends."""
    assert Suspicion(mark, 2, 1).taken_over() == Suspicion(OPEN)


@given(mark=MARKS, unclean=st.integers(0, 99), alone=st.integers(0, 99))
def test_what_is_committed_is_read_back(mark: str, unclean: int, alone: int) -> None:
    """The metadata is the suspicion."""
    suspicion = Suspicion(mark, unclean, alone)
    assert Suspicion.parse(str(suspicion)) == (suspicion if mark else Suspicion())


@given(st.text())
def test_foreign_metadata_says_nothing(metadata: str) -> None:
    """Another tool's commit neither isolates nor kills."""
    if metadata.partition(":")[0] not in {MOVED, OPEN, ALONE, WAITING}:
        assert Suspicion.parse(metadata) == Suspicion()


def test_a_record_that_passes_alone_leaves_nothing_against_the_next() -> None:
    """Each record is judged by its own ends."""
    assert not Suspicion(ALONE, 3, 1).passed().taken_over().lethal
