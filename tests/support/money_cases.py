"""What must not move a bill, each tried on real processes: a client's clock, a late charge, another topic.

Each says "ok", or what happened instead.
"""

from __future__ import annotations

import asyncio
import random
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from processor.accounts import BucketKey, UsageSums
from processor.adapters import topics
from processor.adapters.avro import encode_request
from processor.adapters.kafka import connection
from processor.cli.totals import read_totals
from processor.ports import Destination
from processor.settings import Settings
from tests.faults.test_aggregator_kills import PARTITIONS, produce, some_traffic
from tests.faults.test_rebuild import folding, make_again, refuses
from tests.support.brokers import ends_of
from tests.support.builders import a_request, a_usage
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Stack, until

DAY_MS = 86_400_000
DAYS_OFF = 40
Case = Callable[[Stack], Awaitable[None]]


async def outcomes(folder: Path, bootstrap_servers: str) -> dict[str, str]:
    """Of every case by its name, all at once."""
    cases: dict[str, Case] = {
        "clock_skew": clock_skew,
        "closed_month": closed_month,
        "topic_grown": topic_grown,
        "topic_recreated": topic_recreated,
    }

    async def outcome(name: str, case: Case) -> str:
        (own := folder / name).mkdir()
        prefix = f"{name}-{uuid.uuid4().hex[:8]}"
        with Stack(own, prefix, bootstrap_servers, EMBEDDING_LOG_LEVEL="WARNING") as stack:
            try:
                await case(stack)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other cases are told
                where = traceback.extract_tb(error.__traceback__)[-1]
                return f"{where.name}: {where.line}: {type(error).__name__} {str(error)[-300:]}"
        return "ok"

    return dict(zip(cases, await asyncio.gather(*(outcome(*case) for case in cases.items())), strict=True))


async def clock_skew(stack: Stack) -> None:
    """Clients whose clocks are 40 days ahead and behind: both are charged now, by the broker's clock; none is late."""
    settings = stack.settings()
    await topics.create(settings, partitions=PARTITIONS, replication=1)
    with ProviderProcess() as provider:
        child = stack.spawn("aggregator")
        worker = stack.spawn(
            "worker",
            EMBEDDING_PROVIDER="openai",
            EMBEDDING_OPENAI_BASE_URL=provider.base_url,
            EMBEDDING_OPENAI_API_KEY="tests",
        )
        await until(worker.ready, within_s=120, what="the worker is ready")
        days = {_day(time.time() * 1000)}
        async with AIOKafkaProducer(**connection(settings)) as producer:
            for off in (DAYS_OFF, -DAYS_OFF):
                at_ms = int(time.time() * 1000) + off * DAY_MS
                request = a_request(correlation_id=f"off-{off}", requested_at_ms=at_ms, dimensions=8)
                topic = settings.topic(topics.topics()["requests"].name)
                await producer.send_and_wait(topic, encode_request(request), timestamp_ms=at_ms)

        async def charged() -> bool:
            child.check()
            worker.check()
            months = [sums for key, sums in (await read_totals(settings)).items() if _is_month_of_all(key)]
            return sum(sums.requests for sums in months) == 2

        await until(charged, within_s=120, what="both are in the totals", every_s=0.5)
        days.add(_day(time.time() * 1000))
        found = {key.bucket for key in await read_totals(settings) if len(key.bucket) == len("2026-11-21")}
        assert found <= days, f"charged on {sorted(found)}"
        assert await _late(settings) == 0, "a charge is late"


async def closed_month(stack: Stack) -> None:
    """A charge appended over the horizon after its time changes no total and lies on the topic of late ones."""
    settings = stack.settings()
    horizon_ms = settings.horizon_days * DAY_MS
    await topics.create(settings, partitions=PARTITIONS, replication=1)
    child = stack.spawn("aggregator")
    await until(child.ready, within_s=120, what="the aggregator is ready")

    async def charge(name: str, age_ms: int) -> None:
        charged_at_ms = int(time.time() * 1000) - age_ms
        usage = a_usage(a_request(correlation_id=name), charged_at_ms=charged_at_ms, parts=())
        await produce(settings, [Destination("usage", usage)], over_s=0)

    await charge("in time", horizon_ms - DAY_MS)

    async def counted() -> bool:
        child.check()
        return bool(await read_totals(settings))

    await until(counted, within_s=120, what="a charge within the horizon is in its totals", every_s=0.2)
    totals = await read_totals(settings)
    await charge("late", horizon_ms + DAY_MS)

    async def quarantined() -> bool:
        child.check()
        return await _late(settings) == 1

    await until(quarantined, within_s=120, what="the late charge lies on its topic", every_s=0.2)
    await charge("after it", 0)

    async def folded() -> bool:
        child.check()
        return len(await read_totals(settings)) > len(totals)

    await until(folded, within_s=120, what="the charge after it is in the totals", every_s=0.2)
    after = await read_totals(settings)
    changed = {key for key, sums in totals.items() if after.get(key, UsageSums()) != sums}
    assert not changed, f"{len(changed)} closed totals have changed"


async def topic_grown(stack: Stack) -> None:
    """A usage topic that gets another partition stops the running aggregator, which names the rebuild."""
    child = await folding(stack, random.Random(1))
    settings = stack.settings()
    admin = AIOKafkaAdminClient(**connection(settings))
    await admin.start()
    try:
        await admin.create_partitions({settings.topic("token-usage"): NewPartitions(PARTITIONS + 1)})
    finally:
        await admin.close()
    await refuses(stack, child)


async def topic_recreated(stack: Stack) -> None:
    """A usage topic made again stops the running aggregator, which names the rebuild and leaves the totals alone."""
    dice = random.Random(2)
    child = await folding(stack, dice)
    settings = stack.settings()
    totals = await read_totals(settings)
    await make_again(settings)
    await produce(settings, some_traffic(100, dice), over_s=0)
    await refuses(stack, child)
    assert await read_totals(settings) == totals, "totals have changed"


async def _late(settings: Settings) -> int:
    async with AIOKafkaConsumer(**connection(settings), group_id=None) as consumer:
        return sum((await ends_of(consumer, settings.topic(topics.topics()["late"].name), PARTITIONS)).values())


def _day(at_ms: float) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).date().isoformat()


def _is_month_of_all(key: BucketKey) -> bool:
    return key.dimension == "all" and len(key.bucket) == len("2026-11")
