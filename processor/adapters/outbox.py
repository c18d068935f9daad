"""Everything we produce goes through here: encoded, keyed, sized, in order, and awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from processor.adapters.avro import Encoded, partition_of
from processor.adapters.topics import topics
from processor.errors import DeliveryFailed, LeaseLost, RecordTooLarge
from processor.ports import Destination, Lease
from processor.settings import Settings

T = TypeVar("T")

LEASE_CHECKED_FOR_S = 0.05
"""A lease is looked at again when handing the messages to the producer takes longer than this: it waits when full."""


class Encoder(Protocol):
    """The part of the codec that is needed here."""

    def encode(self, destination: Destination) -> Encoded: ...


class Parcel(NamedTuple):
    """A message ready for the producer."""

    topic: str
    partition: int
    encoded: Encoded


class KafkaOutbox:
    """Implements `ports.Outbox` on the producer that `producer()` gives.

    The first failed delivery is the last: what the broker has of the records after it is unknown then, and sending
    more would break their order. Every later call raises DeliveryFailed too. Raises RecordTooLarge before anything
    of the call is sent: an idempotent producer never recovers from a record that the broker refuses for its size.
    """

    def __init__(self, settings: Settings, codec: Encoder, producer: Callable[[], AIOKafkaProducer]) -> None:
        self._codec = codec
        self._producer = producer
        self._timeout_s = settings.delivery_timeout_s
        self._max_record_bytes = settings.max_record_bytes
        self._topics = {id_: settings.topic(topic.name) for id_, topic in topics().items()}
        self._failed = False
        self._sending = 0
        # One call at a time hands its messages over: those that wait for room in the producer's buffer would
        # overtake one another.
        self._turn = asyncio.Lock()
        self._awaited: set[asyncio.Task[None]] = set()

    @property
    def sending(self) -> int:
        return self._sending

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        if messages:
            deadline, deliveries = await self._hand_over(messages, leases)
            await self._by(deadline, _acknowledged(deliveries))

    async def post(self, message: Destination) -> Awaitable[None]:
        deadline, deliveries = await self._hand_over([message], ())
        task = asyncio.create_task(self._by(deadline, _acknowledged(deliveries)))
        self._awaited.add(task)
        task.add_done_callback(self._awaited.discard)
        return task

    async def _hand_over(
        self, messages: Sequence[Destination], leases: Sequence[Lease]
    ) -> tuple[float, list[asyncio.Future[Any]]]:
        """When these messages must be acknowledged, and the futures of it.

        Their time begins with their turn: to stand in the line of a slow broker is no failure of it.
        """
        async with self._turn:
            deadline = asyncio.get_running_loop().time() + self._timeout_s
            return deadline, await self._by(deadline, self._produce(messages, leases))

    async def _produce(self, messages: Sequence[Destination], leases: Sequence[Lease]) -> list[asyncio.Future[Any]]:
        """Give all messages to the producer, in order, and return the futures of their acknowledgements."""
        if self._failed:
            raise DeliveryFailed("an earlier delivery failed: nothing more is sent")
        parcels = [await self._pack(message) for message in messages]
        producer = self._producer()
        deliveries: list[asyncio.Future[Any]] = []
        try:
            checked_at = _check(leases)
            for topic, partition, (key, value, headers) in parcels:
                if time.monotonic() > checked_at + LEASE_CHECKED_FOR_S:
                    checked_at = _check(leases)
                deliveries.append(
                    await producer.send(topic, value, key=key, partition=partition, headers=list(headers))
                )
        except BaseException:
            for delivery in deliveries:
                delivery.add_done_callback(_seen)
            raise
        return deliveries

    async def _pack(self, message: Destination) -> Parcel:
        """Encode, choose the partition, check the size."""
        encoded = self._codec.encode(message)
        if encoded.key is None and encoded.value is None:
            encoded = encoded._replace(key=b"")  # aiokafka takes no record that has neither
        topic = message.topic or self._topics[message.name]
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(encoded.key, encoded.value, list(encoded.headers))
        if size > self._max_record_bytes:
            raise RecordTooLarge(
                f"a message for {topic} has {size} bytes: EMBEDDING_MAX_RECORD_BYTES is {self._max_record_bytes}"
            )
        partition = message.partition
        if partition is None:
            known = await self._producer().partitions_for(topic)
            # Keyless records (a dead letter whose original had no key) need no order: any partition will do.
            partition = partition_of(encoded.key or b"", len(known))
        return Parcel(topic, partition, encoded)

    async def _by(self, deadline: float, work: Coroutine[Any, Any, T]) -> T:
        """Raises DeliveryFailed, with the broker's word for it and never a message, and remembers it."""
        self._sending += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            self._failed = True
            raise DeliveryFailed(f"the broker did not acknowledge within {self._timeout_s} s") from None
        except KafkaError as error:
            self._failed = True
            raise DeliveryFailed(f"the broker refused a record: {type(error).__name__}") from None
        finally:
            self._sending -= 1


def _check(leases: Sequence[Lease]) -> float:
    """Raises LeaseLost when one is gone; returns when they were looked at."""
    now = time.monotonic()
    for lease in leases:
        if not lease.held():
            raise LeaseLost(f"{lease.topic}/{lease.partition}: the lease of generation {lease.generation} is not held")
    return now


def _seen(delivery: asyncio.Future[Any]) -> None:
    if not delivery.cancelled():
        delivery.exception()


async def _acknowledged(deliveries: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for all, then raise the first error: none of them is left unseen."""
    for outcome in await asyncio.gather(*deliveries, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
