"""When a worker may still send for a partition, and what a late acknowledgement does."""

from __future__ import annotations

import pytest
from aiokafka import ConsumerRecord

from processor.adapters.faust_engine.lease import PartitionLease, Session


class Time:
    """A monotonic clock that moves when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def session(time: Time) -> Session:
    """Ten seconds with a margin of two, of generation 7."""
    session = Session(timeout_s=10, margin_s=2, monotonic=time)
    session.generation = lambda: 7
    return session


@pytest.fixture
def lease(session: Session) -> PartitionLease:
    return PartitionLease("requests", 3, 7, session, 100, 100)


def test_a_lease_is_not_held_before_the_first_acknowledged_heartbeat(lease: PartitionLease) -> None:
    """Nothing is sent on the strength of a membership that nobody confirmed."""
    assert not lease.held()


def test_a_lease_is_held_until_the_session_may_have_run_out(
    lease: PartitionLease, session: Session, time: Time
) -> None:
    """The session counts from when the acknowledged heartbeat was sent, less the margin."""
    session.acknowledged(time.now)
    time.now += 7.9
    assert lease.held()
    time.now += 0.2
    assert not lease.held()


def test_a_heartbeat_acknowledged_late_counts_from_when_it_was_sent(
    lease: PartitionLease, session: Session, time: Time
) -> None:
    """A process frozen between sending and reading the answer finds its lease over."""
    sent_at = time.now
    time.now += 60
    session.acknowledged(sent_at)
    assert not lease.held()


def test_a_late_heartbeat_gives_the_lease_back(lease: PartitionLease, session: Session, time: Time) -> None:
    """The broker acknowledged it for the same generation, so nobody else owned the partition meanwhile."""
    session.acknowledged(time.now)
    time.now += 9
    assert not lease.held()
    session.acknowledged(time.now)
    assert lease.held()


def test_a_lease_of_an_earlier_generation_is_not_held(lease: PartitionLease, session: Session, time: Time) -> None:
    """A membership that was lost and won again is another one."""
    session.acknowledged(time.now)
    session.generation = lambda: 8
    assert not lease.held()


def test_a_lease_ends_with_the_time_for_giving_up(lease: PartitionLease, session: Session, time: Time) -> None:
    """A rebalance that hangs on our side does not outlast the broker's patience, though heartbeats go on."""
    session.acknowledged(time.now)
    session.revoking(5)
    time.now += 4
    session.acknowledged(time.now)
    assert lease.held()
    time.now += 1
    assert not lease.held()
    session.joined()
    assert lease.held()


def test_a_revoked_lease_is_never_held_again(lease: PartitionLease, session: Session, time: Time) -> None:
    """Leases are replaced, not revived."""
    session.acknowledged(time.now)
    lease.revoke()
    session.acknowledged(time.now)
    assert lease.revoked
    assert not lease.held()


@pytest.mark.parametrize("end, behind", [(None, 0), (101, 0), (102, 0), (150, 48)])
def test_what_is_behind_a_run_is_counted_from_its_end(lease: PartitionLease, end: int | None, behind: int) -> None:
    """An end that is not known, or was said before the last records came, is no backlog."""
    fetched = [ConsumerRecord("requests", 3, offset, 0, 0, None, b"", None, -1, 0, ()) for offset in (100, 101)]
    assert lease.hand_out(fetched, end=end).behind == behind


def test_a_late_acknowledgement_finds_the_lease_revoked_and_does_nothing(lease: PartitionLease) -> None:
    """What another owner will do again is not counted as done here."""
    lease.watermark.hand_out([100, 101])
    lease.finish(100)
    lease.revoke()
    lease.finish(101)
    assert lease.watermark.first_unfinished == 101
