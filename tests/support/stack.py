"""Processor processes for integration and fault tests: started, watched, killed, their logs kept for the report."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from processor.settings import Settings, load

PORTS = (20_000, 32_000)
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
"""A guard against hanging, no more: whatever is waited for comes as soon as the machine lets it."""


def free_port() -> int:
    """None that the system gives to outgoing connections: seconds pass until a child listens, and a server that is
    killed is away for a minute, while its clients try to connect again and again.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def held_port() -> socket.socket:
    """A port that is nobody else's while this is open. A server that lets its address be reused, as they do, can listen
    there: this one does not.
    """
    while True:
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", free_port()))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after the bind, which must share with nobody
        return held


class Child:
    """One `embedding-processor` process."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.port = int(environment["EMBEDDING_HTTP_PORT"])
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "processor", *arguments],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=out,
                stderr=out,
            )

    def get(self, path: str) -> dict[str, Any] | None:
        """A JSON document of its internal port, or None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                document: dict[str, Any] = json.load(answer)
                return document
        except (urllib.error.URLError, OSError, ValueError):
            return None

    async def report(self, path: str) -> dict[str, Any]:
        """The same of one that runs: a pause of the machine is waited for."""
        found: list[dict[str, Any]] = []

        def told() -> bool:
            self.check()
            if (document := self.get(path)) is not None:
                found.append(document)
            return bool(found)

        await until(told, within_s=120, what=f"{self.name} answers at {path}")
        return found[0]

    def metric(self, name: str) -> float | None:
        """The value of a metric without labels, or None when there is no such one."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        return None

    def ready(self) -> bool:
        self.check()
        health = self.get("/health/ready")
        return bool(health and health["ready"])

    def check(self) -> None:
        """Fails with the end of its log when it ended by itself."""
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop:\n{self.tail()}") from None


class Stack:
    """Environment and children of one test; everything that still runs is killed at the end."""

    def __init__(self, folder: Path, prefix: str, bootstrap_servers: str, **environment: str) -> None:
        self.folder = folder
        self.environment = {
            "EMBEDDING_BOOTSTRAP_SERVERS": bootstrap_servers,
            "EMBEDDING_TOPIC_PREFIX": f"{prefix}.",
            "EMBEDDING_GROUP_ID": f"{prefix}-workers",
            "EMBEDDING_AGGREGATOR_GROUP_ID": f"{prefix}-aggregator",
            "EMBEDDING_AGGREGATOR_STORE": str(folder / "aggregator.sqlite"),
            "EMBEDDING_SESSION_TIMEOUT_S": "6",
            "EMBEDDING_HEARTBEAT_INTERVAL_S": "1",
            "EMBEDDING_LEASE_MARGIN_S": "1",
            "EMBEDDING_REVOKE_BUDGET_S": "3",
            "EMBEDDING_CACHE_SECRET": prefix,
        } | environment
        self.children: list[Child] = []

    def settings(self) -> Settings:
        return load(
            **{name.removeprefix("EMBEDDING_").lower(): value for name, value in self.environment.items()},
        )

    def spawn(self, role: str, *arguments: str, **environment: str) -> Child:
        """Start a `worker` or an `aggregator`; wait with `until(child.ready)`."""
        name = f"{role}-{len(self.children)}"
        full = self.environment | {"EMBEDDING_HTTP_PORT": str(free_port())} | environment
        child = Child(name, [role, *arguments], full, self.folder / f"{name}.log")
        self.children.append(child)
        return child

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of `embedding-processor`, run to its end, with nobody to ask."""
        return subprocess.run(
            [sys.executable, "-m", "processor", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.kill()


async def until(
    condition: Callable[[], bool | Awaitable[bool]], *, within_s: float, what: str, every_s: float = 0.1
) -> None:
    """Wait for a condition with a deadline; `what` is said when it does not come.

    It is looked at once more after the deadline: the machine may have stood still since the last look, or during it.
    """
    deadline = time.monotonic() + within_s
    while True:
        is_last = time.monotonic() > deadline
        answer = condition()
        if answer if isinstance(answer, bool) else await answer:
            return
        if is_last:
            raise AssertionError(f"not within {within_s:.0f} s: {what}")
        await asyncio.sleep(every_s)
