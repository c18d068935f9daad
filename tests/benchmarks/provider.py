"""Calls, how full they are, and chunks a second of one worker on a backlog of distinct texts, beside plain Faust.

The provider takes 100 ms and 1 ms a text for a call, and OpenAI's limits: 2,048 inputs, and UTF-8 bytes / 4 up to
300,000. Requests hold 50 to 200 chunks of 450 to 750 bytes, as an ingestion service sends them; all are in their
topic before the worker starts. Time is counted from the first call that the provider sees until the last result is in
its topic, so starting and joining are left out, the latency of the first call is not. The baseline is Faust as its
manual shows it, `take(128)` with one awaited call, on the first of the same texts, one a record.
Left out: L2, several workers, limits by the minute. Environment: BENCH_CHUNKS, BENCH_SEQUENTIAL_CHUNKS.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from processor.adapters.avro import encode_request
from processor.domain import CallKind, ProviderCall, ReceivedResult, Request, Usage
from processor.identity import request_id
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.load import Course, Say, fill, ingestion, resident_mb, some_texts, surroundings
from tests.support.provider_server import ProviderProcess

PARTITIONS = 4
CHUNKS = int(os.environ.get("BENCH_CHUNKS", "100000"))
SEQUENTIAL_CHUNKS = int(os.environ.get("BENCH_SEQUENTIAL_CHUNKS", "5000"))
BASE_MS, PER_TEXT_MS = 100, 1
MAX_INPUTS = 2_048
MAX_BYTES = 4 * 300_000
"""Of a call's texts: OpenAI's estimate of a token is 4 bytes."""
LONGEST_HOLD = "embedding_longest_loop_hold_seconds"
LOOK_EVERY_S = 0.02
STALLED_S = 60.0

CALLS_RATIO, FILL = 1.05, 0.95
RATIOS = {384: 10.0, 1536: 6.0}


async def run(say: Say) -> dict[str, Any]:
    """Calls, fill, rates and their ratio, the ledger, what is lost, and `bars` with whether each is met."""
    with surroundings(say, "--base-ms", str(BASE_MS), "--per-text-ms", str(PER_TEXT_MS)) as (broker, provider, folder):
        figures: dict[str, Any] = {
            "broker": broker.kind,
            "chunks": CHUNKS,
            "sequential_chunks": SEQUENTIAL_CHUNKS,
            "call_ms": f"{BASE_MS} + {PER_TEXT_MS} a text",
        }
        texts = some_texts(CHUNKS)
        for dimensions in RATIOS:
            measured = await measure(broker, provider, folder, texts, dimensions)
            say(f"d={dimensions}: " + ", ".join(f"{name} {value}" for name, value in measured.items()))
            figures |= {f"{name}_d{dimensions}": value for name, value in measured.items()}
    return figures | {"bars": bars(figures)}


async def measure(
    broker: Broker, provider: ProviderProcess, folder: Path, texts: Sequence[str], dimensions: int
) -> dict[str, Any]:
    """The worker on all of the texts, then the baseline on some of them."""
    requests = list(ingestion(texts, dimensions))
    async with Course(
        broker, provider, folder, dimensions=dimensions, partitions=PARTITIONS, results_config={}
    ) as course:
        await course.append(requests)
        provider.admin("reset", {})
        with course.stack() as stack:
            worker = stack.spawn("worker")
            seconds = await elapsed(course, provider, course.results, len(texts), worker.check)
            hold_s = await asyncio.to_thread(worker.metric, LONGEST_HOLD)
            figures: dict[str, Any] = {
                "chunks_per_s": round(len(texts) / seconds),
                "rss_peak_mb": round(resident_mb(worker.process.pid, peak=True)),
                "longest_hold_ms": None if hold_s is None else round(hold_s * 1000, 1),
            }
            assert worker.stop() == 0, worker.tail()
        bills = provider.admin("ledger")["requests"]
        calls = [call async for call in audit.read_topic(course.settings, "calls", ProviderCall)]
        usage = [charge async for charge in audit.read_topic(course.settings, "usage", Usage)]
        books = audit.Books(requests=[], usage=usage, calls=calls, bills=bills)
        figures |= fullness(requests, [call for _, call in calls], bills) | ledger(books)
        figures |= await outcomes(course, requests)
        sequential = await sequential_rate(course, provider, texts[:SEQUENTIAL_CHUNKS])
    return figures | {
        "sequential_chunks_per_s": round(sequential),
        "ratio_to_sequential": round(len(texts) / seconds / sequential, 2),
    }


async def sequential_rate(course: Course, provider: ProviderProcess, texts: Sequence[str]) -> float:
    """Chunks a second of the baseline, one awaited call after the other."""
    name = uuid.uuid4().hex[:8]
    requests, results = await course.create(f"requests-{name}"), await course.create(f"results-{name}")
    one = next(ingestion(texts, course.dimensions))
    values = (encode_request(replace(one, chunks=[replace(one.chunks[0], text=text)])) for text in texts)
    await fill(course.producer, requests, values, partitions=PARTITIONS)
    provider.admin("reset", {})
    with course.baseline("sequential", results, "--base-url", provider.base_url, requests=requests) as (_, check):
        return len(texts) / await elapsed(course, provider, results, len(texts), check)


async def elapsed(
    course: Course, provider: ProviderProcess, results: str, count: int, check: Callable[[], None]
) -> float:
    """Seconds from the first call that the provider sees until so many results are there; gives up on a stall."""
    seen, seen_at = 0, time.monotonic()
    while True:
        done, now, now_ms = await course.end(results), time.monotonic(), time.time() * 1000
        if done >= count:
            began_ms: float = provider.admin("ledger")["requests"][0]["at_ms"]
            return (now_ms - began_ms) / 1000
        check()
        if done > seen:
            seen, seen_at = done, now
        assert now - seen_at < STALLED_S, f"no result for {STALLED_S:.0f} s: {done} of {count}"
        await asyncio.sleep(LOOK_EVERY_S)


def fullness(
    requests: Sequence[Request], calls: Sequence[ProviderCall], bills: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Calls that the provider saw, the least possible, and the mean share of the limit that binds a call most.

    Of all calls but the one begun last.
    """
    bytes_of = {
        (request_id(request), index): len(chunk.text.encode())
        for request in requests
        for index, chunk in enumerate(request.chunks)
    }
    least = max(math.ceil(len(bytes_of) / MAX_INPUTS), math.ceil(sum(bytes_of.values()) / MAX_BYTES))
    shares = {
        call.attempt_id: max(
            len(call.items) / MAX_INPUTS,
            sum(bytes_of[item.request_id, item.index] for item in call.items) / MAX_BYTES,
        )
        for call in calls
        if call.kind is CallKind.INTENT
    }
    made = [shares[bill["attempt_id"]] for bill in sorted(bills, key=lambda bill: bill["at_ms"])]
    return {
        "calls": len(made),
        "least_calls": least,
        "calls_ratio": round(len(made) / least, 3),
        "fill": round(sum(made[:-1]) / max(1, len(made) - 1), 3),
        "fill_least": round(min(made[:-1], default=0.0), 3),
    }


