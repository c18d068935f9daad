"""Provider calls that a small tenant waits for behind a large one: 50 chunks, a second after 100,000 others.

Counted are the calls that the provider began from a moment until the one that carries the small tenant's last text,
that one included; the least possible is 1. The moment is when the worker had its request in the read-ahead, told by the
result of a `validate` just before it in its partition, which has to wait for nothing else; the same since the broker
appended it is printed beside. All clocks are this machine's. All of the large tenant's chunks fit into the read-ahead,
which is raised for it. `behind`: the small request lies in its partition behind a share of the large backlog, which is
read in the order of the log. `apart`: it has a partition of its own.
Left out: what lies beyond the read-ahead, which nobody can reorder. Environment: BENCH_CHUNKS.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from processor.adapters.avro import encode_request
from processor.domain import CallKind, ProviderCall, ReceivedResult
from processor.identity import request_id
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.load import Course, Say, fill, ingestion, ready, some_texts, surroundings
from tests.support.provider_server import ProviderProcess
from tests.support.stack import until

PARTITIONS = 4
DIMENSIONS = 384
CHUNKS = int(os.environ.get("BENCH_CHUNKS", "100000"))
SMALL_CHUNKS = 50
LATER_S = 1.0
BASE_MS, PER_TEXT_MS = 100, 1
READ_AHEAD_BYTES = 2**30
WITHIN = 3
"""Calls beyond the least possible."""


async def run(say: Say) -> dict[str, Any]:
    """Calls and milliseconds that the small tenant waits for, behind the large one and apart from it; `bars`."""
    options = ("--base-ms", str(BASE_MS), "--per-text-ms", str(PER_TEXT_MS))
    with surroundings(say, *options) as (broker, provider, folder):
        figures: dict[str, Any] = {
            "broker": broker.kind,
            "chunks": CHUNKS,
            "small_chunks": SMALL_CHUNKS,
            "small_later_s": LATER_S,
            "read_ahead_bytes": READ_AHEAD_BYTES,
            "counted": "calls that began since the small request was admitted, up to the one with its last text",
            "least_calls": 1,
        }
        for name, partitions in (("behind", PARTITIONS), ("apart", PARTITIONS - 1)):
            measured = await measure(broker, provider, folder, partitions)
            say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in measured.items()))
            figures |= {f"{name}_{key}": value for key, value in measured.items()}
    return figures | {"bars": bars(figures)}


async def measure(broker: Broker, provider: ProviderProcess, folder: Path, partitions: int) -> dict[str, Any]:
    """The large tenant in the first `partitions`, the small one in the last of all."""
    large = [encode_request(request) for request in ingestion(some_texts(CHUNKS), DIMENSIONS, tenant="large")]
    [small] = ingestion(some_texts(SMALL_CHUNKS, seed=1), DIMENSIONS, tenant="small")
    mark = replace(small, tenant_id="mark", action="validate", chunks=small.chunks[:1])
    stamps = {"message.timestamp.type": "LogAppendTime"}
    async with Course(
        broker, provider, folder, dimensions=DIMENSIONS, partitions=PARTITIONS, results_config=stamps
    ) as course:
        with course.stack(EMBEDDING_READ_AHEAD_BYTES=str(READ_AHEAD_BYTES)) as stack:
            worker = stack.spawn("worker")
            await ready([worker])
            provider.admin("reset", {})
            await fill(course.producer, course.requests, large, partitions=partitions)
            await asyncio.sleep(LATER_S)
            for request in (mark, small):
                record = await course.producer.send_and_wait(
                    course.requests, encode_request(request), partition=PARTITIONS - 1
                )
            await until(all_there(course, worker.check), within_s=180, what="every result")
            assert worker.stop() == 0, worker.tail()
        bills = provider.admin("ledger")["requests"]
        wanted = request_id(small)
        calls = [call async for _, call in audit.read_topic(course.settings, "calls", ProviderCall)]
        carriers = {
            call.attempt_id
            for call in calls
            if call.kind is CallKind.INTENT and any(item.request_id == wanted for item in call.items)
        }
        results = [
            (stored.source.append_ms, result.tenant_id)
            async for stored, result in audit.read_topic(course.settings, "results", ReceivedResult)
        ]
    [admitted_ms] = [at_ms for at_ms, tenant in results if tenant == "mark"]
    before = [bill for bill in bills if bill["at_ms"] < record.timestamp]
    return {
        "calls_since_admitted": calls_until(carriers, bills, admitted_ms),
        "calls_since_appended": calls_until(carriers, bills, record.timestamp),
        "calls_that_carry_it": len(carriers),
        "admitted_after_ms": admitted_ms - record.timestamp,
        "last_result_after_ms": max(at_ms for at_ms, tenant in results if tenant == "small") - record.timestamp,
        "large_chunks_left": CHUNKS - sum(bill["inputs"] for bill in before),
        "calls": len(bills),
        "lost": CHUNKS + SMALL_CHUNKS + 1 - len(results),
    }


def calls_until(carriers: Set[str], bills: Sequence[Mapping[str, Any]], since_ms: int) -> int:
    """How many calls began since then, up to the last of the carriers; 1 if that one had begun by then."""
    since = [bill for bill in sorted(bills, key=lambda bill: bill["at_ms"]) if bill["at_ms"] >= since_ms]
    return max((place for place, bill in enumerate(since, 1) if bill["attempt_id"] in carriers), default=1)


def all_there(course: Course, check: Callable[[], None]) -> Callable[[], Any]:
    """A condition: whether every chunk has its result; raises once the worker is gone."""

    async def there() -> bool:
        check()
        return await course.end(course.results) >= CHUNKS + SMALL_CHUNKS + 1

    return there


def bars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar with what was measured and whether it is met."""
    judged: dict[str, Any] = {}
    for name in ("behind", "apart"):
        beyond = figures[f"{name}_calls_since_admitted"] - figures["least_calls"]
        met = "yes" if beyond <= WITHIN and figures[f"{name}_lost"] == 0 else "no"
        judged[name] = {"calls_beyond_the_least": beyond, "bar": f"<= {WITHIN}", "met": met}
    return judged
