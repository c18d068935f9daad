"""Every metric, declared once: name, kind, closed labels and help. The docs table is made from this list.

No label holds an id, a tenant or a text: the number of series is bounded by the words of our own open sets and by the
names in the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metric(NamedTuple):
    """`name` is what the steps call it; it is exposed as `embedding_<name>` (`_total` added to counters)."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = SECONDS


METRICS = (
    Metric("texts", "counter", ("cache", "outcome"), "Texts that got their outcome, by cache level and error code."),
    Metric("refused_requests", "counter", ("code",), "Requests refused as a whole, by error code."),
    Metric("dead_letters", "counter", ("class",), "Records sent to the DLQ, by class."),
    Metric("provider_calls", "counter", ("outcome",), "Provider calls (attempts): ok, invalid, failed, unanswered."),
    Metric("provider_errors", "counter", ("code",), "Failed provider calls, by our word for the fault."),
    Metric("provider_tokens", "counter", ("model",), "Tokens billed by the provider in valid answers."),
    Metric("provider_call_seconds", "histogram", (), "Time of one provider call."),
    Metric("counter_drift", "counter", ("model",), "Bills that differ from an exact local count."),
    Metric("cache_lookups", "counter", ("level", "result"), "Cache look-ups of keys, by level: hit or miss."),
    Metric("cache_faults", "counter", ("kind",), "Shared-cache faults: unavailable, corrupt, not stored."),
    Metric("shared_cache_gone", "gauge", ("use",), "1 while reads (writes) go on without the shared cache: it failed."),
    Metric("l1_bytes", "gauge", (), "Size of the in-process cache as it counts itself."),
    Metric("call_texts", "histogram", (), "Texts of one provider call.", TEXTS),
    Metric("window_seconds", "histogram", (), "Time of one window's look-up and count."),
    Metric("window_texts", "histogram", (), "Texts of one window.", TEXTS),
    Metric(
        "read_ahead_bytes",
        "gauge",
        (),
        "Bytes of records admitted and not yet finished, 4,000 and its vector added a text.",
    ),
    Metric("queued_texts", "gauge", (), "Distinct texts that wait for a window or a call."),
    Metric("provider_paused", "gauge", (), "1 while every deployment is paused; /health/detailed says why."),
    Metric("deployment_paused", "gauge", ("deployment",), "1 while the deployment is passed over, but for probes."),
    Metric("deployment_calls_in_flight", "gauge", ("deployment",), "Calls of a deployment in flight."),
    Metric("deployment_concurrency", "gauge", ("deployment",), "Calls in flight that are worth their while now."),
    Metric("deployment_wait_seconds", "gauge", ("deployment",), "Time until it is called again at all; 0: no wait."),
    Metric(
        "longest_loop_hold_seconds",
        "gauge",
        (),
        "Longest time that one piece of work kept all others waiting, in the last one to two minutes.",
    ),
    Metric("extension_loaded", "gauge", ("name",), "1 if a compiled part of faust or aiokafka is in use; 0 is slow."),
    Metric(
        "usage_events",
        "counter",
        ("outcome",),
        "Usage events: charged, duplicate or late; other: a token type not totalled.",
    ),
    Metric("stale_vectors_deleted", "counter", (), "Tombstones written for what a newer manifest left out."),
    Metric("budgets_reached", "counter", ("percent",), "Payers' months that reached 50, 80 or 100% of their budget."),
    Metric(
        "budgets_age_seconds",
        "gauge",
        (),
        "Time since the brokers last confirmed a worker's view of the budgets; -1: it has none.",
    ),
    Metric("aggregator_pruned_keys", "counter", (), "Keys dropped from the store: no copy of them can come."),
    Metric("ledger_over_attributed_attempts", "counter", (), "Attempts charged more than their bill: must stay 0."),
    Metric(
        "ledger_tokens",
        "gauge",
        ("class",),
        "Tokens of the ledger: billed, attributed, recovered and the residuals by class; unpriced ones of these; and "
        "what stays 0: over_attributed, and unmatched but for moments.",
    ),
    Metric("ledger_cost_nanos", "gauge", ("class",), "Cost of the residuals by class, in nano-dollars."),
)


class Metrics:
    """The metrics of one process in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            name = f"embedding_{metric.name}"
            if metric.kind == "counter":
                self._counters[metric.name] = Counter(name, metric.help, metric.labels, registry=self.registry)
            elif metric.kind == "gauge":
                self._gauges[metric.name] = Gauge(name, metric.help, metric.labels, registry=self.registry)
            else:
                self._histograms[metric.name] = Histogram(
                    name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets
                )

    def count(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def gauge(self, name: str) -> Gauge:
        return self._gauges[name]
