"""The real clock and the real ids."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid


class SystemClock:
    """Implements `ports.Clock`."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def new_attempt_id() -> str:
    return str(uuid.uuid4())


def worker_id() -> str:
    """Host and process: enough to find the log that a ledger record speaks of."""
    return f"{socket.gethostname()}-{os.getpid()}"
