"""Time that runs out when a test says so: what waits for a time-out is no race with a slow machine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ENDS_WITHIN_S = 30
"""What has no more time ends at once; a guard against one that does not."""


def skip(seconds: float) -> None:
    """To the running loop so many seconds have passed: its timers that are due by then go off."""
    loop = asyncio.get_running_loop()
    before = loop.time
    vars(loop)["time"] = lambda: before() + seconds


async def settled() -> None:
    """Whatever needs no answer from outside has been done: a request on an open connection is sent."""
    for _ in range(100):
        await asyncio.sleep(0)


async def out_of_time(call: Coroutine[Any, Any, T], *, timeout_s: float, silent: asyncio.Event) -> T:
    """What becomes of a call when `timeout_s` are over as soon as its server is silent; else it has all its time."""
    running, silence = asyncio.create_task(call), asyncio.create_task(silent.wait())
    await asyncio.wait({running, silence}, return_when=asyncio.FIRST_COMPLETED)
    silence.cancel()
    if not running.done():
        skip(timeout_s + 1)  # aiohttp rounds up to whole seconds
    return await asyncio.wait_for(running, ENDS_WITHIN_S)
