"""Law 2 on the watermark alone: what may be committed never passes the first unfinished record."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.watermark import Watermark


@st.composite
def logs(draw: st.DrawFn) -> list[int]:
    """Ascending offsets with gaps, as compaction and control records leave them."""
    start = draw(st.integers(0, 3))
    steps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=60))
    offsets, offset = [], start
    for step in steps:
        offsets.append(offset)
        offset += step
    return offsets


@given(log=logs(), data=st.data())
def test_what_is_committed_never_passes_the_first_unfinished_record(log: list[int], data: st.DataObject) -> None:
    """In any order of handing out and finishing, all below the watermark is finished and none above waits for it."""
    watermark = Watermark(data.draw(st.integers(0, log[0])))
    waiting, in_hand, finished = list(log), list[int](), set[int]()
    while waiting or in_hand:
        if waiting and (not in_hand or data.draw(st.booleans())):
            run = waiting[: data.draw(st.integers(1, 8))]
            del waiting[: len(run)]
            watermark.hand_out(run)
            in_hand += run
        else:
            offset = in_hand.pop(data.draw(st.integers(0, len(in_hand) - 1)))
            watermark.finish(offset)
            finished.add(offset)
        handed_out = [offset for offset in log if offset not in waiting]
        unfinished = [offset for offset in handed_out if offset not in finished]
        assert watermark.first_unfinished == (unfinished[0] if unfinished else watermark.next_offset)
        assert len(watermark) == len(unfinished)
    assert watermark.first_unfinished == log[-1] + 1


def test_a_hundred_in_flight_finished_in_any_order_commit_only_the_contiguous_ones() -> None:
    """The case in which Faust's own tracking commits past unfinished records."""
    order = list(range(100))
    random.Random(606).shuffle(order)
    watermark = Watermark(0)
    watermark.hand_out(range(100))
    done = set()
    for offset in order:
        watermark.finish(offset)
        done.add(offset)
        assert watermark.first_unfinished == next(each for each in range(101) if each not in done)


def test_offset_zero_is_an_offset() -> None:
    """The first record of a log holds the watermark like any other."""
    watermark = Watermark(0)
    watermark.hand_out([0, 1, 2])
    watermark.finish(1)
    watermark.finish(2)
    assert watermark.first_unfinished == 0
    watermark.finish(0)
    assert watermark.first_unfinished == 3


def test_finishing_twice_changes_nothing() -> None:
    """A second acknowledgement of a record does not stand for another record."""
    watermark = Watermark(5)
    watermark.hand_out([5, 6])
    watermark.finish(5)
    watermark.finish(5)
    assert watermark.first_unfinished == 6


def test_what_was_never_handed_out_cannot_be_finished() -> None:
    """A mistaken offset is an error at once, not a record lost later."""
    watermark = Watermark(5)
    watermark.hand_out([5])
    with pytest.raises(ValueError, match="offset 6 was never handed out"):
        watermark.finish(6)


def test_nothing_is_handed_out_twice() -> None:
    """A record that comes again is noticed before its work is counted twice."""
    watermark = Watermark(5)
    watermark.hand_out([5, 7])
    with pytest.raises(ValueError, match="offset 6 was handed out before"):
        watermark.hand_out([6])
