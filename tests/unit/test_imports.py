"""Dependencies point inwards: what each part of the package may import, of ours and of others."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "processor"

INNERMOST = ("accounts", "domain", "errors")
INNER = (*INNERMOST, "identity", "ports")
OUTERMOST = ("app", "__main__", "cli*", "demo*")


class Part(NamedTuple):
    """Modules by name (without the package), what of ours they may import, and which libraries."""

    modules: tuple[str, ...]
    ours: tuple[str, ...]
    libraries: tuple[str, ...]


#: The first part that names a module holds for it. Whatever is not named here is a step.
PARTS = (
    Part(("domain", "errors"), (), ("numpy",)),
    Part(("accounts",), ("domain",), ()),
    Part(("identity",), INNERMOST, ()),
    Part(("watermark", "suspicion"), (), ()),
    Part(("ports",), (*INNERMOST, "identity"), ("numpy",)),
    Part(("settings",), INNERMOST, ("pydantic", "pydantic_settings")),
    Part(("metrics",), INNER, ("prometheus_client",)),
    Part(("__init__",), (), ()),
    Part(
        ("adapters.faust_engine*",),
        (*INNER, "metrics", "settings", "adapters*", "watermark", "suspicion"),
        ("aiokafka", "faust", "mode", "numpy", "structlog"),
    ),
    Part(
        ("adapters*",),
        (*INNER, "metrics", "settings", "adapters*"),
        (
            *("aiohttp", "aiokafka", "bpe_openai", "fastavro", "numpy", "onnxruntime", "openai"),
            *("prometheus_client", "pydantic", "pydantic_core", "redis", "structlog", "tokenizers", "yaml"),
            *("httpx2", "sentence_transformers", "torch", "transformers"),
        ),
    ),
    Part(("client*",), (*INNER, "settings", "adapters*", "client*"), ("aiokafka", "numpy", "structlog")),
    Part(
        OUTERMOST,
        ("*",),
        ("aiokafka", "click", "numpy", "prometheus_client", "pydantic", "rich", "structlog", "typer", "uvloop", "yaml"),
    ),
)
STEP = Part(("*",), ("[!_]*",), ("numpy", "structlog"))
#: What a step may not import of ours, though it may import other steps.
NOT_FOR_STEPS = ("adapters*", "client*", "metrics", "settings", *OUTERMOST)


def part_of(module: str) -> Part:
    for part in PARTS:
        if any(fnmatch(module, pattern) for pattern in part.modules):
            return part
    return STEP


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of all that is imported, late and type-checking imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = f"{PACKAGE}.{module}".split(".")[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            if base == PACKAGE:  # "from processor import decode"
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield base


def violations(source: str, module: str) -> list[str]:
    """What the module imports and may not."""
    part = part_of(module)
    wrong = []
    for name in imports(ast.parse(source), module):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            allowed = any(fnmatch(rest, pattern) for pattern in part.ours)
            if part is STEP and any(fnmatch(rest, pattern) for pattern in NOT_FOR_STEPS):
                allowed = False
        else:
            allowed = top in sys.stdlib_module_names or top in part.libraries
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_inwards(module: str) -> None:
    """No module imports what lies further out than itself, nor a library that is another part's business."""
    assert violations(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("domain", "import processor.errors"),
        ("ports", "from processor import work"),
        ("pipeline", "from processor.adapters.embedded import EmbeddedBroker"),
        ("pipeline", "from .adapters import embedded"),
        ("pipeline", "from processor.settings import Settings"),
        ("pipeline", "from processor.metrics import RESULTS"),
        ("pipeline", "def late():\n    import redis.asyncio"),
        ("embed", "from aiohttp import web"),
        ("adapters.openai", "import processor.app"),
        ("adapters.openai", "from faust import App"),
        ("adapters.openai", "from ..pipeline import process"),
        ("adapters.__init__", "from ..pipeline import process"),
        ("client.client", "from processor.pipeline import process"),
    ],
)
def test_a_dependency_that_points_outwards_is_found(module: str, source: str) -> None:
    """The walk sees each way to write an import that breaks the rule."""
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("pipeline", "from processor.decode import decode\nimport numpy as np\nfrom . import domain"),
        ("adapters.faust_engine", "import faust, mode.loop\nfrom processor.ports import Clock"),
        ("client.__init__", "from .client import Client"),
        ("app", "from processor.adapters.embedded import EmbeddedBroker\nfrom processor import pipeline"),
    ],
)
def test_a_dependency_that_points_inwards_is_allowed(module: str, source: str) -> None:
    """The rule leaves room for what the parts are there to import."""
    assert violations(source, module) == []