def ledger(books: audit.Books) -> dict[str, Any]:
    """Whether the provider's books and the receipts agree call by call, and every token is charged to somebody."""
    try:
        residual = audit.check_attempts(books).total
    except AssertionError as error:
        return {"ledger_equal": False, "ledger_fault": str(error)}
    receipts = sum(call.billed_tokens or 0 for _, call in books.calls if call.kind is CallKind.RECEIPT)
    billed = sum(bill["tokens"] for bill in books.bills if bill["billed"])
    return {"ledger_equal": receipts == billed, "billed_tokens": billed, "residual_tokens": residual}


async def outcomes(course: Course, requests: Sequence[Request]) -> dict[str, Any]:
    """Chunks without a vector, and results beyond the first of a chunk."""
    missing = {(request_id(request), index) for request in requests for index in range(len(request.chunks))}
    copies = 0
    async for _, result in audit.read_topic(course.settings, "results", ReceivedResult):
        chunk = result.request_id, result.chunk_index
        if chunk not in missing:
            copies += 1
        elif result.vector is not None and result.vector.shape == (course.dimensions,):
            missing.remove(chunk)
    return {"lost": len(missing), "copies": copies}


def bars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar with what was measured and whether it is met."""
    judged: dict[str, Any] = {}
    for dimensions, ratio in RATIOS.items():
        for name, bar, met in (
            ("calls_ratio", f"<= {CALLS_RATIO}", lambda value: value <= CALLS_RATIO),
            ("fill", f">= {FILL}", lambda value: value >= FILL),
            ("ratio_to_sequential", f">= {ratio}", lambda value, ratio=ratio: value >= ratio),
            ("ledger_equal", "true", bool),
            ("lost", "0", lambda value: value == 0),
        ):
            value = figures[f"{name}_d{dimensions}"]
            judged[f"{name}_d{dimensions}"] = {"measured": value, "bar": bar, "met": "yes" if met(value) else "no"}
    return judged
