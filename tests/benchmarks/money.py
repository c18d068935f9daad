"""The bill through three kills, and what the aggregator costs: CPU, disk, and time to be back.

`killed`: an aggregator folds BENCH_EVENTS usage events (5% of them copies, 1% charged before the horizon, 50 requests a
provider call) in three dimensions from the beginning and is ended by SIGKILL three times; then totals, ledger and log
are compared, by a plain set and by `usage audit`. Rates are measured undisturbed on BENCH_KEYS others, from a twentieth
of them on; `baseline` is a loop of aiokafka and fastavro that only reads and decodes. Recovery is from the start of the
process to the last offset folded, after an orderly stop. Failover is from SIGKILL of the active aggregator to the next
published total of its standby, which has a store of its own. clock_skew, closed_month, topic_grown and topic_recreated
are tried on processes of their own, see tests/support/money_cases.py, and so is a budget's overshoot. Left out: the
network, and a machine that dies. Environment: BENCH_EVENTS, BENCH_KEYS.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from fastavro import schemaless_reader

from processor.adapters import topics
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from processor.cli.audit import run_audit
from processor.cli.totals import read_totals
from processor.settings import Settings
from tests.support.bills import Recount, produce_bills, some_bills
from tests.support.brokers import Broker, Servers, ends_of
from tests.support.load import FILL_BATCH_BYTES, cpu_s, resident_mb
from tests.support.money_cases import outcomes
from tests.support.overshoot import Overshoot, measure_overshoot
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Child, Stack, until

EVENTS = int(os.environ.get("BENCH_EVENTS", "200000"))
KEYS = int(os.environ.get("BENCH_KEYS", "1060000"))
"""Events whose recovery is timed; a twentieth of them are copies, so that their keys are a million."""
PARTITIONS = 4
KILLS = 3
LOOK_EVERY_S = 0.05
ASK_EVERY_S = 0.25
"""How far it is costs the aggregator a few milliseconds."""
PATIENCE_S = 900.0
LEAST_S = 0.01
"""A clock's tick: the machine may have stood still while all was folded."""
CALL_MS, BACKLOG_TEXTS, BUDGET_TOKENS = 100, 6_000, 50_000
EVENTS_PER_S_PER_CORE, STATE_BYTES_PER_EVENT = 10_000, 100

Say = Callable[[str], None]


async def run(say: Say) -> dict[str, Any]:
    """Figures of all of the above, and `bars`."""
    figures: dict[str, Any] = {"events": EVENTS, "partitions": PARTITIONS, "cores": os.cpu_count()}
    with closing(Servers()) as servers, tempfile.TemporaryDirectory() as folder:
        broker = servers.broker()
        for line in servers.report:
            say(line)
        if not broker.is_apache_kafka:
            raise SystemExit("the embedded broker does not stamp records with the time of appending")
        async with a_log(Path(folder), broker.bootstrap_servers, EVENTS, seed=1) as log:
            say(f"{EVENTS} events are on the topic")
            figures |= await killed(log, say)
            figures |= await failover(log, say)
        figures |= await overshoot(broker, Path(folder), say)
        async with AsyncExitStack() as stack:
            filling = a_log(Path(folder), broker.bootstrap_servers, KEYS, seed=2)
            log, cases = await asyncio.gather(
                stack.enter_async_context(filling), outcomes(Path(folder), broker.bootstrap_servers)
            )
            say(f"{KEYS} events are on the topic; {cases}")
            figures |= cases | await undisturbed(log, say)
    figures["ratio"] = round(figures["events_per_s_per_core"] / figures["baseline_events_per_s_per_core"], 2)
    return figures | {"bars": bars(figures)}


class Log(NamedTuple):
    """Topics that hold so many events, and the processes that read them."""

    stack: Stack
    settings: Settings
    consumer: AIOKafkaConsumer
    producer: AIOKafkaProducer
    events: int

    @property
    def usage(self) -> str:
        return self.settings.topic(topics.topics()["usage"].name)

    @property
    def store(self) -> Path:
        return self.settings.aggregator_store

    async def end(self) -> int:
        return sum((await ends_of(self.consumer, self.usage, PARTITIONS)).values())


@asynccontextmanager
async def a_log(folder: Path, bootstrap_servers: str, events: int, *, seed: int) -> AsyncIterator[Log]:
    prefix = f"money-{uuid.uuid4().hex[:8]}"
    (own := folder / prefix).mkdir()
    with Stack(own, prefix, bootstrap_servers, EMBEDDING_LOG_LEVEL="WARNING") as stack:
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, group_id=None)
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, max_batch_size=FILL_BATCH_BYTES)
        async with consumer, producer:
            now_ms = int(time.time() * 1000)
            await produce_bills(producer, settings, some_bills(events, partitions=PARTITIONS, now_ms=now_ms, seed=seed))
            yield Log(stack, settings, consumer, producer, events)


