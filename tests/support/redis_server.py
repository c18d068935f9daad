"""A Redis of one test's own, to be killed, frozen, filled or slowed down."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from processor.adapters.embedded import ChildServer, EmbeddedCache, answers_redis, redis_command
from tests.support.stack import free_port


def own_redis() -> tuple[ChildServer, str]:
    """A redis-server on PATH or the embedded Valkey, not started yet, and its URL. It starts there again, empty."""
    if (program := shutil.which("redis-server")) is None:
        embedded = EmbeddedCache()
        return embedded, embedded.url
    port = free_port()
    server = ChildServer(
        "redis-server",
        redis_command(program, port=port),
        answers=lambda: answers_redis("127.0.0.1", port),
        start_timeout_s=60,
    )
    return server, f"redis://127.0.0.1:{port}/0"


@contextmanager
def freeze(server: ChildServer) -> Iterator[None]:
    """SIGSTOP: connections stand, nobody answers."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


class SlowProxy:
    """Passes a Redis on at a port of its own; each answer is `delay_s` late. In a thread: the test's loop may block."""

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.delay_s = 0.0
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def lead_to(self, url: str) -> None:
        """Of connections that are opened from now on."""
        address = urlsplit(url)
        self._target = address.hostname, address.port

    def __enter__(self) -> Self:
        self._thread.start()
        serving = asyncio.start_server(self._pass_on, "127.0.0.1", self.port)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=self.delay_s + 1)  # clients have closed theirs
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # what is closed lets go of its socket in the next turn

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection(*self._target)
        await asyncio.gather(
            self._copy(reader, to_redis, late=False),
            self._copy(from_redis, writer, late=True),
        )

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, late: bool) -> None:
        """Until one side is gone, and with it the other."""
        try:
            with suppress(OSError):
                while piece := await source.read(65_536):
                    if late:
                        await asyncio.sleep(self.delay_s)
                    sink.write(piece)
                    await sink.drain()
        finally:
            sink.close()
