"""Composition root: settings become adapters, adapters become a worker or an aggregator process. No logic here.

One worker process serves one route (a provider and its models) on one lane; see `docs/architecture.md`.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import structlog
import uvloop

from processor.accounts import Ledger
from processor.adapters import logs, topics
from processor.adapters.avro import Codec
from processor.adapters.budget_feed import NO_VIEW, BudgetFeed
from processor.adapters.budgets_file import read_budgets_file
from processor.adapters.catalogue import load_catalogue
from processor.adapters.clock import SystemClock, new_attempt_id, worker_id
from processor.adapters.faust_engine import Engine
from processor.adapters.http import InternalServer, Report
from processor.adapters.loop_watch import LoopWatch
from processor.adapters.memory_cache import MemoryCache
from processor.adapters.outbox import KafkaOutbox
from processor.adapters.providers import open_deployments
from processor.adapters.purge_watch import PurgeWatch
from processor.adapters.reader import KafkaReader
from processor.adapters.redis_cache import RedisCache
from processor.adapters.redis_quota import RedisQuota
from processor.adapters.sqlite_store import SqliteStore
from processor.adapters.tiered_cache import TieredCache
from processor.adapters.tokens import LocalTokenCounter
from processor.agents import Worker
from processor.aggregate import DAY_MS
from processor.aggregator import FOLDED_PER_FETCH, Aggregator
from processor.domain import Lane
from processor.embed import Deployment, Route
from processor.limits import PACE, Gate, LimitPolicy
from processor.metrics import Metrics
from processor.pipeline import Ports
from processor.ports import Clock, Events
from processor.quota import QuotaShare
from processor.settings import Settings
from processor.totals import FoldedTopics
from processor.work import Policy

WORKER_TOPICS = ("results", "replies", "sink", "usage", "calls", "documents", "dlq")
AGGREGATOR_TOPICS = ("usage", "calls", "documents", "totals", "progress", "budgets", "late", "sink", "dlq")

GC_FIRST_THRESHOLD = 500_000
"""Records in work are many objects that die young and in no circle. With Python's 700 a third of a record's CPU went
into looking for circles: 104 us, with this 74 (d=8, medians of four rounds)."""

log = structlog.get_logger("embedding-processor")


def run_worker(settings: Settings) -> int:
    """Run a worker until it is told to stop. Returns 0; a crash ends the process with 1."""
    logs.configure(settings.log_level, settings.log_format)
    return WorkerProcess(settings).engine.run(loop_factory=uvloop.new_event_loop)


def run_aggregator(settings: Settings) -> int:
    """Run the aggregator, or stand by while another one is active. Returns 0; a crash ends the process with 1."""
    logs.configure(settings.log_level, settings.log_format)
    return AggregatorProcess(settings).engine.run(loop_factory=uvloop.new_event_loop)


def folded_topics(settings: Settings) -> FoldedTopics:
    """What the aggregator reads, by full name."""
    names = {name: settings.topic(topic.name) for name, topic in topics.topics().items()}
    return FoldedTopics(
        usage=names["usage"],
        calls=names["calls"],
        documents=names["documents"],
        totals=names["totals"],
        budgets=names["budgets"],
        late=names["late"],
        progress=names["progress"],
    )


def worker_policy(settings: Settings, reply_partitions: Mapping[str, int]) -> Policy:
    """The knobs of a worker's steps. `reply_partitions`: allowed reply topics by full name, and their sizes."""
    return Policy(
        lane=settings.lane,
        worker_id=worker_id(),
        sink_view=settings.sink_view,
        reply_partitions=reply_partitions,
        truncate=settings.truncate,
        max_request_bytes=settings.max_request_bytes,
        window_max_texts=settings.window_max_texts,
        window_max_tokens=settings.window_max_tokens,
        window_max_wait_s=0.0 if settings.lane is Lane.INTERACTIVE else settings.window_max_wait_ms / 1000,
        tenant_weights=settings.tenant_weights,
        retry_initial_s=settings.retry_initial_s,
        retry_max_s=settings.retry_max_s,
        poison_attempts=settings.poison_attempts,
        confirm_after_s=settings.provider_timeout_s + settings.session_timeout_s + settings.ledger_confirm_margin_s,
        cache_secret=(settings.secret("cache_secret") or "").encode(),
        cache_secret_former=None if (former := settings.secret("cache_secret_former")) is None else former.encode(),
        cache_shared=settings.cache_scope == "shared",
    )


