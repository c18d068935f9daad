"""What the consumer and its thread make of a topic that is deleted, or cut, under them, or of a twin that joins.

Without a broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import UnknownMemberIdError
from aiokafka.protocol.group import HeartbeatRequest
from structlog.testing import capture_logs

from processor.adapters.faust_engine import consumer as module
from processor.adapters.faust_engine.consumer import Consumer
from processor.adapters.faust_engine.lease import PartitionLease, Session
from processor.adapters.faust_engine.thread import CODE_OF_UNKNOWN_MEMBER, ConsumerThread, watch
from tests.support.steps import VirtualClock

PARTITION = TopicPartition("requests", 0)
GENERATION = 7


class FakeConsumer:
    """The parts of aiokafka's consumer, coordinator and subscription that are looked at. It never leads the group."""

    def __init__(self) -> None:
        self._coordinator = self._subscription = self
        self.generation = GENERATION
        self.reassignment_in_progress = False
        self.commits: list[Any] = []

    def assignment(self) -> set[TopicPartition]:
        return {PARTITION}

    def request_rejoin(self) -> None:
        self.reassignment_in_progress = True

    def seek(self, partition: TopicPartition, offset: int) -> None:
        pass

    async def commit(self, offsets: Any) -> None:
        self.commits.append(offsets)


async def test_a_topic_that_was_missed_for_a_moment_is_committed_again() -> None:
    """Nothing is committed until its positions were looked up anew, though the generation stays what it was."""
    consumer, thread = FakeConsumer(), object.__new__(ConsumerThread)
    thread._consumer, thread._deleted = consumer, set()
    thread._note_deleted(consumer, ClusterMetadata())
    assert consumer.reassignment_in_progress
    offsets = {PARTITION: (5, "")}
    assert not await thread.begin(GENERATION, {PARTITION: 5})
    assert not await thread.commit_offsets(GENERATION, offsets)
    consumer.reassignment_in_progress = False  # joined again
    assert not await thread.commit_offsets(GENERATION, offsets)
    assert await thread.begin(GENERATION, {PARTITION: 5})
    assert await thread.commit_offsets(GENERATION, offsets)
    assert consumer.commits == [offsets]


class FakeThread:
    """Knows the first offsets that the broker says, one after the other; None: it does not say."""

    def __init__(self, *first_offsets: int | None) -> None:
        self.first_offsets = list(first_offsets)
        self.sought: list[int] = []

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await work

    async def first_offset(self, partition: TopicPartition) -> int | None:
        assert partition == PARTITION
        return self.first_offsets.pop(0)

    async def seek_all(self, generation: int, positions: Any) -> bool:
        assert generation == GENERATION
        self.sought.append(positions[PARTITION])
        return True


@pytest.mark.parametrize("first, level", [(90, "error"), (0, "info")], ids=["deleted", "not in the log"])
async def test_a_hole_is_passed_over_once_the_broker_has_said_what_it_is(
    first: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that were deleted unread are told loudly, however late the broker answers: it is asked again."""
    monkeypatch.setattr(module, "RETRY_S", 0)
    consumer, thread = object.__new__(Consumer), FakeThread(None, None, first)
    lease = PartitionLease(PARTITION.topic, PARTITION.partition, GENERATION, Session(timeout_s=6, margin_s=1), 5, 5)
    consumer._thread, consumer.leases = thread, {PARTITION: lease}  # type: ignore[assignment]
    consumer._wakeup = asyncio.Event()
    with capture_logs() as told:
        for _ in range(3):
            assert not await consumer._continues(lease, PARTITION, 90)
        assert await consumer._continues(lease, PARTITION, 90)
    assert thread.sought == [5, 5, 5]
    assert [each["log_level"] for each in told] == ["warning", "warning", level]


class Forgotten(FakeConsumer):
    """A member that the group does not know any more, as every heartbeat tells it."""

    def __init__(self, instance_id: str | None) -> None:
        super().__init__()
        self._group_instance_id = instance_id

    async def _send_req(self, request: Any) -> Any:
        return SimpleNamespace(error_code=CODE_OF_UNKNOWN_MEMBER)

    async def heartbeat(self) -> int:
        """What aiokafka is told: it joins again when that is the code of an unknown member."""
        code: int = (await self._send_req(HeartbeatRequest("group", GENERATION, "member"))).error_code
        return code


async def test_a_member_that_was_replaced_never_hears_that_it_may_join_again() -> None:
    """Not even once its session would be over: its process may take longer than that to end."""
    clock, replaced = VirtualClock(), list[float]()
    session = Session(timeout_s=6, margin_s=1, monotonic=clock.monotonic)
    consumer = Forgotten("worker-0")
    watch(session, consumer, replaced=lambda: replaced.append(clock.now_s))
    session.acknowledged(clock.now_s)
    for clock.now_s in (1, 60):
        with pytest.raises(UnknownMemberIdError):
            await consumer.heartbeat()
    assert replaced == [1, 60]


@pytest.mark.parametrize("instance_id, at_s", [("worker-0", 60), (None, 1)], ids=["session over", "no instance id"])
async def test_a_member_that_was_not_replaced_joins_again(instance_id: str | None, at_s: float) -> None:
    """A session that ran out, or a group that knows no instance ids, is no twin."""
    clock, replaced = VirtualClock(), list[float]()
    session = Session(timeout_s=6, margin_s=1, monotonic=clock.monotonic)
    consumer = Forgotten(instance_id)
    watch(session, consumer, replaced=lambda: replaced.append(clock.now_s))
    session.acknowledged(clock.now_s)
    clock.now_s = at_s
    assert await consumer.heartbeat() == CODE_OF_UNKNOWN_MEMBER
    assert not replaced
