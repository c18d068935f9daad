"""Conventions that a reader relies on and a linter does not know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST_FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


@pytest.mark.parametrize("path", TEST_FILES)
def test_a_test_states_its_law_in_one_sentence(path: str) -> None:
    """The docstring of each test is one sentence that ends with a full stop."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            law = ast.get_docstring(node) or ""
            assert law.endswith("."), f"{path}:{node.lineno} {node.name}: a sentence that ends with a full stop"
            assert ". " not in law.replace("\n", " "), f"{path}:{node.lineno} {node.name}: one sentence, not two"
