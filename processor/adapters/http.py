"""The internal HTTP port: metrics, health, models. Nothing here embeds, and nothing here is for the public."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from processor.errors import SettingsError

Report = Callable[[], Awaitable[Mapping[str, Any]]]
"""A JSON document made anew for each request. For health it holds `ready` (bool) and a dependency a key."""


class InternalServer:
    """Serves `/metrics`, `/health/live`, `/health/ready`, `/health/detailed` and one path for each of `reports`."""

    def __init__(
        self, host: str, port: int, *, registry: CollectorRegistry, health: Report, reports: Mapping[str, Report]
    ) -> None:
        self._host = host
        self._port = port
        self._registry = registry
        self._health = health
        self._reports = reports
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The bound port, after `start`."""
        assert self._runner is not None
        port: int = self._runner.addresses[0][1]
        return port

    async def start(self) -> None:
        """Raises SettingsError when it can't listen there."""
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/health/detailed", self._detailed)
        for path, report in self._reports.items():
            app.router.add_get(path, _json_handler(report))
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            raise SettingsError(
                f"EMBEDDING_HTTP_PORT: can't listen at {self._host}:{self._port} ({error.strerror or error}); "
                "choose another port, 0 picks a free one, or correct EMBEDDING_HTTP_HOST"
            ) from None

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _root(self, request: web.Request) -> web.Response:
        paths = sorted({route.resource.canonical for route in request.app.router.routes() if route.resource})
        return _json({"service": "embedding-processor", "paths": paths})

    async def _metrics(self, _request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _live(self, _request: web.Request) -> web.Response:
        return _json({"live": True})

    async def _ready(self, _request: web.Request) -> web.Response:
        ready = bool((await self._health())["ready"])
        return _json({"ready": ready}, status=200 if ready else 503)

    async def _detailed(self, _request: web.Request) -> web.Response:
        return _json(await self._health())


def _json(document: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, dumps=lambda value: json.dumps(value, default=str))


def _json_handler(report: Report) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_request: web.Request) -> web.Response:
        return _json(await report())

    return handle
