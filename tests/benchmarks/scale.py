"""Chunks a second of 1, 2 and 4 workers over 8 partitions on one machine, and who takes its CPU.

The requests come in one burst once every worker has joined; every text is cached after its first time. Broker, workers
and this benchmark share the machine, so the figures say what is left of it rather than how far workers scale.
Environment: BENCH_RECORDS. Left out: L2, several machines, workers that join under load.
"""

from __future__ import annotations

import os
from typing import Any

from tests.support.load import Course, Say, fill, ready, share, some_requests, surroundings

PARTITIONS = 8
WORKERS = (1, 2, 4)
RECORDS = int(os.environ.get("BENCH_RECORDS", "100000"))


async def run(say: Say) -> dict[str, Any]:
    """Records a second by number of workers and vector size; parts of the machine's CPU of broker, workers, others."""
    with surroundings(say) as (broker, provider, folder):
        figures: dict[str, Any] = {"broker": broker.kind, "records": RECORDS, "cores": os.cpu_count()}
        for dimensions in (8, 1536):
            values = list(some_requests(RECORDS, dimensions))
            for count in WORKERS:
                name = f"d{dimensions}_workers{count}"
                async with Course(broker, provider, folder, dimensions=dimensions, partitions=PARTITIONS) as course:
                    measured = await measure(course, values, count)
                figures |= {f"{name}_{key}": value for key, value in measured.items()}
                say(f"{name}: {figures[f'{name}_records_per_s']}/s")
        return figures


async def measure(course: Course, values: list[bytes], count: int) -> dict[str, Any]:
    """One burst through so many workers."""
    with course.stack() as stack:
        workers = [stack.spawn("worker") for _ in range(count)]
        await ready(workers)

        def check() -> None:
            for worker in workers:
                worker.check()

        await fill(course.producer, course.requests, values, partitions=PARTITIONS)
        pids = {worker.name: worker.process.pid for worker in workers}
        rate = await course.rate(course.results, 0, len(values), pids, check)
        for worker in workers:
            worker.stop()
    of_workers = sum(rate.cores[name] for name in pids)
    broker = rate.cores.get("broker")
    return {
        "records_per_s": round(rate.records_per_s),
        "workers_cpu_share": share(of_workers),
        "broker_cpu_share": None if broker is None else share(broker),
        "others_cpu_share": share(rate.others),
        "left_cpu_share": share(rate.cores["idle"]),
    }
