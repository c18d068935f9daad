"""A topic that takes less than before: the worker ends instead of sending on, and nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from processor.adapters import topics
from tests.support import audit
from tests.support.brokers import Broker, limit_topic
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Stack, until
from tests.support.traffic import Traffic, hard_requests

DIMENSIONS = 1536
PARTITIONS = 2
DELIVERY_TIMEOUT_S = 60


@pytest.mark.faults
async def test_a_lowered_limit_ends_the_worker_and_nothing_is_lost(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """It ends with code 1 within its delivery timeout; once the limit is back, the next one finishes everything."""
    with ProviderProcess() as provider:
        environment = {
            "EMBEDDING_PROVIDER": "openai",
            "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
            "EMBEDDING_OPENAI_API_KEY": "tests",
            "EMBEDDING_DEFAULT_MODEL": "text-embedding-3-small",
            "EMBEDDING_DELIVERY_TIMEOUT_S": str(DELIVERY_TIMEOUT_S),
        }
        with Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
            settings = stack.settings()
            await topics.create(settings, partitions=PARTITIONS, replication=1)
            results = settings.topic(topics.topics()["results"].name)
            async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
                worker = stack.spawn("worker")
                await until(worker.ready, within_s=60, what="the worker is ready")
                await traffic.send(hard_requests(50, chunks=5))
                await until(traffic.all_committed, within_s=60, what="the first requests are committed")

                await limit_topic(kafka.bootstrap_servers, results, 10_000)
                await traffic.send(hard_requests(200, chunks=5, seed=2))
                lowered_at = time.monotonic()
                await until(
                    lambda: worker.process.poll() is not None,
                    within_s=DELIVERY_TIMEOUT_S,
                    what="the worker ends",
                )
                assert worker.process.poll() == 1
                assert '"error": "DeliveryFailed"' in worker.tail()
                assert "MessageSizeTooLargeError" in worker.tail()
                assert time.monotonic() - lowered_at < DELIVERY_TIMEOUT_S
                assert not await traffic.all_committed()

                await limit_topic(kafka.bootstrap_servers, results, 1_048_588)
                worker = stack.spawn("worker")
                await until(traffic.all_committed, within_s=60, what="every request is committed")
                assert worker.stop() == 0
            books = await audit.read_books(settings, provider.admin("ledger")["requests"])
            audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS)
            audit.check_charges(books)
            audit.check_attempts(books)
