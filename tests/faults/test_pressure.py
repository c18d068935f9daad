"""A broker that is away and a provider that is slow: nothing is lost, memory stays bounded, the group is kept.

Ten minutes without a broker are scaled down by `SCALE`, and with them every time that decides what becomes of a worker
meanwhile: its settings, and the back-off of the runtime that starts it again. What is not scaled (requests to a broker
that hangs are given up after 40 s) is longer than the deadlines that are, and so never what ends a wait here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from faust.transport import consumer as faust_consumer

from processor.adapters import topics
from processor.adapters.faust_engine.thread import FETCH_BYTES, RECORDS_PER_FETCH
from processor.ports import Run
from processor.settings import Settings
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.engines import Handler, create_topic, engine_settings, running
from tests.support.engines import until as until_here
from tests.support.kafka import ApacheKafka
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic, hard_requests

SCALE = 10
OUTAGE_S = 600 / SCALE
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 10 / SCALE, 300 / SCALE
"""Those of Kubernetes."""
TIMES = ("delivery_timeout_s", "broker_wait_s", "session_timeout_s", "heartbeat_interval_s", "lease_margin_s")
SCALED = {name: Settings.model_fields[name].default / SCALE for name in (*TIMES, "revoke_budget_s")}
ENDS_AFTER_S = {"DeliveryFailed": SCALED["delivery_timeout_s"], "BrokerUnavailable": SCALED["broker_wait_s"]}
"""How long a process waits before it ends with such an error."""

DIMENSIONS = 8
PARTITIONS = 4
CHUNKS = 5
READ_AHEAD_BYTES = 4_000_000
BYTES_A_TEXT = 5_000
MEBIBYTE = 2**20

Tell = Callable[[str], None]


class End(NamedTuple):
    """A process that ended by itself: its code, and the last line of its log."""

    code: int
    said: dict[str, Any]


@dataclass
class Supervised:
    """A worker under a runtime that starts it again, and later and later the more often it ends."""

    child: Child
    ends: list[End]
    rss_bytes: list[tuple[float, int]]
    """(monotonic time, resident bytes), ten a second."""


@asynccontextmanager
async def supervised(stack: Stack) -> AsyncIterator[Supervised]:
    """A worker from here on; stopped cleanly afterwards."""
    worker = Supervised(stack.spawn("worker"), [], [])

    async def supervise() -> None:
        back_off_s = FIRST_BACK_OFF_S
        while True:
            code = worker.child.process.poll()
            if code is None:
                pid = worker.child.process.pid
                if resident := _resident_bytes(pid):
                    worker.rss_bytes.append((time.monotonic(), resident))
                await asyncio.sleep(0.1)
                continue
            lines = worker.child.log.read_text(errors="replace").splitlines()
            worker.ends.append(End(code, json.loads(lines[-1])))
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
            worker.child = stack.spawn("worker")

    supervising = asyncio.create_task(supervise())
    try:
        yield worker
    finally:
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
    assert worker.child.stop() == 0, worker.child.tail()


@asynccontextmanager
async def away(broker: ApacheKafka, how: str) -> AsyncIterator[None]:
    """Frozen (connections stand, nobody answers) or killed (connections are refused; its data stays)."""
    if how == "killed":
        await asyncio.to_thread(broker.kill)
        yield
        await asyncio.to_thread(broker.start)
        return
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def provider_of(provider: ProviderProcess, **others: str) -> dict[str, str]:
    """The environment of workers that use it."""
    return {
        "EMBEDDING_PROVIDER": "openai",
        "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
        "EMBEDDING_OPENAI_API_KEY": "tests",
        "EMBEDDING_DEFAULT_MODEL": "text-embedding-3-small",
        "EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL": f'{{"text-embedding-3-small": {DIMENSIONS}}}',
        "EMBEDDING_READ_AHEAD_BYTES": str(READ_AHEAD_BYTES),
        "EMBEDDING_WINDOW_MAX_TEXTS": "64",
    } | others


@pytest.mark.faults
@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_ten_minutes_without_a_broker_cost_nothing(
    how: str, own_kafka: ApacheKafka, unique: str, tmp_path: Path, tell: Tell
) -> None:
    """Every chunk has its outcome and its charge; memory stands still; ends are few and say why."""
    scaled = {f"EMBEDDING_{name.upper()}": str(seconds) for name, seconds in SCALED.items()}
    before, after = hard_requests(1500, chunks=CHUNKS), hard_requests(300, chunks=CHUNKS, seed=2)
    with (
        ProviderProcess("--jitter", "0.01", "--base-ms", "200") as provider,
        Stack(tmp_path, unique, own_kafka.bootstrap_servers, **provider_of(provider, **scaled)) as stack,
    ):
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        async with (
            Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic,
            supervised(stack) as worker,
        ):
            await until(worker.child.ready, within_s=60, what="the worker is ready")
            await traffic.send(before)

            async def flows() -> bool:
                return await traffic.results() >= CHUNKS * 100

            await until(flows, within_s=60, what="results flow")

            async def committed() -> bool:
                """No while the broker that is back has not found its bearings."""
                try:
                    return await traffic.all_committed()
                except KafkaError as error:
                    if not error.retriable:
                        raise
                    return False

            gone_at = time.monotonic()
            async with away(own_kafka, how):
                await asyncio.sleep(OUTAGE_S)
            back_at = time.monotonic()
            await traffic.send(after)
            await until(committed, within_s=120, what="every request is committed")
            settled_s = time.monotonic() - back_at
        books = await audit.read_books(settings, provider.admin("ledger")["requests"])
    copies = audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS)
    audit.check_charges(books)
    residuals = audit.check_attempts(books)
    began, most = _growth(worker.rss_bytes, gone_at, back_at)
    tell(
        f"{OUTAGE_S:.0f} s with the broker {how} (scale 1:{SCALE}): ends {[end.said['error'] for end in worker.ends]}, "
        f"all done {settled_s:.0f} s after, copies {copies}, MiB when it went {began // MEBIBYTE}, most while it was "
        f"away {most // MEBIBYTE}, residuals {asdict(residuals)}"
    )
    assert {end.code for end in worker.ends} <= {1}
    assert {end.said["error"] for end in worker.ends} <= set(ENDS_AFTER_S)
    assert all(end.said["why"] for end in worker.ends)
    # Each has waited its time: few fit into the outage. The first delivery that fails was under way when it began.
    waited_s = sum(ENDS_AFTER_S[end.said["error"]] for end in worker.ends)
    assert waited_s <= back_at - gone_at + settled_s + ENDS_AFTER_S["DeliveryFailed"], worker.ends
    assert most - began <= 32 * MEBIBYTE


def _resident_bytes(pid: int) -> int | None:
    """None when the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None


