"""Everything we produce goes through here: encoded, keyed, sized, in order, and awaited.

Record batches are filled here, one for each destination partition, from all that waits for it: a future for each
record would cost more than the rest of its way.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from processor.adapters.avro import Encoded
from processor.adapters.kafka import METADATA_POLL_S
from processor.adapters.murmur2 import partitions_of
from processor.adapters.topics import topics
from processor.errors import DeliveryFailed, LeaseLost, RecordTooLarge
from processor.ports import Destination, Lease
from processor.settings import Settings

NO_LEADER = (None, -1)
REQUEST_BYTES = 2 * 1024 * 1024
"""Handed over for one broker at once, or little more. aiokafka packs a request in one piece: 2 ms a MB."""

POST_WAIT_S = 0.001
"""A receipt waits so long for the results that follow it: one request carries both, and they wait for no other."""

Packed = tuple[bytes | None, bytes | None, list[tuple[str, bytes]], int | None]
"""Key, value and headers as the batch takes them, and the partition that was asked for."""


class Encoder(Protocol):
    """The part of the codec that is needed here."""

    def encode(self, destination: Destination) -> Encoded: ...


class _Call:
    """One `send` or `post`: over once all of it is acknowledged, or it failed, or nobody waits for it any more."""

    __slots__ = ("done", "leases", "unacknowledged")

    def __init__(self, leases: Sequence[Lease], messages: int) -> None:
        self.leases = leases
        self.unacknowledged = messages
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_seen)

    def over(self) -> bool:
        """Whether nothing more of it is sent. Losing a lease ends it here."""
        if not self.done.done() and (lost := _lost(self.leases)) is not None:
            self.done.set_exception(lost)
        return self.done.done()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def acknowledge(self, messages: int) -> None:
        self.unacknowledged -= messages
        if not self.unacknowledged and not self.done.done():
            self.done.set_result(None)


class _Part:
    """What of a call goes to one partition; `batched` of it were handed over."""

    __slots__ = ("batched", "call", "messages")

    def __init__(self, call: _Call, messages: Sequence[Packed]) -> None:
        self.call = call
        self.messages = messages
        self.batched = 0


class _Line:
    """What waits for one destination partition, in order, and whose messages its batch in flight holds.

    `deadline`: when that batch must be acknowledged, or the partition must have got a leader.
    """

    __slots__ = ("deadline", "in_flight", "partition", "parts")

    def __init__(self, partition: TopicPartition) -> None:
        self.partition = partition
        self.parts: deque[_Part] = deque()
        self.in_flight: Sequence[tuple[_Call, int]] = ()
        self.deadline: float | None = None

    def fill(self, batch: BatchBuilder) -> Sequence[tuple[_Call, int]]:
        """Move messages into the batch until it is full; returns whose they are, and how many of each."""
        shares: list[tuple[_Call, int]] = []
        append, now_ms = batch.append, int(time.time() * 1000)
        while self.parts:
            part = self.parts[0]
            before = after = part.batched
            if part.call.over():
                self.parts.popleft()
                continue
            for key, value, headers, _ in part.messages[before:]:
                if append(timestamp=now_ms, key=key, value=value, headers=headers) is None:
                    break
                after += 1
            if after > before:
                shares.append((part.call, after - before))
                part.batched = after
            if after < len(part.messages):
                break
            self.parts.popleft()
        return shares


class KafkaOutbox:
    """Implements `ports.Outbox` on the producer that `producer()` gives; nobody else may send with it.

    A partition has one batch in flight and a broker one request; what is queued meanwhile goes into the next batches
    together. So a batch that is handed to the producer is sent at once, the leases are looked at right before that,
    and the producer never holds more than one batch a partition. A lease that is lost while part of its call is in
    flight ends the call all the same: LeaseLost, and the rest of it is never sent.

    A batch must be acknowledged within `delivery_timeout_s` of being handed over, and a partition have got a leader
    within that time; to stand in the line of a slow broker is no failure of it. The first failed delivery is the
    last: what the broker has of the records after it is unknown then, and sending more would break their order.
    Every later call raises DeliveryFailed too. Raises RecordTooLarge before anything of the call is sent: an
    idempotent producer never recovers from a batch that the broker refuses for its size.
    """

    def __init__(self, settings: Settings, codec: Encoder, producer: Callable[[], AIOKafkaProducer]) -> None:
        self._codec = codec
        self._producer = producer
        self._timeout_s = settings.delivery_timeout_s
        self._max_record_bytes = settings.max_record_bytes
        self._topics = {id_: settings.topic(topic.name) for id_, topic in topics().items()}
        self._partition_counts: dict[str, int] = {}
        self._lines: dict[tuple[str, int], _Line] = {}
        self._calls: set[_Call] = set()
        self._failed: str | None = None
        # Whoever waits to learn the partitions of a topic must not be overtaken.
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    @property
    def sending(self) -> int:
        return len(self._calls)

    async def send(self, messages: Sequence[Destination], *, leases: Sequence[Lease] = ()) -> None:
        if messages:
            await (await self._queue(messages, leases))

    async def post(self, message: Destination) -> Awaitable[None]:
        # Shielded: what was posted is sent, whoever stops waiting for it.
        acknowledged = asyncio.shield(await self._queue([message], (), wait_s=POST_WAIT_S))
        acknowledged.add_done_callback(_seen)
        return acknowledged

    async def _queue(
        self, messages: Sequence[Destination], leases: Sequence[Lease], *, wait_s: float = 0.0
    ) -> asyncio.Future[None]:
        """Encode all and put it into the lines of its partitions in one step; returns when all is acknowledged."""
        call = _Call(leases, len(messages))
        self._calls.add(call)
        call.done.add_done_callback(lambda _: self._calls.discard(call))
        try:
            async with self._turn:
                self._check()
                if (lost := _lost(leases)) is not None:
                    raise lost  # before anything is encoded: whoever waits for its lease tries again and again
                packed = self._pack(messages)
                for topic in packed:
                    if topic not in self._partition_counts:
                        self._partition_counts[topic] = await self._count_partitions(topic)
                self._check()
                if (lost := _lost(leases)) is not None:
                    raise lost
                for topic, each in packed.items():
                    self._line_up(call, topic, each)
        except BaseException:
            call.done.cancel()
            raise
        if wait_s:
            asyncio.get_running_loop().call_later(wait_s, self._wake)
        else:
            self._wake()
        return call.done

    def _wake(self) -> None:
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_batches())
        self._changed.set()

    def _check(self) -> None:
        if self._failed is not None:  # who comes after it may be heard first
            raise DeliveryFailed(f"an earlier delivery failed, nothing more is sent: {self._failed}")

    def _pack(self, messages: Sequence[Destination]) -> Mapping[str, Sequence[Packed]]:
        """Encode, check the size, sort by topic."""
        encode, names, max_bytes = self._codec.encode, self._topics, self._max_record_bytes
        size_of = DefaultRecordBatchBuilder.estimate_size_in_bytes
        packed: defaultdict[str, list[Packed]] = defaultdict(list)
        for message in messages:
            name, _, topic, partition = message
            key, value, given = encode(message)
            headers = given if type(given) is list else list(given)
            if key is None and value is None:
                key = b""  # aiokafka takes no record that has neither
            if size_of(key, value, headers) > max_bytes:
                raise RecordTooLarge(
                    f"a message for {topic or names[name]} has {size_of(key, value, headers)} bytes: "
                    f"EMBEDDING_MAX_RECORD_BYTES is {max_bytes}"
                )
            packed[topic or names[name]].append((key, value, headers, partition))
        return packed

    async def _count_partitions(self, topic: str) -> int:
        try:
            async with asyncio.timeout(self._timeout_s):
                producer = self._producer()
                # A topic that aiokafka knew from the start is dropped from its metadata once another is added.
                await producer.client.add_topic(topic)
                return len(await producer.partitions_for(topic))
        except (TimeoutError, KafkaError) as error:
            raise self._fail(f"the broker knows no topic {topic}: {type(error).__name__}") from None

    def _line_up(self, call: _Call, topic: str, packed: Sequence[Packed]) -> None:
        # Keyless records (a dead letter whose original had no key) need no order: any partition will do.
        partitions = partitions_of([key or b"" for key, _, _, _ in packed], self._partition_counts[topic])
        parts: defaultdict[int, list[Packed]] = defaultdict(list)
        for partition, each in zip(partitions, packed, strict=True):
            parts[partition if each[3] is None else each[3]].append(each)
        for partition, part in parts.items():
            line = self._lines.get((topic, partition))
            if line is None:
                line = self._lines[topic, partition] = _Line(TopicPartition(topic, partition))
            line.parts.append(_Part(call, part))

    # --- one task hands all batches over ---------------------------------------------------------------

    async def _send_batches(self) -> None:
        """Runs while anything is queued or in flight."""
        try:
            while self._lines:
                self._changed.clear()
                deadline = asyncio.get_running_loop().time() + self._timeout_s
                async with asyncio.timeout_at(deadline):
                    await self._hand_over(deadline)
                await self._wait()
        except Exception as error:  # noqa: BLE001 - whatever it is, what the broker has is unknown from here on
            self._fail(f"a batch could not be handed over: {type(error).__name__}")
        finally:
            self._sender = None

    async def _hand_over(self, deadline: float) -> None:
        """A batch for each partition that has something queued and whose leader has no request of ours in flight.

        As many as fit into a request; the partitions take turns.
        """
        producer = self._producer()
        leader_of = producer.client.cluster.leader_for_partition
        room = {leader_of(line.partition): 0 for line in self._lines.values() if line.in_flight}
        for line in list(self._lines.values()):
            if line.in_flight:
                continue
            leader = leader_of(line.partition)
            if leader in NO_LEADER:
                # Not handed over: a batch that the producer has can't be taken back from it.
                line.deadline = line.deadline or deadline
                continue
            line.deadline = None
            if room.setdefault(leader, REQUEST_BYTES) <= 0:
                continue
            batch = producer.create_batch()
            line.in_flight = line.fill(batch)
            del self._lines[line.partition]
            if not line.in_flight:
                continue
            self._lines[line.partition] = line
            room[leader] -= batch.size()
            line.deadline = deadline
            # Does not wait: the leader is known, and nothing of this partition is queued in the producer.
            delivery = await producer.send_batch(batch, line.partition.topic, partition=line.partition.partition)
            delivery.add_done_callback(partial(self._delivered, line))

    def _delivered(self, line: _Line, delivery: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if delivery.cancelled() else delivery.exception()
        if error is not None:
            self._fail(f"the broker refused a record: {type(error).__name__}")
            return
        for call, messages in line.in_flight:
            call.acknowledge(messages)
        line.in_flight, line.deadline = (), None
        if not line.parts:
            self._lines.pop(line.partition, None)
        self._changed.set()

    async def _wait(self) -> None:
        """Until something is queued or acknowledged; a look at the metadata for partitions without a leader."""
        loop = asyncio.get_running_loop()
        lines = self._lines.values()
        wake_at = min((line.deadline for line in lines if line.deadline is not None), default=None)
        if wake_at is None:
            return
        if any(line.deadline is not None and not line.in_flight for line in lines):
            self._producer().client.force_metadata_update()
            wake_at = min(wake_at, loop.time() + METADATA_POLL_S)
        timer = loop.call_at(wake_at, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        if any(line.deadline is not None and line.deadline <= loop.time() for line in lines):
            self._fail(f"the broker did not acknowledge within {self._timeout_s} s")

    def _fail(self, reason: str) -> DeliveryFailed:
        """For good: every call that is not over fails with the broker's word for it, and never a message."""
        self._failed = reason
        self._lines.clear()
        for call in list(self._calls):
            call.fail(DeliveryFailed(reason))
        self._changed.set()
        return DeliveryFailed(reason)


def _lost(leases: Sequence[Lease]) -> LeaseLost | None:
    for lease in leases:
        if not lease.held():
            return LeaseLost(f"{lease.topic}/{lease.partition}: the lease of generation {lease.generation} is not held")
    return None


def _seen(future: asyncio.Future[Any]) -> None:
    """A failure is remembered by the outbox: nobody has to ask this future for it."""
    if not future.cancelled():
        future.exception()
