"""What every command shares: where output goes, exit codes, one readable line for each error of ours."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Coroutine, Mapping
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from processor.adapters import logs
from processor.errors import BrokerUnavailable, CacheUnavailable, DeliveryFailed, ProcessorError, RegistryUnavailable

T = TypeVar("T")

FAILED = 1
NOT_REACHABLE = 3
INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 ok, 1 failed or something is wrong, 2 wrong usage, 3 Kafka, the registry or Redis is not "
    "reachable, 130 interrupted. A worker or an aggregator that can't go on ends with 1, and its log says why. "
    "Settings come from environment variables, see `embedding-processor settings`."
)

WIDTH_OF_A_FILE = 160


def _console(*, stderr: bool) -> Console:
    """Where nobody looks at a screen, lines and tables get the width they need."""
    console = Console(stderr=stderr, soft_wrap=True)
    return console if console.is_terminal else Console(stderr=stderr, soft_wrap=True, width=WIDTH_OF_A_FILE)


out = _console(stderr=False)
err = _console(stderr=True)


class Options:
    """Of the whole command line, set before any command begins."""

    debug = False


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line, instead of text.")]


def exit_code(error: ProcessorError) -> int:
    """What the process ends with when a command raises this."""
    unreachable = isinstance(error, BrokerUnavailable | DeliveryFailed | RegistryUnavailable | CacheUnavailable)
    return NOT_REACHABLE if unreachable else FAILED


def run(work: Coroutine[Any, Any, T], *, debug: bool = False) -> T:
    """Run a command's coroutine; libraries keep quiet, since what fails is said by our own errors."""
    logs.configure("DEBUG" if debug else "WARNING", "console")
    if not debug:
        for noisy in ("aiokafka", "kafka", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return asyncio.run(work)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON object a line on standard output."""
    sys.stdout.write(json.dumps(document, default=str, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fail_if(failed: object) -> None:
    """End with `FAILED` when it is true."""
    if failed:
        raise typer.Exit(FAILED)


def is_utf8(text: str) -> bool:
    """Whether the bytes of an argument were: Python stands in surrogates for those that were not."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def visible(text: str) -> str:
    """A line or name as it may be shown: tenants choose names, and one that moves the cursor could forge a line."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def money(nanos: int) -> str:
    """Nano-dollars in dollars: cents, and as many digits more as it has."""
    cents, rest = divmod(nanos, 10_000_000)
    return f"${cents // 100:,}.{cents % 100:02d}" + f"{rest:07d}".rstrip("0")
