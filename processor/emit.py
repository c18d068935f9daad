"""Step 7, second half: parcels go out when their turn has come, and every acknowledgement is awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from processor.errors import LeaseLost
from processor.ordering import DocumentOrder
from processor.ports import Clock, Destination, Outbox
from processor.work import Job, Parcel, Ticket

LEASE_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Emitter:
    """Sends parcels in document order under their leases. `charge` gives the usage message of a finished job."""

    outbox: Outbox
    order: DocumentOrder
    clock: Clock
    charge: Callable[[Job], Destination | None]

    async def emit(
        self, parcels: Sequence[Parcel], receipts: Sequence[Awaitable[None]] = ()
    ) -> AsyncIterator[Sequence[Parcel]]:
        """Yields parcels once the broker has acknowledged all of theirs; the caller acknowledges them in turn.

        `receipts` of the window's provider calls are awaited before anything is yielded. A request's usage goes out
        with its last outcome. Parcels of a revoked lease are left out: they will be delivered again.
        """
        waiting = _live(parcels)
        while waiting:
            ready = [parcel for parcel in waiting if self.order.ready(parcel)]
            if ready:
                waiting = [parcel for parcel in waiting if not self.order.ready(parcel)]
                sent = await self._send_outcomes(await self._send(ready, lambda parcel: parcel.before))
                for receipt in receipts:
                    await receipt
                receipts = ()
                yield sent
            else:
                await self.order.changed()
            waiting = _live(waiting)
        for receipt in receipts:
            await receipt

    async def _send_outcomes(self, parcels: Sequence[Parcel]) -> Sequence[Parcel]:
        charges: dict[Ticket, Destination] = {}
        for parcel in parcels:
            ticket = parcel.ticket
            ticket.unsent -= 1
            if ticket.unsent == 0 and isinstance(ticket, Job) and (usage := self.charge(ticket)) is not None:
                charges[ticket] = usage

        def outcome(parcel: Parcel) -> Iterable[Destination]:
            yield from parcel.outcome()
            if parcel is last[parcel.ticket] and parcel.ticket in charges:
                yield charges[parcel.ticket]

        last = {parcel.ticket: parcel for parcel in parcels}
        return await self._send(parcels, outcome)

    async def _send(
        self, parcels: Sequence[Parcel], pick: Callable[[Parcel], Iterable[Destination]]
    ) -> Sequence[Parcel]:
        """Send what `pick` gives; returns the parcels whose lease was still held.

        A lease that is late without being revoked is waited for: dropping its work would leave a hole in the
        watermark that nobody fills.
        """
        while True:
            live = _live(parcels)
            messages = [message for parcel in live for message in pick(parcel)]
            leases = list({id(parcel.ticket.lease): parcel.ticket.lease for parcel in live}.values())
            try:
                await self.outbox.send(messages, leases=leases)
            except LeaseLost:
                await self.clock.sleep(LEASE_POLL_S)
            else:
                return live


def _live(parcels: Sequence[Parcel]) -> list[Parcel]:
    return [parcel for parcel in parcels if parcel.ticket.live]