def open_gate(
    settings: Settings, requests_per_minute: int | None, tokens_per_minute: int | None, *, sharers: int, clock: Clock
) -> Gate:
    """Its limits are this worker's part of these, the account's: its lane's, one of `sharers` equal ones."""
    share = settings.lane_share / sharers
    policy = LimitPolicy(
        max_concurrent_calls=settings.max_concurrent_calls,
        requests_per_minute=requests_per_minute and requests_per_minute * share,
        tokens_per_minute=tokens_per_minute and tokens_per_minute * share,
        share=share,
        retry_initial_s=settings.retry_initial_s,
        retry_max_s=settings.retry_max_s,
        retry_after_max_s=settings.retry_after_max_s,
    )
    return Gate(clock, policy)


def watch_gate(metrics: Metrics, name: str, gate: Gate) -> None:
    """Let the gauges of a deployment tell what its gate does."""

    def tell(metric: str, value: Callable[[], float]) -> None:
        metrics.gauge(metric).labels(name).set_function(value)

    tell("deployment_paused", lambda: float(gate.paused is not None))
    tell("deployment_calls_in_flight", lambda: gate.in_flight)
    tell("deployment_concurrency", lambda: float(gate.snapshot()["concurrency"] or 0))
    tell("deployment_wait_seconds", lambda: float(gate.snapshot()["waits_s"] or 0))