def folded(child: Child, topic: str) -> int:
    """How many offsets of the topic it has folded, saved and given free for commit."""
    child.check()
    kafka = (child.get("/health/detailed") or {}).get("kafka", {})
    return sum(
        each["first_unfinished"]
        for each in kafka.get("partitions", ())
        if each["partition"].rpartition("/")[0] == topic
    )


async def folds_to(child: Child, log: Log, offset: int) -> int:
    """Wait until it has folded so many; how many there were then."""
    known = 0

    def there() -> bool:
        nonlocal known
        known = folded(child, log.usage)
        return known >= offset

    await until(there, within_s=PATIENCE_S, what=f"{offset} events are folded", every_s=ASK_EVERY_S)
    return known


# --- money: nothing twice, nothing missed --------------------------------------------------------------------


async def killed(log: Log, say: Say) -> dict[str, Any]:
    """Fold all of it through SIGKILLs, and hold the totals against the log."""
    for kill in range(1, KILLS + 1):
        child = log.stack.spawn("aggregator")
        say(f"killed at {await folds_to(child, log, log.events * kill // (KILLS + 1))}")
        child.kill()
    child = log.stack.spawn("aggregator")
    await folds_to(child, log, log.events)
    await until(lambda: all_folded(child), within_s=PATIENCE_S, what="the calls are folded")
    await asyncio.to_thread(child.stop)
    recount, baseline = await read_plainly(log)
    compared = recount.compare(await read_totals(log.settings))
    report = await run_audit(log.settings)
    late = await ends_of(log.consumer, log.settings.topic("token-usage-late"), PARTITIONS)
    return {
        "kills": KILLS,
        "double_counted": compared.double_counted,
        "missed": compared.missed,
        "different_buckets": compared.different_buckets,
        "buckets": len(recount.totals),
        "late_charges": recount.late,
        "late_records": sum(late.values()),
        "audit_clean": report.clean,
        "audit_s": round(report.seconds, 1),
        "baseline_events_per_s_per_core": round(baseline),
    }


def all_folded(child: Child) -> bool:
    child.check()
    partitions = (child.get("/health/detailed") or {}).get("kafka", {}).get("partitions", ())
    return bool(partitions) and all(each["lag"] == 0 for each in partitions)


async def read_plainly(log: Log) -> tuple[Recount, float]:
    """The recount, and how many events a second of CPU aiokafka and fastavro read and decode."""
    recount, spent_s, left = Recount(), 0.0, log.events
    places = [TopicPartition(log.usage, partition) for partition in range(PARTITIONS)]
    schema = current("TokenUsage").parsed
    log.consumer.assign(places)
    await log.consumer.seek_to_beginning(*places)
    while left:
        begun_s = time.process_time()
        fetched = await log.consumer.getmany(*places, timeout_ms=1000)
        for place, records in fetched.items():
            events = []
            for record in records:
                stream = BytesIO(record.value)
                stream.seek(SINGLE_OBJECT_HEADER_BYTES)
                events.append((record.timestamp, schemaless_reader(stream, schema, None)))
            spent_s += time.process_time() - begun_s
            left -= len(events)
            for append_ms, event in events:
                recount.take(place.partition, append_ms, event)  # type: ignore[arg-type]  # a record, not a union
            begun_s = time.process_time()
    return recount, log.events / spent_s


async def failover(log: Log, say: Say) -> dict[str, Any]:
    """SIGKILL the active aggregator while usage flows, beside a standby that has a store of its own."""
    other = log.store.with_name("standby.sqlite")
    shutil.copy(log.store, other)
    active = log.stack.spawn("aggregator")
    await until(active.ready, within_s=PATIENCE_S, what="the active aggregator is ready")
    standby = log.stack.spawn("aggregator", EMBEDDING_AGGREGATOR_STORE=str(other))
    await until(standby.ready, within_s=PATIENCE_S, what="the standby is ready")
    flow = asyncio.create_task(trickle(log))
    await asyncio.sleep(2)
    totals = log.settings.topic("token-usage-totals")
    active.kill()
    begun = time.monotonic()
    # What it had under way may still arrive.
    await asyncio.sleep(0.2)
    before = sum((await ends_of(log.consumer, totals, PARTITIONS)).values())

    async def moved() -> bool:
        return sum((await ends_of(log.consumer, totals, PARTITIONS)).values()) > before

    await until(moved, within_s=PATIENCE_S, what=f"totals move again\n{standby.tail()}", every_s=LOOK_EVERY_S)
    failover_s = time.monotonic() - begun
    flow.cancel()
    await asyncio.wait({flow})
    await asyncio.to_thread(standby.stop)
    say(f"failover in {failover_s:.1f} s")
    session_s = log.settings.session_timeout_s
    return {
        "failover_s": round(failover_s, 2),
        "failover_session_timeout_s": session_s,
        "failover_rest_s": round(failover_s - session_s, 2),
    }


