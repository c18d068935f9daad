"""What `usage rebuild` takes for a group that nobody is in."""

from __future__ import annotations

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, GroupLoadInProgressError, KafkaError, NoError
from aiokafka.protocol.admin import DescribeGroupsResponse_v1

from processor.adapters.rebuild import members_of

MEMBER = ("member", "client", "host", b"", b"")


def described(error: type[KafkaError], *members: tuple[object, ...]) -> DescribeGroupsResponse_v1:
    return DescribeGroupsResponse_v1(
        throttle_time_ms=0, groups=[(error.errno, "aggregator", "", "consumer", "", list(members))]
    )


def test_members_are_counted() -> None:
    """None in a group that was left or never was."""
    assert members_of([described(NoError)]) == 0
    assert members_of([described(NoError, MEMBER, MEMBER)]) == 2


@pytest.mark.parametrize("error", [GroupAuthorizationFailedError, GroupLoadInProgressError])
def test_a_group_that_the_broker_does_not_tell_of_is_not_an_empty_one(error: type[KafkaError]) -> None:
    """It names no members then: the store of an aggregator that runs would be set aside."""
    with pytest.raises(error):
        members_of([described(error)])
