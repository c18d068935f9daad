"""Several workers on one machine: N processes that start together, stop together and end together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import structlog

from processor.adapters import logs
from processor.adapters.embedded import dying_with_parent
from processor.settings import PREFIX, Settings

KILL_AFTER_S = 5.0
"""Beyond `shutdown_timeout_s`, at which a process ends itself: then it is frozen."""

log = structlog.get_logger("embedding-processor")


def run_processes(count: int, settings: Settings, *arguments: str) -> int:
    """Run `count` times `embedding-processor ARGUMENTS` until SIGTERM or SIGINT, which all of them are told.

    Returns 0 if all ended cleanly. When one ends by itself the others are stopped, and its exit code is returned (for
    a signal 128 and its number): whoever restarts this then starts all of them.
    """
    logs.configure(settings.log_level, settings.log_format)
    environments = [environment(settings, place, count) for place in range(count)]
    command = dying_with_parent([sys.executable, "-m", "processor", *arguments])
    return asyncio.run(_supervise(command, environments, settings))


def environment(settings: Settings, place: int, count: int) -> Mapping[str, str]:
    """What the process at this place has of its own: port, static membership, its share of the machine's cores."""
    own = {f"{PREFIX}HTTP_PORT": str(settings.http_port + place if settings.http_port else 0)}
    if settings.group_instance_id is not None:
        own[f"{PREFIX}GROUP_INSTANCE_ID"] = f"{settings.group_instance_id}-{place}"
    if settings.local_threads == 0:
        own[f"{PREFIX}LOCAL_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return own


async def _supervise(command: Sequence[str], environments: Sequence[Mapping[str, str]], settings: Settings) -> int:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    children = [await asyncio.create_subprocess_exec(*command, env=os.environ | own) for own in environments]
    log.info("processes", pids=[child.pid for child in children], own=list(environments))
    ends = [asyncio.create_task(child.wait()) for child in children]
    telling = asyncio.create_task(told.wait())
    await asyncio.wait({telling, *ends}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    ended = {child.pid: child.returncode for child in children if child.returncode is not None}
    if ended:
        log.error("a process ended: stopping the others", exit_codes=ended)
    for child in children:
        if child.returncode is None:
            child.terminate()
    _, frozen = await asyncio.wait(ends, timeout=settings.shutdown_timeout_s + KILL_AFTER_S)
    for child in children:
        if child.returncode is None:
            log.critical("a process does not stop: killing it", pid=child.pid)
            child.kill()
    await asyncio.gather(*frozen)
    return next(filter(None, (_exit_code(child, told=child.pid not in ended) for child in children)), 0)


def _exit_code(child: asyncio.subprocess.Process, *, told: bool) -> int:
    """As a shell says it. Who was told to stop before it could listen for that has stopped cleanly."""
    code = child.returncode
    assert code is not None
    if told and code == -signal.SIGTERM:
        return 0
    return 128 - code if code < 0 else code
