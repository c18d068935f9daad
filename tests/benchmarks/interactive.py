"""What a query waits for besides the provider: 20 queries a second, alone and beside a backlog that takes the quota.

Counted from the client's call to its answer (`Client.embed_query`, over the topic of replies), less the time in which
the provider held the call that carried the text, by its own ledger in whole milliseconds. An echo, one record produced
and consumed through the same broker by the same process meanwhile, stands beside it: a query passes through the broker
three times (request, intent, reply). The account's limits are those of the server and of both workers' settings; the
backlog is larger than what they let through. Broker, worker and client have met more queries before, since code that
has just started is slow (the broker's above all). Left out: L2, equal queries, several interactive workers.
Environment: BENCH_SECONDS.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from processor.client import Client, Outcome
from processor.domain import CallKind, ProviderCall
from tests.support import audit
from tests.support.load import Course, Say, ingestion, ready, some_texts, surroundings
from tests.support.provider_server import ProviderProcess
from tests.support.stack import until

PARTITIONS = 4
DIMENSIONS = 1536
SECONDS = float(os.environ.get("BENCH_SECONDS", "40"))
QUERIES_PER_S = 20.0
WARM_UP_S, WARM_UP_PER_S = 10.0, 60.0
ECHOES_PER_S = 10.0
BASE_MS, PER_TEXT_MS = 100, 1
REQUESTS_PER_MINUTE = 24_000
TOKENS_PER_MINUTE = 6_000_000
SHARE_PERCENT = 10
BURST = 1 / 20
"""Of a minute's limit: as much as the server lets through at once, so that the backlog meets the limit soon."""
BACKLOG_CHUNKS = 80_000

BARS = {"alone_p50_ms": 10, "beside_p50_ms": 25, "beside_p99_ms": 100}


@dataclass(frozen=True, slots=True)
class Asked:
    """One query: how long until its answer, and the answer."""

    took_ms: float
    outcome: Outcome


async def run(say: Say) -> dict[str, Any]:
    """Overhead of queries alone and beside the backlog, echoes beside both, and `bars` with whether each is met."""
    options = ["--base-ms", str(BASE_MS), "--per-text-ms", str(PER_TEXT_MS)]
    options += ["--requests-per-minute", str(REQUESTS_PER_MINUTE), "--tokens-per-minute", str(TOKENS_PER_MINUTE)]
    options += ["--burst", str(BURST)]
    with surroundings(say, *options) as (broker, provider, folder):
        figures: dict[str, Any] = {
            "broker": broker.kind,
            "queries_per_s": QUERIES_PER_S,
            "seconds": SECONDS,
            "tokens_per_minute": TOKENS_PER_MINUTE,
            "interactive_share_percent": SHARE_PERCENT,
        }
        async with Course(broker, provider, folder, dimensions=DIMENSIONS, partitions=PARTITIONS) as course:
            limits = {
                "EMBEDDING_REQUESTS_PER_MINUTE": str(REQUESTS_PER_MINUTE),
                "EMBEDDING_TOKENS_PER_MINUTE": str(TOKENS_PER_MINUTE),
                "EMBEDDING_INTERACTIVE_SHARE_PERCENT": str(SHARE_PERCENT),
            }
            with course.stack(**limits) as stack:
                interactive = stack.spawn("worker", EMBEDDING_LANE="interactive")
                await ready([interactive])
                async with Client(course.settings, source_service="bench") as client:
                    await ask(client, "warm-up", WARM_UP_S, WARM_UP_PER_S)
                figures |= await phase("alone", course, provider)
                say(", ".join(f"{name} {value}" for name, value in figures.items()))
                await course.append(ingestion(some_texts(BACKLOG_CHUNKS), DIMENSIONS))
                bulk = stack.spawn("worker")
                await until(lambda: _bulk_tokens(provider) > 0, within_s=60, what="the backlog is worked on")
                figures |= await phase("beside", course, provider)
                for worker in (bulk, interactive):
                    assert worker.stop() == 0, worker.tail()
    say(", ".join(f"{name} {value}" for name, value in figures.items() if name.startswith("beside")))
    return figures | {"bars": bars(figures)}


