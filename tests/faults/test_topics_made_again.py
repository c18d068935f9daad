"""Topics that are deleted and made again under a worker, and while none runs. `token-usage`: see test_rebuild.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from processor.adapters import topics
from processor.cli.totals import read_totals
from processor.domain import Request
from processor.identity import request_id
from tests.faults.test_aggregator_kills import PARTITIONS, some_traffic
from tests.faults.test_aggregator_kills import produce as send_usage
from tests.faults.test_pressure import CHUNKS, provider_of, supervised
from tests.faults.test_rebuild import delete, folding, make_again, refuses
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.engines import (
    Handler,
    create_topic,
    engine_settings,
    group_of,
    produce,
    running,
    until,
)
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Stack
from tests.support.stack import until as until_async
from tests.support.traffic import Traffic, hard_requests


@pytest.mark.faults
async def test_results_made_again_hold_all_that_comes_after(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """Whether the worker meets the old topic, none or the new one: what was asked afterwards is answered once more."""
    waves = [hard_requests(40, chunks=CHUNKS, seed=seed) for seed in (1, 2, 3)]
    with (
        ProviderProcess() as provider,
        Stack(tmp_path, unique, kafka.bootstrap_servers, **provider_of(provider)) as stack,
    ):
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
            async with supervised(stack) as worker:
                await until_async(worker.child.ready, within_s=60, what="the worker is ready")
                await traffic.send(waves[0])
                await until_async(traffic.all_committed, within_s=60, what="the first wave is committed")
                await make_again(settings, "embedding-results")
                await traffic.send(waves[1])
                await until_async(traffic.all_committed, within_s=90, what="the second wave is committed")
                assert len(worker.ends) <= 1, worker.ends
            await _answered(stack, waves[1])
            await make_again(settings, "embedding-results")
            await traffic.send(waves[2])
            async with supervised(stack) as worker:
                await until_async(traffic.all_committed, within_s=90, what="the third wave is committed")
                assert not worker.ends
            await _answered(stack, waves[2])


async def _answered(stack: Stack, wave: Sequence[Request]) -> None:
    books = await audit.read_books(stack.settings(), [])
    found = {(result.request_id, result.chunk_index) for _, result in books.results}
    assert found >= {(request_id(request), i) for request in wave for i in range(CHUNKS)}


@pytest.mark.faults
async def test_usage_made_again_under_an_aggregator_stops_it(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """It doesn't fold the new log into totals of the old one, and names the command that mends it."""
    dice = random.Random(6)
    with Stack(tmp_path, unique, kafka.bootstrap_servers) as stack:
        settings = stack.settings()
        child = await folding(stack, dice)
        totals = await read_totals(settings)
        await make_again(settings)
        await send_usage(settings, some_traffic(300, dice), over_s=0)
        await refuses(stack, child)
        assert await read_totals(settings) == totals


@pytest.mark.faults
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("records", [40, 4_000], ids=["shorter", "longer"])
async def test_requests_made_again_are_read_from_their_beginning(
    records: int, stopped: bool, kafka: Broker, unique: str
) -> None:
    """All of the new log is worked on and committed, be it shorter than the old one or longer, be there a reader or
    none when the old one goes."""
    servers = kafka.bootstrap_servers
    await create_topic(servers, unique, PARTITIONS)
    await produce(servers, unique, PARTITIONS, 400)
    handler = Handler()
    settings = engine_settings(servers)
    async with AsyncExitStack() as first, AsyncExitStack() as second, group_of(servers, unique) as group:
        await first.enter_async_context(running(settings, unique, handler))
        await until(lambda: len(handler.finished) == 400, "the old log")
        if stopped:
            await first.aclose()
            assert await group.committed() == dict.fromkeys(range(PARTITIONS), 100)
        await delete(servers, unique)
        handler.finished.clear()
        await create_topic(servers, unique, PARTITIONS)
        await produce(servers, unique, PARTITIONS, records)
        if stopped:
            await second.enter_async_context(running(settings, unique, handler))
        await until(lambda: len(handler.finished) == records, "the new log")
        await first.aclose()
        await second.aclose()
        assert await group.committed() == dict.fromkeys(range(PARTITIONS), records // PARTITIONS)
