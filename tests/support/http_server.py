"""What the providers of tests have in common: a real HTTP server, its ledger, and ways to give no answer."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiohttp import web

MAX_BODY_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Call:
    """One request as the provider's books show it. `attempt_id` is its X-Client-Request-Id.

    `took_ms` is the provider's own time: from the request's last byte read to the answer's last byte written.
    """

    attempt_id: str
    at_ms: int
    model: str
    inputs: int
    tokens: int
    fault: str = ""
    billed: bool = False
    answered: bool = False
    status: int | None = None
    done_ms: int | None = None
    """When the answer was written out."""
    took_ms: float = 0.0


class HTTPServer(ABC):
    """Serves `routes` in this event loop on a port of this machine, 0 a free one, while it is entered."""

    def __init__(self, *, port: int = 0, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.ledger: list[Call] = []
        self.root_url = ""
        self._port = port
        self._max_body_bytes = max_body_bytes
        self._closing = asyncio.Event()
        self.silent = asyncio.Event()
        """Set once a client waits for what never comes."""

    @abstractmethod
    def routes(self) -> Iterable[web.RouteDef]:
        """What it answers to."""

    @property
    def base_url(self) -> str:
        """Of the API; `root_url` is without a path."""
        return self.root_url

    @property
    def billed_tokens(self) -> int:
        return sum(call.tokens for call in self.ledger if call.billed)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=self._max_body_bytes)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self.root_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Nobody listens any more."""
        self._closing.set()
        await self._runner.cleanup()

    async def hang(self, request: web.Request) -> web.StreamResponse:
        """Until the client gives up or the server closes."""
        self.silent.set()
        while not (self._closing.is_set() or request.transport is None or request.transport.is_closing()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), 0.05)
        return self.break_off(request)

    def break_off(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()
