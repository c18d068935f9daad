"""Everything around the workers of a fault test: provider, cache, topics, an aggregator, and the audit at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from processor.accounts import UsageTotal
from processor.adapters import topics
from processor.adapters.embedded import EmbeddedCache
from processor.domain import Usage
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Child, Stack, until
from tests.support.traffic import Traffic, check_samples

MODEL = "text-embedding-3-small"
DIMENSIONS = 64
PARTITIONS = 4
CALL_TEXTS = 64
PATIENT = {"EMBEDDING_REDIS_TIMEOUT_MS": "3000", "EMBEDDING_SESSION_TIMEOUT_S": "30"}
"""Where a law is about what the cache saves, or what is done once: a pause of a busy machine loses neither a look-up
nor a partition."""


@dataclass(slots=True)
class World:
    """Of one test, with an aggregator running. `others` are providers beside the first, whose bills count too."""

    provider: ProviderProcess
    cache_url: str
    stack: Stack
    traffic: Traffic
    others: list[ProviderProcess] = field(default_factory=list)

    async def a_worker(self) -> Child:
        """Started, and ready."""
        worker = self.stack.spawn("worker")
        await until(worker.ready, within_s=300, what=f"{worker.name} is ready")
        return worker

    async def finish_and_audit(
        self, *, refused: Mapping[str, str] | None = None
    ) -> tuple[audit.Books, audit.Residuals, int]:
        """Wait until all is committed and totalled, stop everybody cleanly, hold the books against the laws.

        `refused`: a marker in the texts that end as an error, to its code. The last of the three counts copies.
        """
        settings = self.stack.settings()
        await until(self.traffic.all_committed, within_s=300, what="every request is committed")
        await self.traffic.sample()

        async def totalled() -> bool:
            usage = [pair async for pair in audit.read_topic(settings, "usage", Usage)]
            totals = {total.key: total async for _, total in audit.read_topic(settings, "totals", UsageTotal)}
            return audit.totals_cover(audit.Books(usage=usage, totals=totals))

        await until(totalled, within_s=120, what="the totals count every charge", every_s=0.5)
        for child in self.stack.children:
            if child.process.poll() is None:
                # The others may have done it all before the last one is up: a signal would end it before it listens.
                await until(child.ready, within_s=300, what=f"{child.name} is ready, and can be stopped")
                assert child.stop() == 0, child.tail()
        bills = [bill for one in (self.provider, *self.others) for bill in one.admin("ledger")["requests"]]
        books = await audit.read_books(settings, bills)
        copies = audit.check_outcomes(books, vector_of=expected_vector, dimensions=DIMENSIONS, refused=refused)
        audit.check_charges(books)
        residuals = audit.check_attempts(books)
        audit.check_totals(books)
        check_samples(self.traffic.samples, books)
        return books, residuals, copies


Begin = Callable[..., AbstractAsyncContextManager[World]]


def beginner(kafka: Broker, unique: str, folder: Path) -> Begin:
    """`begin("--base-ms", "60", EMBEDDING_RETRY_MAX_S="1")`: options of the provider, environment of the processes.

    A call holds at most `call_texts`, so that there are calls enough to go wrong.
    """

    @asynccontextmanager
    async def begin(*options: str, call_texts: int = CALL_TEXTS, **environment: str) -> AsyncIterator[World]:
        catalogue = folder / "catalogue.yaml"
        catalogue.write_text(f"models: {{{MODEL}: {{max_inputs_per_call: {call_texts}}}}}\n", encoding="utf-8")
        with EmbeddedCache() as cache, ProviderProcess("--jitter", "0.01", *options) as provider:
            environment = environment_of(provider) | {
                "EMBEDDING_REDIS_URL": cache.url,
                "EMBEDDING_CATALOGUE_FILE": str(catalogue),
                **environment,
            }
            with Stack(folder, unique, kafka.bootstrap_servers, **environment) as stack:
                settings = stack.settings()
                await topics.create(settings, partitions=PARTITIONS, replication=1)
                stack.spawn("aggregator")
                async with Traffic(settings, partitions=PARTITIONS, group=f"{settings.group_id}-bulk") as traffic:
                    yield World(provider, cache.url, stack, traffic)

    return begin


def environment_of(provider: ProviderProcess) -> dict[str, str]:
    """Of workers that use it."""
    return {
        "EMBEDDING_PROVIDER": "openai",
        "EMBEDDING_OPENAI_BASE_URL": provider.base_url,
        "EMBEDDING_OPENAI_API_KEY": "tests",
        "EMBEDDING_DEFAULT_MODEL": MODEL,
        "EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL": f'{{"{MODEL}": {DIMENSIONS}}}',
    }


def faults_met(books: audit.Books) -> Sequence[str]:
    """The fault of each call that had one."""
    return [bill["fault"] for bill in books.bills if bill["fault"]]
