"""The consumer's thread: what runs beside the main loop, inside aiokafka's group protocol.

What is private of faust and aiokafka and used here is listed in `processor/adapters/private_names.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError, UnknownMemberIdError
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.group import HeartbeatRequest, LeaveGroupRequest, SyncGroupRequest
from faust.transport.drivers import aiokafka as driver

from processor.adapters.faust_engine.lease import NO_GENERATION, Session

if TYPE_CHECKING:
    from processor.adapters.faust_engine.consumer import Consumer

T = TypeVar("T")

FETCH_WAIT_MS = 1000
RECORDS_PER_FETCH = 500
FETCH_BYTES = 8 * 1024 * 1024
"""Of records unpacked: 500 of the largest that are served, packed well, would be seven times the read-ahead."""
ANSWER_S = 5.0
ANSWER_TO_LEAVING_S = 1.0
CODE_OF_UNKNOWN_MEMBER = 25
CODE_OF_REBALANCE = 27

log = structlog.stdlib.get_logger(__name__)


class Listener(driver.ConsumerRebalanceListener):
    """Runs in the consumer's thread, inside aiokafka's group protocol; what it awaits delays the group."""

    _thread: ConsumerThread

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> Any:
        consumer = self._thread.consumer
        consumer.session.revoking(consumer.engine.settings.revoke_budget_s + consumer.engine.settings.lease_margin_s)
        if consumer.closed:
            return None
        return super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._thread.consumer.session.joined()
        if not self._thread.consumer.closed:
            await super().on_partitions_assigned(assigned)


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread around an aiokafka consumer of our making. Its coroutines run in that thread."""

    consumer: Consumer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deleted: set[tuple[int, str]] = set()
        """(generation, topic)"""

    def _create_worker_consumer(self, transport: driver.Transport) -> AIOKafkaConsumer:  # noqa: ARG002
        return self.consumer.engine.new_consumer()

    async def on_start(self) -> None:
        await super().on_start()
        consumer = self._ensure_consumer()
        watch(self.consumer.session, consumer, replaced=self.consumer.engine.replaced)
        consumer._client.cluster.add_listener(partial(self._note_deleted, consumer))

    async def on_thread_stop(self) -> None:
        leaving = asyncio.create_task(leave_a_join(self._consumer))
        try:
            await super().on_thread_stop()
        finally:
            leaving.cancel()
            await asyncio.wait({leaving})

    def _note_deleted(self, consumer: AIOKafkaConsumer, cluster: ClusterMetadata) -> None:
        """A topic that is deleted takes its log and its commits with it: what is finished of it is not committed any
        more, else as many records of one made again under its name would be passed over."""
        generation = consumer._coordinator.generation
        deleted = {(generation, each.topic) for each in consumer.assignment()} - self._deleted
        deleted -= {(generation, topic) for topic in cluster.topics()}
        if deleted and generation != NO_GENERATION:
            self._deleted |= deleted
            log.error("topic was deleted under its reader", topics=sorted(topic for _, topic in deleted))
            consumer._coordinator.request_rejoin()

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Run a coroutine in the consumer's thread; await the result from the main loop. Cancelling reaches it."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.thread_loop))

    def _stable(self, generation: int) -> bool:
        """Whether the group counts us as a member of that generation and no rebalance has begun."""
        consumer = self._ensure_consumer()
        return consumer._coordinator.generation == generation and not consumer._subscription.reassignment_in_progress

    async def assigned(self, generation: int) -> list[TopicPartition] | None:
        """The partitions of that generation; None when it is over."""
        return sorted(self._ensure_consumer().assignment()) if self._stable(generation) else None

    async def offsets(
        self, partitions: Sequence[TopicPartition]
    ) -> tuple[Mapping[TopicPartition, Any], Mapping[TopicPartition, int], Mapping[TopicPartition, int]]:
        """`offsets_of`, in the consumer's thread."""
        return await offsets_of(self._ensure_consumer(), partitions)

    async def begin(self, generation: int, positions: Mapping[TopicPartition, int]) -> bool:
        """Seek to where new leases begin; a topic that was deleted is there again, and is committed again.

        A member that does not lead the group may find itself in the same generation after it joined anew.
        """
        stable = await self.seek_all(generation, positions)
        if stable:
            self._deleted.clear()
        return stable

    async def seek_all(self, generation: int, positions: Mapping[TopicPartition, int]) -> bool:
        """Seek in one step, unless the generation is over."""
        if not self._stable(generation):
            return False
        for partition, offset in positions.items():
            self._ensure_consumer().seek(partition, offset)
        return True

    async def fetch(
        self, partitions: Iterable[TopicPartition], max_records: int = RECORDS_PER_FETCH
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        """The next records of these partitions, after at most a second. Raises errors of the group's coordinator."""
        fetched: Mapping[TopicPartition, Sequence[Any]] = await self._ensure_consumer().getmany(
            *partitions, timeout_ms=FETCH_WAIT_MS, max_records=max_records
        )
        return fetched

    def end_of(self, partition: TopicPartition) -> int | None:
        """`end_of`, from any thread."""
        return end_of(self._ensure_consumer(), partition)

    async def first_offset(self, partition: TopicPartition) -> int | None:
        """Of what is retained; None when the broker does not say in time."""
        try:
            async with asyncio.timeout(ANSWER_S):
                first: int = (await self._ensure_consumer().beginning_offsets([partition]))[partition]
                return first
        except (KafkaError, TimeoutError):
            return None

    async def at_end(self, partition: TopicPartition) -> bool:
        """`at_end`, in the consumer's thread."""
        return at_end(self._ensure_consumer(), partition)

    async def commit_offsets(self, generation: int, offsets: Mapping[TopicPartition, tuple[int, str]]) -> bool:
        """Commit for that generation; False when it is over, which is not an error: the records come again."""
        consumer = self._ensure_consumer()
        if consumer._coordinator.generation != generation:
            return False
        there = {each: known for each, known in offsets.items() if (generation, each.topic) not in self._deleted}
        if not there:
            return False
        try:
            await consumer.commit(there)
        except (CommitFailedError, IllegalStateError):
            return False
        return True

    async def check(self) -> None:
        """Raise what aiokafka's tasks died of: nobody else asks while fetching waits for the handler."""
        consumer = self._ensure_consumer()
        consumer._coordinator.check_errors()
        if consumer._fetcher.error_future.done():
            consumer._fetcher.error_future.result()

    async def rejoin(self) -> None:
        self._ensure_consumer()._coordinator.request_rejoin()


def watch(session: Session, consumer: AIOKafkaConsumer, *, replaced: Callable[[], None] = lambda: None) -> None:
    """Note when each heartbeat and join was sent, and tell the session once the broker has acknowledged it.

    A heartbeat answered with "rebalance in progress" counts: the broker renewed the session all the same, and
    our partitions are nobody else's until we give them up. `replaced` is called when another process has joined under
    our `group.instance.id`: brokers tell it by forgetting our member id within its session, since aiokafka sends no
    instance id with heartbeats. To join again would throw the other one out, and so on for ever.
    """
    coordinator, static = consumer._coordinator, consumer._group_instance_id is not None
    session.generation = lambda: int(coordinator.generation)
    send = coordinator._send_req
    is_replaced = False

    async def send_and_note(request: Any) -> Any:
        nonlocal is_replaced
        sent_at = time.monotonic()
        response = await send(request)
        renews = {0, CODE_OF_REBALANCE} if isinstance(request, HeartbeatRequest) else {0}
        if isinstance(request, HeartbeatRequest | SyncGroupRequest) and response.error_code in renews:
            session.acknowledged(sent_at)
        if static and (is_replaced or session.lasts(session.generation())) and _forgotten(request, response):
            is_replaced = True
            replaced()
            # Told so, aiokafka would join again at once, before the process has ended.
            raise UnknownMemberIdError
        return response

    coordinator._send_req = send_and_note


def _forgotten(request: Any, response: Any) -> bool:
    """Whether the group does not know the member that asks."""
    if isinstance(request, OffsetCommitRequest):
        return any(code == CODE_OF_UNKNOWN_MEMBER for _, partitions in response.topics for _, code in partitions)
    return isinstance(request, HeartbeatRequest) and response.error_code == CODE_OF_UNKNOWN_MEMBER


async def leave_a_join(consumer: AIOKafkaConsumer | None) -> None:
    """Once the consumer is being stopped, leave the group although it still waits to be let in.

    A join is answered when every member has joined or its session is over: behind one that was killed, a stop would
    wait for half a minute. Its connection answers nothing else meanwhile, so another one is used. Brokers may leave a
    member that left without an answer for ever: what still waits then is ended with its connection.
    """
    if consumer is None or (coordinator := consumer._coordinator) is None:
        return  # it never started
    await asyncio.wait({coordinator._closing})
    node, joining = coordinator.coordinator_id, consumer._subscription.reassignment_in_progress
    if node is None or not joining or not coordinator.member_id or consumer._group_instance_id is not None:
        return
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    with suppress(KafkaError):  # the join is waited for instead
        await consumer._client.send(node, request, group=ConnectionGroup.DEFAULT)
        _, unanswered = await asyncio.wait({coordinator._coordination_task}, timeout=ANSWER_TO_LEAVING_S)
        waiting = consumer._client._conns.get((node, ConnectionGroup.COORDINATION))
        if unanswered and waiting is not None:
            coordinator.reset_generation()
            waiting.close()


async def offsets_of(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]
) -> tuple[Mapping[TopicPartition, Any], Mapping[TopicPartition, int], Mapping[TopicPartition, int]]:
    """What is committed (offset and metadata; missing without a commit), first and end offset of each partition."""
    if not partitions:
        return {}, {}, {}
    return (
        await consumer._coordinator.fetch_committed_offsets(partitions),
        await consumer.beginning_offsets(partitions),
        await consumer.end_offsets(partitions),
    )


def end_of(consumer: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
    """The end of the log, as the broker said it with the last fetch; None before one, or once it is not ours any more.

    Asked from any thread: a rebalance may take the partition away at any moment.
    """
    with suppress(AssertionError, AttributeError):
        end: int | None = consumer.highwater(partition)
        return end
    return None


def at_end(consumer: AIOKafkaConsumer, partition: TopicPartition) -> bool:
    """Whether all there is of an assigned partition was fetched.

    Told by the position, which passes over the control records that a transaction leaves at the end of a log; the
    offset after the last record does not.
    """
    end = consumer.highwater(partition)
    state = consumer._subscription.subscription.assignment.state_value(partition)
    return end is not None and state.has_valid_position and state.position >= end
