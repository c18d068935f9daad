"""How far a hard budget is overshot: one payer's backlog of many budgets, workers, an aggregator, a provider."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from aiokafka import AIOKafkaProducer

from processor.accounts import BudgetState
from processor.adapters import topics
from processor.adapters.avro import encode_request
from processor.adapters.kafka import connection
from processor.domain import CallKind, ProviderCall, Usage
from tests.support.audit import Books, read_topic
from tests.support.brokers import Broker
from tests.support.load import fill, ingestion, some_texts
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Stack, until
from tests.support.world import environment_of

PARTITIONS = 4
DIMENSIONS = 8
PAYER = "acme"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overshoot:
    """Tokens charged beyond the budget, and what they were: `in_flight_tokens` in calls that had begun when the usage
    event that spent it was appended, `lag_tokens` in calls that began up to `seconds` later. A state that refuses the
    payer was published `told_s` after that event."""

    budget_tokens: int
    charged_tokens: int
    in_flight_tokens: int
    lag_tokens: int
    seconds: float
    told_s: float
    texts: int
    refused_texts: int

    @property
    def tokens(self) -> int:
        return self.charged_tokens - self.budget_tokens


async def measure_overshoot(
    broker: Broker,
    provider: ProviderProcess,
    folder: Path,
    *,
    texts: int,
    budget_tokens: int,
    workers: int = 1,
    **environment: str,
) -> Overshoot:
    """All texts are misses of 600 bytes in the mean; they lie in the log before the workers start."""
    budgets = folder / "budgets.yaml"
    budgets.write_text(f"budgets: {{{PAYER}: {{tokens: {budget_tokens}}}}}\n", encoding="utf-8")
    environment = {
        **environment_of(provider),
        "EMBEDDING_BUDGETS_FILE": str(budgets),
        "EMBEDDING_LOG_LEVEL": "WARNING",
        **environment,
    }
    with Stack(folder, f"budget-{uuid.uuid4().hex[:8]}", broker.bootstrap_servers, **environment) as stack:
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS, replication=1)
        requests = [encode_request(each) for each in ingestion(some_texts(texts), DIMENSIONS, tenant=PAYER)]
        async with AIOKafkaProducer(**connection(settings)) as producer:
            await fill(producer, settings.topic("embedding-requests"), requests, partitions=PARTITIONS)
        aggregator = stack.spawn("aggregator")
        await until(aggregator.ready, within_s=300, what="the aggregator is ready")
        started = [stack.spawn("worker") for _ in range(workers)]
        for worker in started:
            await until(worker.ready, within_s=300, what="the worker is ready")

        async def all_charged() -> bool:
            for worker in started:
                worker.check()
            return len({usage.request_id async for _, usage in read_topic(settings, "usage", Usage)}) == len(requests)

        async def told() -> bool:
            return any([state.refuses async for _, state in read_topic(settings, "budgets", BudgetState)])

        await until(all_charged, within_s=600, what="every request has its usage event", every_s=0.5)
        await until(told, within_s=300, what="a state refuses the payer", every_s=0.5)
        charges = Books(usage=[pair async for pair in read_topic(settings, "usage", Usage)]).charges()
        states = [pair async for pair in read_topic(settings, "budgets", BudgetState)]
        begun_ms = {
            call.attempt_id: record.source.append_ms
            async for record, call in read_topic(settings, "calls", ProviderCall)
            if call.kind is CallKind.INTENT
        }
        for worker in started:
            assert worker.stop() == 0, worker.tail()
        assert aggregator.stop() == 0, aggregator.tail()
    charged, spent_ms = 0, None
    for charge in charges:  # of one payer, so of one partition, in its order
        charged += charge.usage.billed.tokens
        if spent_ms is None and charged >= budget_tokens:
            spent_ms = charge.record.source.append_ms
    assert spent_ms is not None, "the backlog did not spend the budget"
    lag_tokens = sum(
        part.tokens for charge in charges for part in charge.usage.parts if begun_ms[part.attempt_id] > spent_ms
    )
    told_ms = min(record.source.append_ms for record, state in states if state.refuses)
    return Overshoot(
        budget_tokens=budget_tokens,
        charged_tokens=charged,
        in_flight_tokens=charged - budget_tokens - lag_tokens,
        lag_tokens=lag_tokens,
        seconds=max(0, max(begun_ms.values()) - spent_ms) / 1000,
        told_s=max(0, told_ms - spent_ms) / 1000,
        texts=texts,
        refused_texts=sum(charge.usage.failed_texts for charge in charges),
    )
