"""What the consumer's thread makes of a topic that is deleted under it, without a broker."""

from __future__ import annotations

from typing import Any

from aiokafka import TopicPartition
from aiokafka.cluster import ClusterMetadata

from processor.adapters.faust_engine.thread import ConsumerThread

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
