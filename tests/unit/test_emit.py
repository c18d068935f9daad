"""How many outcomes at once are sent: in slices, with turns for everybody else between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest

from processor.domain import Tombstone
from processor.emit import PARCELS_A_TURN, Emitter
from processor.ordering import DocumentOrder
from processor.ports import Destination
from processor.work import Known, Parcel, Ticket
from tests.support.builders import a_source
from tests.support.steps import FakeLease, MemoryOutbox, VirtualClock


def a_message(index: int) -> Destination:
    return Destination("sink", Tombstone(str(index), "1"))


class Emissions:
    """An emitter that notes how many parcels were written, and how many messages of them were taken by the outbox."""

    def __init__(self) -> None:
        self.outbox, self.written, self.taken = MemoryOutbox(), 0, 0
        self.outbox.on_send = self._take
        self.emitter = Emitter(self.outbox, DocumentOrder(), VirtualClock(), self._write)
        self.go = asyncio.Event()
        self.go.set()

    def parcels(self, count: int, *, before: int = 0) -> list[Parcel]:
        ticket = Ticket(FakeLease(), a_source(), 0, 0.0, unsent=count, unacked=count)
        return [
            Known(ticket, outcome=lambda _, index=index: a_message(index), before=[a_message(-1)] * before)  # type: ignore[misc]
            for index in range(count)
        ]

    async def emit(self, parcels: Sequence[Parcel]) -> int:
        """How many were sent."""
        return sum([len(sent) async for sent in self.emitter.emit(parcels)])

    def _write(self, parcels: Sequence[Parcel]) -> list[list[Destination]]:
        self.written += len(parcels)
        return [[a_message(0)] for _ in parcels]

    async def _take(self, messages: Sequence[Destination]) -> None:
        self.taken += len(messages)
        await self.go.wait()


async def test_everybody_else_gets_a_turn_between_slices() -> None:
    """However many outcomes come at once, of however many calls, and whatever goes before them."""
    emissions = Emissions()
    works = [
        asyncio.create_task(emissions.emit(emissions.parcels(count, before=before)))
        for count, before in ((2048, 0), (2048, 1), (300, 32), (1, 0))
    ]
    looks = [(0, 0)]
    while not all(work.done() for work in works):
        await asyncio.sleep(0)
        looks.append((emissions.written, emissions.taken))
    assert [work.result() for work in works] == [2048, 2048, 300, 1]
    assert len(emissions.outbox.sent) == 2 * 2048 + 2048 + 300 * 33 + 1
    for before, after in pairwise(looks):
        assert after[0] - before[0] <= PARCELS_A_TURN
        assert after[1] - before[1] <= PARCELS_A_TURN + 32


async def test_slices_are_under_way_together() -> None:
    """None waits for the acknowledgement of another: their batches fill one request."""
    emissions = Emissions()
    emissions.go.clear()
    work = asyncio.create_task(emissions.emit(emissions.parcels(2048)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert emissions.taken == 2048
    emissions.go.set()
    assert await work == 2048


async def test_what_is_dropped_between_slices_is_not_written() -> None:
    """A ticket that was let go has forgotten its works: a charge written now would be wrong."""
    emissions = Emissions()
    parcels = emissions.parcels(2048)
    work = asyncio.create_task(emissions.emit(parcels))
    while not emissions.written:
        await asyncio.sleep(0)
    parcels[0].ticket.dropped = True
    assert await work == emissions.written == len(emissions.outbox.sent) == PARCELS_A_TURN


async def test_a_slice_that_fails_ends_the_others() -> None:
    """Nothing of an emission goes on behind the back of whoever was told that it failed."""
    emissions = Emissions()
    emissions.go.clear()

    async def refuse_the_second(messages: Sequence[Destination]) -> None:
        emissions.taken += len(messages)
        if emissions.taken > PARCELS_A_TURN:
            raise ZeroDivisionError
        await emissions.go.wait()

    emissions.outbox.on_send = refuse_the_second
    with pytest.raises(ZeroDivisionError):
        await emissions.emit(emissions.parcels(2048))
    emissions.go.set()
    await asyncio.sleep(0)
    assert emissions.outbox.sent == []
