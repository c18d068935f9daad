"""Everything that endangers the bill at once: three workers, equal texts, provider faults, kills, an empty cache.

EMBEDDING_TEST_SEED varies traffic, faults and who is killed.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import redis.asyncio

from processor.accounts import TaskKey, TaskProgress
from processor.adapters.reader import KafkaReader
from processor.adapters.topics import topics
from processor.cli.audit import run_audit
from processor.domain import Chunk, Request
from processor.findings import Residual
from processor.identity import request_id
from processor.invoice import DayBill
from processor.settings import Settings
from tests.faults.test_aggregator_kills import attempts
from tests.support import audit
from tests.support.ledgers import invoice_of
from tests.support.stack import Child, until
from tests.support.traffic import hard_requests
from tests.support.world import Begin, World, faults_met

SEED = int(os.environ.get("EMBEDDING_TEST_SEED", "1"))
REQUESTS, CHUNKS = 1000, 5
WAVES = 8
"""After each but the last a worker is killed."""
FLUSH_AT, KILL_AGGREGATOR_AT, KILL_STANDBY_AT = 3, 1, 5
FAULTS = ["500", "429", "503", "reset", "reset_billed", "hang_billed", "truncated_body", "broken_json"]
FAULTS += ["wrong_count", "nan", "wrong_model", "duplicate_index", "shuffled"]
ENVIRONMENT = {
    "EMBEDDING_RETRY_INITIAL_S": "0.05",
    "EMBEDDING_RETRY_MAX_S": "0.5",
    "EMBEDDING_PROVIDER_TIMEOUT_S": "2",
    "EMBEDDING_LEDGER_CONFIRM_MARGIN_S": "1",
}
OVERLONG = "overlong " + "word " * 8192

Tell = Callable[[str], None]


def money_requests(seed: int) -> list[Request]:
    """Hard requests with agents, collections and tasks; one in a hundred has a text too long for the model."""
    requests = []
    for request in hard_requests(REQUESTS, chunks=CHUNKS, seed=seed):
        number = int((request.document_id or "").removeprefix("doc-"))
        requests.append(
            replace(
                request,
                agent_id=f"agent-{number % 5}" if number % 5 < 3 else None,
                collection=("docs", "wiki", None)[number % 3],
                task_id=f"task-{number % 7}" if number % 7 < 3 else None,
                chunks=[*request.chunks, Chunk("long", OVERLONG)] if number % 100 == 5 else request.chunks,
            )
        )
    totals = {key: progress.done + progress.failed for key, progress in progress_of(requests).items()}
    return [
        replace(request, task_total=totals[TaskKey(request.tenant_id, request.task_id)]) if request.task_id else request
        for request in requests
    ]


def progress_of(requests: Iterable[Request]) -> dict[TaskKey, TaskProgress]:
    """Where each task ends: every text of its requests once, those too long as failed."""
    found: dict[TaskKey, TaskProgress] = {}
    for request in {request_id(request): request for request in requests}.values():
        if request.task_id is not None:
            key = TaskKey(request.tenant_id, request.task_id)
            known = found.get(key) or TaskProgress(
                tenant_id=key.tenant_id, task_id=key.task_id, done=0, failed=0, total=None, updated_at_ms=0
            )
            failed = sum(chunk.text == OVERLONG for chunk in request.chunks)
            found[key] = replace(
                known,
                done=known.done + len(request.chunks) - failed,
                failed=known.failed + failed,
                total=request.task_total,
            )
    return found


async def published_progress(settings: Settings) -> dict[TaskKey, TaskProgress]:
    """The newest record of each task, its time left out."""
    return {
        TaskKey(progress.tenant_id, progress.task_id): replace(progress, updated_at_ms=0)
        async for _, progress in audit.read_topic(settings, "progress", TaskProgress)
    }


def share_of_equal_texts(requests: Sequence[Request]) -> float:
    """Of the texts of different requests, how many were said before."""
    texts = [
        chunk.text for request in {request_id(each): each for each in requests}.values() for chunk in request.chunks
    ]
    return 1 - len(set(texts)) / len(texts)


@pytest.mark.faults
async def test_the_bill_adds_up_through_faults_kills_and_an_empty_cache(
    begin: Begin, tmp_path: Path, tell: Tell
) -> None:
    """Laws 1 to 6 and section 5 per attempt: three workers, an aggregator and its standby, all of them killed."""
    requests, dice = money_requests(SEED), random.Random(SEED)
    started = time.monotonic()
    async with begin("--base-ms", "30", "--per-text-ms", "1", call_texts=16, **ENVIRONMENT) as world:
        probabilities = dict.fromkeys(FAULTS, 0.15 / len(FAULTS))
        world.provider.admin("faults", {"probabilities": probabilities, "retry_after": "0.1", "seed": SEED})
        stack, traffic = world.stack, world.traffic
        first = stack.children[0]
        await until(first.ready, within_s=60, what="the aggregator is ready")
        standby = a_standby(world, tmp_path)
        workers = [stack.spawn("worker") for _ in range(3)]
        for child in (*workers, standby):
            await until(child.ready, within_s=60, what=f"{child.name} is ready")
        for wave in range(WAVES):
            before = await traffic.results()
            await traffic.send(requests[wave * len(requests) // WAVES : (wave + 1) * len(requests) // WAVES])
            again = dice.sample(requests[: (wave + 1) * len(requests) // WAVES], REQUESTS // WAVES // 20)
            await traffic.send(again)

            async def moved(before: int = before) -> bool:
                await traffic.sample()
                return await traffic.results() >= before + 40

            await until(moved, within_s=90, what=f"results flow in wave {wave}")
            if wave == FLUSH_AT:
                await flush(world.cache_url)
            if wave == KILL_AGGREGATOR_AT:
                first.kill()
            if wave == KILL_STANDBY_AT:
                await until(lambda: attempts(standby) > 0, within_s=60, what="the standby has taken over")
                await until(
                    stack.spawn("aggregator").ready, within_s=60, what="the first stands by, with its old store"
                )
                standby.kill()
            if wave < WAVES - 1:
                victim = dice.randrange(len(workers))
                workers[victim].kill()
                workers[victim] = stack.spawn("worker")
        await until(traffic.all_committed, within_s=300, what="every request is committed")
        expected, settings = progress_of(requests), stack.settings()

        async def folded() -> bool:
            return all([await aggregator_is_at_end(settings, name) for name in ("usage", "calls")])

        await until(folded, within_s=120, what="the aggregator has folded everything", every_s=0.5)
        books, residuals, copies = await world.finish_and_audit(refused={"overlong": "text_too_long"})
        report = await run_audit(
            settings, invoice={day: DayBill(tokens=tokens) for day, tokens in invoice_of(books).items()}
        )
    met, charges = faults_met(books), books.charges()
    tell(f"money, seed {SEED}: {len(met)} of {len(books.bills)} calls failed: {dict(Counter(met))}")
    tell(
        f"money, seed {SEED}: {len(books.requests)} read, {len(charges)} charged by {len(books.usage)} events, "
        f"{copies} result copies, {share_of_equal_texts(requests):.0%} equal texts, "
        f"{round(time.monotonic() - started)} s"
    )
    tell(residuals.table())
    audit.check_shares(books)
    assert await published_progress(settings) == expected
    assert report.clean, report
    assert report.store_note == "", "the aggregator's ledger was not compared"
    assert report.ledger.residuals[Residual.REWORK].tokens == residuals.rework
    assert report.ledger.residuals[Residual.WASTE].tokens == residuals.waste
    # The rest holds the test to what it promises: that there was something to lose.
    assert share_of_equal_texts(requests) >= 0.3
    assert len(set(met)) > len(FAULTS) / 2, "too few kinds of failure were met"
    assert len(books.usage) > len(charges), "no charge came twice: nothing was proven of copies"
    assert sum(charge.usage.saved.tokens for charge in charges) > 0
    assert residuals.waste > 0
    assert residuals.unclaimed == 0, "every request is charged, so each paid item has its charge"


async def aggregator_is_at_end(settings: Settings, name: str) -> bool:
    """Whether it has committed a topic to its end."""
    topic = settings.topic(topics()[name].name)
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    committed = await reader.committed(topic)
    spans = await reader.spans(topic)
    return all(committed.get(partition, 0) >= span.end for partition, span in spans.items())


def a_standby(world: World, folder: Path) -> Child:
    """An aggregator with a store of its own; the other one is active as long as it lives."""
    return world.stack.spawn("aggregator", EMBEDDING_AGGREGATOR_STORE=str(folder / "standby.sqlite"))


async def flush(url: str) -> None:
    """The cache forgets everything."""
    client = redis.asyncio.from_url(url)
    try:
        await client.flushall()
    finally:
        await client.aclose()
