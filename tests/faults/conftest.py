"""Fixtures of the fault tests: a broker that may be killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from processor.errors import EmbeddedUnavailable
from tests.support.brokers import Broker
from tests.support.kafka import ApacheKafka


@pytest.fixture
def own_kafka(kafka: Broker) -> Iterator[ApacheKafka]:
    """A broker of this test alone, since it is killed or frozen; needs Java and Maven."""
    try:
        with ApacheKafka() as own:
            yield own
    except EmbeddedUnavailable as error:
        pytest.skip(f"NOT RUN, needs Apache Kafka from Maven artifacts: {error}")