def _growth(samples: list[tuple[float, int]], begin: float, end: float) -> tuple[int, int]:
    """Resident bytes when the broker went, and the most that any process had while it was away."""
    meanwhile = [resident for at, resident in samples if begin <= at <= end]
    return meanwhile[0], max(meanwhile)


@pytest.mark.faults
async def test_a_slow_provider_is_backpressure(kafka: Broker, unique: str, tmp_path: Path, tell: Tell) -> None:
    """For three sessions its read-ahead is bounded, heartbeats go on and no generation passes; then all gets done."""
    # A record is admitted while there is room at all: the bound is passed by less than the largest one.
    requests = hard_requests(1500, chunks=CHUNKS)
    largest = 5_000 + CHUNKS * BYTES_A_TEXT
    limit_bytes = 4_000_000
    with (
        ProviderProcess("--jitter", "0.01", "--base-ms", "2500") as provider,
        Stack(
            tmp_path,
            unique,
            kafka.bootstrap_servers,
            **provider_of(provider, EMBEDDING_READ_AHEAD_BYTES=str(limit_bytes), EMBEDDING_SESSION_TIMEOUT_S="12"),
        ) as stack,
    ):
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
            worker = stack.spawn("worker")
            await until(worker.ready, within_s=60, what="the worker is ready")
            await traffic.send(requests)
            health: list[dict[str, Any]] = []

            async def full() -> bool:
                return _held_bytes(await worker.report("/health/detailed")) >= limit_bytes

            await until(full, within_s=60, what="the read-ahead is full")
            watched_until = time.monotonic() + 3 * settings.session_timeout_s
            while time.monotonic() < watched_until:
                health.append(await worker.report("/health/detailed"))
                await asyncio.sleep(0.1)
            worker.check()
            await until(traffic.all_committed, within_s=240, what="every request is committed")
            generation = (await worker.report("/health/detailed"))["kafka"]["generation"]
            assert worker.stop() == 0, worker.tail()
        books = await audit.read_books(settings, provider.admin("ledger")["requests"])
    audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS)
    most = max(map(_held_bytes, health))
    ages_s = [look["kafka"]["heartbeat_age_s"] for look in health]
    tell(f"slow provider: read-ahead at most {most} of {limit_bytes} bytes, oldest heartbeat {max(ages_s):.1f} s")
    assert limit_bytes <= most < limit_bytes + largest
    assert {look["kafka"]["generation"] for look in health} == {generation}
    assert all(look["kafka"]["leases_held"] for look in health)
    assert max(ages_s) < settings.session_timeout_s - settings.lease_margin_s


