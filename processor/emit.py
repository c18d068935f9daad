"""Step 7, second half: parcels go out when their turn has come, and every acknowledgement is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from processor.errors import LeaseLost
from processor.ordering import DocumentOrder
from processor.ports import Clock, Destination, Outbox
from processor.work import Known, Parcel

LEASE_POLL_S = 0.1
PARCELS_A_TURN = 256
"""To write them takes 2 ms, to encode them another 2 (d=1536, with the sink view)."""

Write = Callable[[Sequence[Parcel]], Sequence[list[Destination]]]


@dataclass(frozen=True, slots=True)
class Emitter:
    """Sends parcels in document order under their leases. `write` gives the messages of each outcome, once.

    A call can bring thousands of outcomes at once. They are written and encoded in slices, one slice of all emissions
    between two turns of everybody else, and are under way together: no slice waits for another's acknowledgement.
    """

    outbox: Outbox
    order: DocumentOrder
    clock: Clock
    write: Write
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def emit(
        self, parcels: Sequence[Parcel], receipts: Sequence[Awaitable[None]] = ()
    ) -> AsyncIterator[Sequence[Parcel]]:
        """Yields parcels once the broker has acknowledged all of theirs; the caller acknowledges them in turn.

        `receipts` of the window's provider calls are awaited before anything is yielded. Parcels of a revoked lease
        are left out: they will be delivered again.
        """
        ready, waiting = self._divide(parcels)
        while ready or waiting:
            if ready:
                if first := [parcel for parcel in ready if isinstance(parcel, Known) and parcel.before]:
                    await self._send(_by_what_goes_before(first), _before)
                sent = await self._send(_by_count(ready), self.write)
                for receipt in receipts:
                    await receipt
                receipts = ()
                yield sent
            else:
                await self.order.changed()
            ready, waiting = self._divide(waiting)
        for receipt in receipts:
            await receipt

    def _divide(self, parcels: Sequence[Parcel]) -> tuple[list[Parcel], list[Parcel]]:
        """Those whose turn it is, and those that wait for an earlier offset."""
        ready: list[Parcel] = []
        waiting: list[Parcel] = []
        for parcel in parcels:
            if parcel.ticket.live:
                (ready if self.order.ready(parcel) else waiting).append(parcel)
        return ready, waiting

    async def _send(self, slices: Iterable[Sequence[Parcel]], write: Write) -> list[Parcel]:
        """Send each parcel's messages; returns the parcels whose lease was still held.

        No two of them are of one chunk, so that slices need no order among themselves.
        """
        sends: list[asyncio.Task[Sequence[Parcel]]] = []
        try:
            for some in slices:
                async with self._turn:
                    await asyncio.sleep(0)
                    # A ticket that was dropped while the slices before had their turn has forgotten its works: what
                    # it was charged can't be written any more.
                    live = [parcel for parcel in some if parcel.ticket.live]
                    sends.append(asyncio.create_task(self._send_slice(live, write(live))))
            return [parcel for sent in await asyncio.gather(*sends) for parcel in sent]
        except BaseException:
            for each in sends:
                each.cancel()
            await asyncio.gather(*sends, return_exceptions=True)
            raise

    async def _send_slice(self, parcels: Sequence[Parcel], batches: Sequence[list[Destination]]) -> Sequence[Parcel]:
        """A lease that is late without being revoked is waited for: dropping its work would leave a hole in the
        watermark that nobody fills.
        """
        while True:
            messages = [message for batch in batches for message in batch]
            leases = list({parcel.ticket.lease for parcel in parcels})
            try:
                await self.outbox.send(messages, leases=leases)
            except LeaseLost:
                await self.clock.sleep(LEASE_POLL_S)
            else:
                return parcels
            live = [parcel.ticket.live for parcel in parcels]
            batches = [batch for batch, alive in zip(batches, live, strict=True) if alive]
            parcels = [parcel for parcel, alive in zip(parcels, live, strict=True) if alive]


def _before(parcels: Sequence[Parcel]) -> list[list[Destination]]:
    return [list(parcel.before) if isinstance(parcel, Known) else [] for parcel in parcels]


def _by_count(parcels: Sequence[Parcel]) -> Iterator[Sequence[Parcel]]:
    for begin in range(0, len(parcels), PARCELS_A_TURN):
        yield parcels[begin : begin + PARCELS_A_TURN]


def _by_what_goes_before(parcels: Sequence[Known]) -> Iterator[Sequence[Parcel]]:
    some: list[Parcel] = []
    messages = 0
    for parcel in parcels:
        some.append(parcel)
        messages += len(parcel.before)
        if messages >= PARCELS_A_TURN:
            yield some
            some, messages = [], 0
    if some:
        yield some
