"""Fixtures of the fault tests: a broker that may be killed, and a world for workers to fail in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from processor.errors import EmbeddedUnavailable
from tests.support.brokers import Broker
from tests.support.kafka import ApacheKafka
from tests.support.world import Begin, beginner


@pytest.fixture
def own_kafka(kafka: Broker) -> Iterator[ApacheKafka]:
    """A broker of this test alone, since it is killed or frozen; needs Java and Maven."""
    try:
        with ApacheKafka() as own:
            yield own
    except EmbeddedUnavailable as error:
        pytest.skip(f"NOT RUN, needs Apache Kafka from Maven artifacts: {error}")


@pytest.fixture
def begin(kafka: Broker, unique: str, tmp_path: Path) -> Begin:
    """Starts provider, cache, topics and aggregator; see `tests.support.world`."""
    return beginner(kafka, unique, tmp_path)