@pytest.mark.faults
@pytest.mark.parametrize(
    "records, size_bytes, compression",
    [(60, 900_000, None), (120, 900_000, "gzip"), (40_000, 10, None)],
    ids=["large_records", "large_compressed_records", "tiny_records"],
)
async def test_runs_in_flight_are_bounded_and_buffers_are_never_full(
    records: int,
    size_bytes: int,
    compression: str | None,
    kafka: Broker,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
) -> None:
    """One run is in hand and at most one a partition waits, of one fetch: Faust never waits its second for room."""
    # A fetch is bounded in bytes too, also of records that take little room only until they are unpacked.
    waited: list[str] = []
    monkeypatch.setattr(faust_consumer.Consumer, "_wait_next_records", lambda *_: waited.append("a second"))
    await create_topic(kafka.bootstrap_servers, unique, PARTITIONS)
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers,
        max_request_size=1_000_000,
        max_batch_size=10_000_000 if compression else 16_384,
        linger_ms=50,
        compression_type=compression,
    ) as producer:
        sent = [await producer.send(unique, bytes(size_bytes), partition=i % PARTITIONS) for i in range(records)]
        await asyncio.gather(*sent)
    most_runs = most_records = 0

    async def on_run(run: Run) -> None:
        """Slow enough that the next fetch waits behind it."""
        nonlocal most_runs, most_records
        consumer = engine._consumer
        assert consumer is not None
        if len(handler.runs) == 1:
            await until_here(lambda: bool(consumer._queued), "another run waits")
        for _ in range(10):
            await asyncio.sleep(0.002)
            most_runs = max(most_runs, 1 + len(consumer._queued))
            most_records = max(most_records, sum(len(lease.watermark) for lease in (consumer.leases or {}).values()))
        await handler.finish_all(run)

    handler = Handler(on_run)
    async with running(engine_settings(kafka.bootstrap_servers), unique, handler) as engine:
        await until_here(lambda: len(handler.finished) == records, "every record", within_s=120)
    most_bytes = most_records * size_bytes
    tell(f"{size_bytes:,} B a record: at most {most_runs} runs, {most_records} records, {most_bytes:,} B in flight")
    assert not waited
    assert 1 < most_runs <= 1 + PARTITIONS
    assert most_records <= 2 * RECORDS_PER_FETCH
    assert most_bytes <= 2 * FETCH_BYTES


def _held_bytes(health: dict[str, Any]) -> int:
    held: int = health["work"]["read_ahead_bytes"]
    return held
