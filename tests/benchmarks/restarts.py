"""What a rolling restart costs the flow: two workers are restarted one after the other, in three ways.

`stop_first`: each is stopped, then started again. `start_first`: its successor is started and ready before it is
stopped, as a Kubernetes Deployment with maxSurge 1 does. `static`: stopped first, with a `group.instance.id` that the
successor takes over. Sessions and heartbeats are the default ones. A gap is the time between two results in a row, by
the broker's or worker's time stamps: over the whole topic, and of the source partition that stood still longest. Left
out: a machine that dies, and restarts that take longer than the session.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from processor.adapters import topics
from processor.settings import Settings
from tests.support import audit
from tests.support.brokers import Servers
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic, small_requests

PARTITIONS = 6
PER_S = 300
RECORDS = 60 * PER_S
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "1"))
Way = Literal["stop_first", "start_first", "static"]
WAYS: tuple[Way, ...] = ("stop_first", "start_first", "static")

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Generations and gaps of each way, medians over BENCH_ROUNDS rounds (default 1)."""
    servers = Servers()
    try:
        broker = servers.broker()
        if not broker.is_apache_kafka:
            raise SystemExit("the embedded broker rebalances in its own way: this needs Apache Kafka")
        rounds: dict[str, list[float]] = defaultdict(list)
        for round_ in range(ROUNDS):
            for way in WAYS:
                measured = await restart(way, broker.bootstrap_servers)
                say(f"round {round_}: {way}: {measured}")
                for name, value in measured.items():
                    rounds[f"{way}_{name}"].append(value)
        return {"broker": broker.kind} | {name: statistics.median(values) for name, values in rounds.items()}
    finally:
        servers.close()


async def restart(way: Way, bootstrap_servers: str) -> dict[str, float]:
    """Restart each of two workers once while records flow."""
    defaults = Settings()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProviderProcess("--base-ms", "1", "--per-text-ms", "0") as provider,
        Stack(
            Path(folder),
            f"restarts-{uuid.uuid4().hex[:8]}",
            bootstrap_servers,
            EMBEDDING_PROVIDER="openai",
            EMBEDDING_OPENAI_BASE_URL=provider.base_url,
            EMBEDDING_OPENAI_API_KEY="tests",
            EMBEDDING_SESSION_TIMEOUT_S=str(defaults.session_timeout_s),
            EMBEDDING_HEARTBEAT_INTERVAL_S=str(defaults.heartbeat_interval_s),
            EMBEDDING_LEASE_MARGIN_S=str(defaults.lease_margin_s),
            EMBEDDING_REVOKE_BUDGET_S=str(defaults.revoke_budget_s),
        ) as stack,
    ):
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
            workers = [await _start(stack, way, number) for number in range(2)]
            await until(lambda: all(_held(worker) == PARTITIONS // 2 for worker in workers), within_s=60, what="shares")
            before = _generation(workers[0])
            flow = asyncio.create_task(traffic.flow(small_requests(RECORDS), per_s=PER_S, burst=PER_S // 10))
            await asyncio.sleep(5)
            for number in range(2):
                if way == "start_first":
                    successor = await _start(stack, way, number)
                    await asyncio.to_thread(workers[number].stop)
                else:
                    await asyncio.to_thread(workers[number].stop)
                    successor = await _start(stack, way, number)
                workers[number] = successor
                await until(lambda: sum(map(_held, workers)) == PARTITIONS, within_s=60, what="all partitions are held")
                await asyncio.sleep(2)
            generations = _generation(workers[0]) - before
            flow.cancel()
            await asyncio.wait({flow})
            await until(traffic.all_committed, within_s=60, what="all is committed")
            for worker in workers:
                await asyncio.to_thread(worker.stop)
        return {"generations": generations} | _gaps(await audit.read_books(settings, []))


async def _start(stack: Stack, way: Way, number: int) -> Child:
    own = {"EMBEDDING_GROUP_INSTANCE_ID": f"worker-{number}"} if way == "static" else {}
    worker = stack.spawn("worker", **own)
    await until(worker.ready, within_s=60, what=f"{worker.name} is ready", every_s=0.05)
    return worker


def _kafka(worker: Child) -> dict[str, Any]:
    worker.check()
    health: dict[str, Any] = (worker.get("/health/detailed") or {}).get("kafka", {})
    return health


def _held(worker: Child) -> int:
    return len(_kafka(worker).get("partitions", ()))


def _generation(worker: Child) -> int:
    generation: int = _kafka(worker)["generation"]
    return generation


def _gaps(books: audit.Books) -> dict[str, float]:
    """Longest time in seconds without a result, of all and of the one source partition that was hit most."""
    times: defaultdict[int, list[int]] = defaultdict(list)
    for record, result in books.results:
        times[int(result.source_version.split("-")[1])].append(record.source.append_ms)
    everything = [at for each in times.values() for at in each]
    return {
        "longest_gap_s": _longest(everything),
        "longest_gap_of_a_partition_s": max(map(_longest, times.values())),
        "mean_longest_gap_of_the_partitions_s": round(statistics.mean(map(_longest, times.values())), 1),
    }


def _longest(times_ms: list[int]) -> float:
    return round(max(later - earlier for earlier, later in pairwise(sorted(times_ms))) / 1000, 1)
