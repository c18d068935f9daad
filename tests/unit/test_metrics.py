"""Metrics are declared once and used as declared."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from processor.metrics import METRICS, Metrics

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
