"""One owner of everything, and it stays the owner."""

from __future__ import annotations

from collections.abc import Mapping

from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

from processor.adapters.faust_engine.assignor import SingleOwnerAssignor

TOPICS = ["calls", "usage"]
EVERYTHING = [("calls", 0), ("usage", 0), ("usage", 1)]


class Cluster:
    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return {"calls": {0}, "usage": {1, 0}}.get(topic)


def assign(members: Mapping[str, SingleOwnerAssignor]) -> dict[str, list[tuple[str, int]]]:
    """What each member is told, after a round trip over the wire; the members hear of it."""
    metadata = {member: assignor.metadata(TOPICS) for member, assignor in members.items()}
    told = next(iter(members.values())).assign(Cluster(), metadata)
    answers = {
        member: ConsumerProtocolMemberAssignment.decode(assignment.encode()) for member, assignment in told.items()
    }
    for member, answer in answers.items():
        members[member].on_assignment(answer)
    return {member: [tuple(each) for each in answer.partitions()] for member, answer in answers.items()}


def test_one_member_owns_every_partition_of_every_topic() -> None:
    """The lowest member id is chosen; the others stand by with nothing."""
    assert assign({"b": SingleOwnerAssignor(), "a": SingleOwnerAssignor(), "c": SingleOwnerAssignor()}) == {
        "a": EVERYTHING,
        "b": [],
        "c": [],
    }


def test_a_newcomer_does_not_take_over() -> None:
    """The owner keeps everything when a member with a lower id joins."""
    owner = SingleOwnerAssignor()
    assign({"b": owner})
    assert assign({"a": SingleOwnerAssignor(), "b": owner}) == {"a": [], "b": EVERYTHING}


def test_a_standby_takes_over_when_the_owner_is_gone() -> None:
    """Control case of the one before."""
    owner, standby = SingleOwnerAssignor(), SingleOwnerAssignor()
    assign({"a": owner, "b": standby})
    assert assign({"b": standby}) == {"b": EVERYTHING}


def test_a_topic_that_does_not_exist_yet_is_left_out() -> None:
    """Its partitions are assigned once the cluster knows them."""
    assignor = SingleOwnerAssignor()
    told = assignor.assign(Cluster(), {"a": assignor.metadata(["usage", "nowhere"])})
    assert [tuple(each) for each in told["a"].partitions()] == [("usage", 0), ("usage", 1)]
