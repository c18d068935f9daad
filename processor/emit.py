"""Step 7, second half: parcels go out when their turn has come, and every acknowledgement is awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from processor.errors import LeaseLost
from processor.ordering import DocumentOrder
from processor.ports import Clock, Destination, Outbox
from processor.work import Known, Parcel

LEASE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Emitter:
    """Sends parcels in document order under their leases. `write` gives the messages of each outcome, once."""

    outbox: Outbox
    order: DocumentOrder
    clock: Clock
    write: Callable[[Sequence[Parcel]], Sequence[list[Destination]]]

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
                ready = await self._send_before(ready)
                sent = await self._send(ready, self.write(ready))
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

    async def _send_before(self, parcels: list[Parcel]) -> list[Parcel]:
        before = [list(parcel.before) if isinstance(parcel, Known) else [] for parcel in parcels]
        if not any(before):
            return parcels
        return [parcel for parcel in await self._send(parcels, before) if parcel.ticket.live]

    async def _send(self, parcels: Sequence[Parcel], batches: Sequence[list[Destination]]) -> Sequence[Parcel]:
        """Send each parcel's messages; returns the parcels whose lease was still held.

        A lease that is late without being revoked is waited for: dropping its work would leave a hole in the
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
