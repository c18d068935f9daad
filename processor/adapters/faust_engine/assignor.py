"""How the partitions of a group are given to its members, where aiokafka's own ways don't fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

VERSION = 0
OWNER = b"owner"


class SingleOwnerAssignor(AbstractPartitionAssignor):  # type: ignore[misc]  # aiokafka is not typed
    """All partitions of all topics to one member; the others stand by with none.

    A member that owns them says so when it joins again and keeps them; otherwise the lowest member id is chosen.
    Unlike aiokafka's assignors it is an object, one per consumer: it remembers whether its own member is the owner.
    """

    name = "single-owner"

    def __init__(self) -> None:
        self._owner = False

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        return ConsumerProtocolMemberMetadata(VERSION, sorted(topics), OWNER if self._owner else b"")

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        owner = min(members, key=lambda member: (members[member].user_data != OWNER, member))
        topics = sorted({topic for metadata in members.values() for topic in metadata.subscription})
        everything = [(topic, sorted(cluster.partitions_for_topic(topic) or ())) for topic in topics]
        return {
            member: ConsumerProtocolMemberAssignment(VERSION, everything if member == owner else [], b"")
            for member in members
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        self._owner = bool(assignment.partitions())