async def phase(name: str, course: Course, provider: ProviderProcess) -> dict[str, Any]:
    """So many seconds of queries and echoes; the provider's ledger begins anew with each."""
    provider.admin("reset", {})
    began = time.monotonic()
    async with Client(course.settings, source_service="bench") as client, echoing(course) as echoes:
        asked = await ask(client, name, SECONDS, QUERIES_PER_S)
    took_s = time.monotonic() - began
    bills = provider.admin("ledger")["requests"]
    held_ms = {bill["attempt_id"]: bill["done_ms"] - bill["at_ms"] for bill in bills if bill["done_ms"] is not None}
    provider_ms: dict[str, float] = {}
    async for _, call in audit.read_topic(course.settings, "calls", ProviderCall):
        if call.kind is CallKind.INTENT and call.attempt_id in held_ms:
            provider_ms |= dict.fromkeys((item.request_id for item in call.items), held_ms[call.attempt_id])
    counted = [one for one in asked if one.outcome.ok]
    overheads = [one.took_ms - provider_ms[one.outcome.request_id] for one in counted]
    bulk = [bill for bill in bills if bill["inputs"] > QUERIES_PER_S]
    used = sum(bill["tokens"] for bill in bulk if bill["billed"])
    return {
        f"{name}_queries": len(asked),
        f"{name}_failed": sum(not one.outcome.ok for one in asked),
        **{f"{name}_{word}": value for word, value in percentiles(overheads).items()},
        f"{name}_whole_p50_ms": round(statistics.median(one.took_ms for one in counted), 1),
        **{f"{name}_echo_{word}": value for word, value in percentiles(echoes).items()},
        f"{name}_calls": len(bills) - len(bulk),
        f"{name}_throttled": sum(bill["status"] == 429 for bill in bills),
        f"{name}_bulk_calls": len(bulk),
        f"{name}_bulk_quota_used": round(used / (TOKENS_PER_MINUTE / 60 * took_s), 2),
    }


async def ask(client: Client, name: str, seconds: float, per_s: float) -> list[Asked]:
    """Queries at random moments, so many a second in the mean; none like another. The first one is not counted."""
    dice = random.Random(2)
    assert (await client.embed_query(f"{name} first", tenant_id="bench")).ok
    asking: list[asyncio.Task[Asked]] = []

    async def one(text: str) -> Asked:
        at = time.monotonic()
        outcome = await client.embed_query(text, tenant_id="bench", timeout_s=30)
        return Asked((time.monotonic() - at) * 1000, outcome)

    began, due_s = time.monotonic(), 0.0
    while due_s < seconds:
        await asyncio.sleep(due_s - (time.monotonic() - began))
        asking.append(asyncio.create_task(one(f"{name} {len(asking)}: what delays a query beside a long backlog")))
        due_s += dice.expovariate(per_s)
    return await asyncio.gather(*asking)


@asynccontextmanager
async def echoing(course: Course) -> AsyncIterator[list[float]]:
    """Milliseconds from producing a record to having consumed it, measured again and again meanwhile."""
    topic = await course.create(f"echo-{random.getrandbits(32):08x}")
    servers = course.broker.bootstrap_servers
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, group_id=None, auto_offset_reset="earliest")
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    echoes: list[float] = []

    async def echo() -> None:
        while True:
            at = time.monotonic()
            await producer.send(topic, b"echo" * 75, partition=0)
            await consumer.getone()
            echoes.append((time.monotonic() - at) * 1000)
            await asyncio.sleep(1 / ECHOES_PER_S)

    async with consumer, producer:
        consumer.assign([TopicPartition(topic, 0)])
        task = asyncio.create_task(echo())
        try:
            yield echoes
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_ms, n=100)
    return {"p50_ms": round(cuts[49], 1), "p99_ms": round(cuts[98], 1)}


def _bulk_tokens(provider: ProviderProcess) -> int:
    return sum(bill["tokens"] for bill in provider.admin("ledger")["requests"] if bill["inputs"] > QUERIES_PER_S)


def bars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar with what was measured and whether it is met."""
    return {
        name: {"measured": figures[name], "bar": f"<= {most}", "met": "yes" if figures[name] <= most else "no"}
        for name, most in BARS.items()
    }
