"""Metrics are declared once and used as declared."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from processor.accounts import LedgerSummary
from processor.app import AggregatorProcess, watch_gate
from processor.errors import ProviderPaused, ProviderThrottled
from processor.limits import Gate, LimitPolicy
from processor.metrics import METRICS, Metrics
from processor.settings import load
from tests.support.steps import VirtualClock

SOURCES = Path(__file__).resolve().parents[2] / "processor"
DECLARED = {metric.name: metric for metric in METRICS}


def _uses() -> Iterator[tuple[str, str, str, frozenset[str]]]:
    """(place, verb, metric, labels) of every call of an `Events` observer."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 3:
                name, _, labels = node.args
                if node.func.attr in {"count", "observe"} and isinstance(name, ast.Constant):
                    assert isinstance(labels, ast.Dict), f"{path}:{node.lineno}: labels must be written out"
                    keys = frozenset(str(key.value) for key in labels.keys if isinstance(key, ast.Constant))
                    yield f"{path.name}:{node.lineno}", node.func.attr, str(name.value), keys


@pytest.mark.parametrize("use", list(_uses()), ids=lambda use: f"{use[0]}-{use[2]}")
def test_a_metric_is_used_as_it_was_declared(use: tuple[str, str, str, frozenset[str]]) -> None:
    """Name, kind and labels of every use are those of the one declaration."""
    _, verb, name, labels = use
    assert name in DECLARED
    assert DECLARED[name].kind == {"count": "counter", "observe": "histogram"}[verb]
    assert labels == set(DECLARED[name].labels)


def test_a_process_exposes_all_of_them() -> None:
    """The exposition holds every declared metric under one prefix."""
    exposed = generate_latest(Metrics().registry).decode()
    for metric in METRICS:
        assert f"embedding_{metric.name}" in exposed


def test_each_deployment_tells_what_its_gate_does() -> None:
    """Calls in flight, how many there may be, waits and pauses are read when the page is, of each deployment apart."""
    metrics, clock = Metrics(), VirtualClock()
    first, second = (
        Gate(clock, LimitPolicy(max_concurrent_calls=3, retry_initial_s=1.0), jitter=lambda low, high: high)
        for _ in range(2)
    )
    watch_gate(metrics, "first", first)
    watch_gate(metrics, "second", second)

    def told(deployment: str) -> dict[str, float | None]:
        labels = {"deployment": deployment}
        words = ("calls_in_flight", "concurrency", "wait_seconds", "paused")
        return {word: metrics.registry.get_sample_value(f"embedding_deployment_{word}", labels) for word in words}

    idle = {"calls_in_flight": 0, "concurrency": 3, "wait_seconds": 0, "paused": 0}
    assert told("first") == told("second") == idle
    permits = [first.begin(10), first.begin(10), first.begin(10)]
    assert told("first") == idle | {"calls_in_flight": 3}
    permits[0].failed(ProviderThrottled("rate_limited", http_status=429, retry_after_s=7.0))
    waiting = told("first")
    assert waiting["calls_in_flight"] == 2
    assert waiting["concurrency"] == pytest.approx(2.1)
    assert waiting["wait_seconds"] == pytest.approx(7.1)
    assert waiting["paused"] == 0
    permits[1].failed(ProviderPaused("key_refused", http_status=401))
    assert told("first")["paused"] == 1
    assert told("second") == idle


def test_a_scrape_looks_at_the_ledger_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its sums are of one moment, and the loop is not held up once for each of them."""
    process = AggregatorProcess(load(aggregator_store=tmp_path / "store.sqlite"))
    looks: list[LedgerSummary] = []
    summary = process.aggregator.ledger_summary()

    def look() -> LedgerSummary:
        looks.append(replace(summary, sums=summary.sums._replace(billed_tokens=5, waste_cost_nanos=7)))
        return looks[-1]

    monkeypatch.setattr(process.aggregator, "ledger_summary", look)
    shown = generate_latest(process.metrics.registry).decode()
    process.store.close()
    assert 'embedding_ledger_tokens{class="billed"} 5.0' in shown
    assert 'embedding_ledger_cost_nanos{class="waste"} 7.0' in shown
    assert len(looks) == 1