class Process:
    """What a worker and an aggregator have in common."""

    engine: Engine

    def __init__(self, settings: Settings, used_topics: Iterable[str], reports: Mapping[str, Report]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.codec = Codec.from_settings(settings)
        self.outbox = KafkaOutbox(settings, self.codec, lambda: self.engine.producer)
        self.http = InternalServer(
            settings.http_host,
            settings.http_port,
            registry=self.metrics.registry,
            health=self._health,
            reports=reports,
        )
        self.loop_watch = LoopWatch()
        self.metrics.gauge("longest_loop_hold_seconds").set_function(lambda: self.loop_watch.longest_s)
        self._used_topics = set(used_topics)

    async def _start(self) -> None:
        """The port first, so that a start that waits or fails can be watched; then what the work relies on."""
        await self.http.start()
        for name, loaded in self.engine.runtime()["extensions"].items():
            self.metrics.gauge("extension_loaded").labels(name).set(loaded)
        for finding in await topics.verify(self.settings, self._used_topics):
            log.warning("topic", topic=finding.topic, what=finding.what, fix=finding.fix)
        await self.codec.start(topics.subjects(self.settings))

    async def _started(self) -> None:
        """What is there by now stays for good: the collector need not look at it, nor come so often."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_FIRST_THRESHOLD, *gc.get_threshold()[1:])
        self.loop_watch.start()

    async def _stop(self) -> None:
        self.loop_watch.stop()
        await self.http.stop()
        await self.codec.close()

    async def _health(self) -> Mapping[str, Any]:
        engine = self.engine.status()
        return {
            "ready": engine["state"] in {"consuming", "standby"},
            "kafka": engine,
            "runtime": {
                **self.engine.runtime(),
                "gc": {"threshold": gc.get_threshold()[0], "frozen_objects": gc.get_freeze_count()},
            },
        }


class WorkerProcess(Process):
    """A worker and what it is made of."""

    def __init__(self, settings: Settings) -> None:
        source = "queries" if settings.lane is Lane.INTERACTIVE else "requests"
        binds = settings.lane is Lane.BULK or settings.budgets_bind_queries
        used_topics = {source, *WORKER_TOPICS} | ({"budgets"} if binds else set())
        super().__init__(settings, used_topics, {"/models": self._models})
        events = Events(self.metrics.count, self.metrics.observe, lambda fields: log.info("call", **fields))
        clock = SystemClock()
        self.catalogue = load_catalogue(settings)
        self.counter = LocalTokenCounter()
        opened = open_deployments(settings, self.catalogue)
        self.redis = RedisCache.from_settings(settings, events) if settings.redis_url else None
        self.l1 = MemoryCache.from_settings(settings)
        self.cache = TieredCache(self.l1, self.redis, events)
        self.purges = PurgeWatch(self.redis, self.l1, clock) if self.redis is not None else None
        self.budgets = BudgetFeed(settings, self.codec) if binds else None
        self.reply_partitions: dict[str, int] = {}
        policy = worker_policy(settings, self.reply_partitions)
        self.quota = RedisQuota.from_settings(settings, pace=PACE) if settings.redis_url else None
        self.shares: list[QuotaShare] = []
        deployments = []
        accounts = Counter(each.account for each in opened)
        for each in opened:
            sharers = settings.limit_sharers * accounts[each.account]
            limits = each.requests_per_minute, each.tokens_per_minute
            gate = open_gate(settings, *limits, sharers=sharers, clock=clock)
            deployments.append(Deployment(each.name, each.provider, gate))
            if self.quota is not None:
                account = f"{each.account}:{settings.lane}"
                self.shares.append(QuotaShare(gate, self.quota, clock, account=account, sharers=sharers))
        self.route = Route(deployments, self.outbox, clock, policy, new_attempt_id, events)
        self.worker = Worker(
            Ports(
                decoder=self.codec,
                catalogue=self.catalogue,
                cache=self.cache,
                counter=self.counter,
                outbox=self.outbox,
                clock=clock,
                events=events,
                budgets=self.budgets,
            ),
            policy,
            self.route,
            read_ahead_bytes=settings.read_ahead_bytes,
            fail=lambda error: self.engine.crash(error),  # noqa: PLW0108  (the engine is made after the worker)
        )
        self.engine = Engine(
            settings,
            app_id=f"{settings.group_id}-{settings.lane}",
            topics=[settings.topic(topics.topics()[source].name)],
            handler=self.worker,
            isolates=True,
            on_starting=[self._start],
            on_started=[self._started],
            on_stopping=[self._stop],
        )
        self.metrics.gauge("read_ahead_bytes").set_function(lambda: self.worker.held_bytes)
        self.metrics.gauge("queued_texts").set_function(lambda: self.worker.queued_texts)
        self.metrics.gauge("provider_paused").set_function(lambda: float(self.route.paused is not None))
        budgets = self.budgets
        self.metrics.gauge("budgets_age_seconds").set_function(lambda: NO_VIEW if budgets is None else budgets.age_s)
        self.metrics.gauge("l1_bytes").set_function(lambda: self.l1.size_bytes)
        gone = self.metrics.gauge("shared_cache_gone")
        gone.labels("reads").set_function(lambda: float(self.cache.goes_without["reads"]))
        gone.labels("writes").set_function(lambda: float(self.cache.goes_without["writes"]))
        for deployment in deployments:
            watch_gate(self.metrics, deployment.name, deployment.gate)

    async def _start(self) -> None:
        await super()._start()
        settings = self.settings
        self.reply_partitions |= await topics.partition_counts(settings, map(settings.topic, settings.reply_topics))
        if (default := self.catalogue.find(self.catalogue.default_model)) is not None:
            self.counter.count([""], default)  # loads its tables: 25 ms, here where nobody waits
        beside = [share.run() for share in self.shares]
        if self.budgets is not None:
            await self.budgets.start()
            beside.append(self.budgets.run())
        if self.purges is not None:
            beside.append(self.purges.run())
        self.worker.start(*beside)
        await self._tell_cache()
        provider = self.route.provider_name
        log.info("worker", id=worker_id(), lane=settings.lane, provider=provider, port=self.http.port)

    async def _tell_cache(self) -> None:
        if self.redis is None:
            return
        if (said := await self.redis.ping()) != "ok":
            log.warning("cache", redis=said, meanwhile="goes on without it")
        if self.settings.has_default_cache_secret:
            log.warning("cache", secret="the default one", fix="set EMBEDDING_CACHE_SECRET_FILE")

    async def _stop(self) -> None:
        await self.worker.stop()
        if self.budgets is not None:
            await self.budgets.close()
        await super()._stop()
        for deployment in self.route.deployments:
            await deployment.provider.close()
        for redis in (self.redis, self.quota):
            if redis is not None:
                await redis.close()

    async def _health(self) -> Mapping[str, Any]:
        return {
            **await super()._health(),
            "provider": {
                "name": self.route.provider_name,
                "paused": self.route.paused,
                "deployments": {each.name: each.gate.snapshot() for each in self.route.deployments},
            },
            "decoding": {"paused": self.worker.pipeline.paused},
            "cache": {
                "redis": await self.redis.ping() if self.redis is not None else "not configured",
                "goes_without": self.cache.goes_without,
                "l1_bytes": self.l1.size_bytes,
                "l1_entries": len(self.l1),
            },
            "budgets": None
            if self.budgets is None
            else {"age_s": round(self.budgets.age_s, 1), "refused": self.budgets.refused},
            "work": {"read_ahead_bytes": self.worker.held_bytes, "queued_texts": self.worker.queued_texts},
        }

    async def _models(self) -> Mapping[str, Any]:
        return {"default": self.catalogue.default_model, "models": self.catalogue.describe()}


RESIDUALS = ("waste", "uncharged", "unconfirmed_max")
LEDGER_CLASSES = {
    "tokens": ("billed", "attributed", "recovered", *RESIDUALS, "unpriced", "unmatched", "over_attributed"),
    "cost_nanos": RESIDUALS,
}
"""The label of each sum of the ledger, by its unit."""

LEDGER_AGE_S = 0.5
"""How old the sums may be that metrics show."""


class AggregatorProcess(Process):
    """The aggregator and what it is made of."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, AGGREGATOR_TOPICS, {"/ledger": self._ledger})
        self.reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
        self.store = SqliteStore(settings.aggregator_store)
        folded = folded_topics(settings)
        self.aggregator = Aggregator(
            topics=folded,
            store=self.store,
            outbox=self.outbox,
            reader=self.reader,
            decoder=self.codec,
            clock=SystemClock(),
            events=Events(self.metrics.count, self.metrics.observe),
            horizon_ms=settings.horizon_days * DAY_MS,
            token_types=None if "*" in settings.usage_token_types else frozenset(settings.usage_token_types),
            budgets=read_budgets_file(settings.budgets_file),
        )
        self.engine = Engine(
            settings,
            app_id=settings.aggregator_group_id,
            topics=[folded.usage, folded.calls, folded.documents],
            handler=self.aggregator,
            single_owner=True,
            records_per_fetch=FOLDED_PER_FETCH,
            on_starting=[self._start],
            on_started=[self._started],
            on_stopping=[self._stop],
        )
        self._sums, self._summed_at = Ledger(), -math.inf
        for unit, words in LEDGER_CLASSES.items():
            gauge = self.metrics.gauge(f"ledger_{unit}")
            for word in words:
                gauge.labels(word).set_function(partial(self._ledger_sum, f"{word}_{unit}"))

    async def _start(self) -> None:
        await super()._start()
        log.info("aggregator", store=str(self.settings.aggregator_store), port=self.http.port)

    async def _stop(self) -> None:
        await super()._stop()
        self.store.close()

    async def _health(self) -> Mapping[str, Any]:
        return {**await super()._health(), "ledger": await self._ledger()}

    def _ledger_sum(self, name: str) -> float:
        """One look at the store for all sums of a scrape: attempts without receipt may be many (5 ms a thousand)."""
        now = time.monotonic()
        if now - self._summed_at > LEDGER_AGE_S:
            self._sums, self._summed_at = self.aggregator.ledger_summary().sums, now
        return float(getattr(self._sums, name))

    async def _ledger(self) -> Mapping[str, Any]:
        summary = self.aggregator.ledger_summary()
        in_flight = summary.in_flight_attempts
        return summary.sums._asdict() | {"in_flight_attempts": in_flight, "residual_tokens": summary.residual_tokens}