async def trickle(log: Log) -> None:
    """A call's charges every tenth of a second."""
    for seed in range(10, 10_000):
        bills = some_bills(50, partitions=PARTITIONS, now_ms=int(time.time() * 1000), seed=seed)
        await produce_bills(log.producer, log.settings, bills)
        await asyncio.sleep(0.1)


async def overshoot(broker: Broker, folder: Path, say: Say) -> dict[str, Any]:
    """One payer's backlog of many times its budget: what is charged beyond it, and the budget's delay in seconds."""

    async def of(workers: int) -> Overshoot:
        (own := folder / f"budget-{workers}").mkdir()
        with ProviderProcess("--base-ms", str(CALL_MS), "--per-text-ms", "0") as provider:
            found = await measure_overshoot(
                broker, provider, own, texts=BACKLOG_TEXTS, budget_tokens=BUDGET_TOKENS, workers=workers
            )
        say(f"{workers} workers: {found}")
        return found

    found, of_three = await of(1), await of(3)
    return {
        "budget_tokens": found.budget_tokens,
        "budget_overshoot_tokens": found.tokens,
        "budget_overshoot_in_flight_tokens": found.in_flight_tokens,
        "budget_overshoot_lag_tokens": found.lag_tokens,
        "budget_overshoot_s": round(found.seconds, 2),
        "budget_overshoot_three_workers_tokens": of_three.tokens,
    }


# --- what it costs -------------------------------------------------------------------------------------------


async def undisturbed(log: Log, say: Say) -> dict[str, Any]:
    child = log.stack.spawn("aggregator")
    pid = child.process.pid
    first = await folds_to(child, log, log.events // 20)
    begun, spent_s = time.monotonic(), cpu_s(pid)
    await folds_to(child, log, log.events)
    wall_s, spent_s, events = time.monotonic() - begun, cpu_s(pid) - spent_s, log.events - first
    memory_mb = resident_mb(pid, peak=True)
    say(f"folded {events} in {wall_s:.1f} s, {spent_s:.1f} s of CPU")
    await until(lambda: all_folded(child), within_s=PATIENCE_S, what="the calls are folded")
    await asyncio.to_thread(child.stop)
    with closing(sqlite3.connect(log.store)) as store:
        ((seen_keys,),) = store.execute("SELECT COUNT(*) FROM seen").fetchall()
    figures: dict[str, Any] = {
        "seen_keys": seen_keys,
        "events_per_s_per_core": round(events / max(spent_s, LEAST_S)),
        "events_per_s": round(events / max(wall_s, LEAST_S)),
        "peak_memory_mb": round(memory_mb),
        "state_bytes_per_event": round(log.store.stat().st_size / log.events, 1),
        "recovery_s_local": await recovery(log),
    }
    for part in log.store.parent.glob(f"{log.store.name}*"):
        part.unlink()
    return figures | {"recovery_s_rebuilt": await recovery(log)}


async def recovery(log: Log) -> float:
    """Seconds from starting the process to its having folded all there is."""
    begun = time.monotonic()
    child = log.stack.spawn("aggregator")
    await folds_to(child, log, log.events)
    took_s = time.monotonic() - begun
    await asyncio.to_thread(child.stop)
    return round(took_s, 1)


def bars(figures: Mapping[str, Any]) -> dict[str, bool]:
    return {
        "double_counted": figures["double_counted"] == 0,
        "missed": figures["missed"] == 0,
        "audit_clean": figures["audit_clean"],
        "events_per_s_per_core": figures["events_per_s_per_core"] >= EVENTS_PER_S_PER_CORE,
        "state_bytes_per_event": figures["state_bytes_per_event"] <= STATE_BYTES_PER_EVENT,
    } | {name: figures[name] == "ok" for name in ("clock_skew", "closed_month", "topic_grown", "topic_recreated")}
