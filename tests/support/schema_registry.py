"""A schema registry that speaks the calls of Confluent's REST API which framing needs, over real HTTP."""

from __future__ import annotations

import json
from typing import Any, Self

from aiohttp import web

MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"


class RegistryServer:
    """Ids are given by content, as a real registry gives them. `requests` lists what was asked ("GET /path").

    `read_only` refuses to register; `fails_with` answers everything with that HTTP status.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.compatibility: dict[str, str] = {}
        self.read_only = False
        self.fails_with: int | None = None
        self._schemas: list[dict[str, Any]] = []
        self._subjects: dict[str, set[int]] = {}

    def put(self, schema: str, schema_type: str = "AVRO") -> int:
        """Register a schema, whatever it is, and return its id."""
        entry = {"schema": schema, "schemaType": schema_type}
        if entry not in self._schemas:
            self._schemas.append(entry)
        return self._schemas.index(entry) + 1

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._watch])
        app.add_routes(
            [
                web.get("/schemas/ids/{id}", self._schema),
                web.post("/subjects/{subject}", self._look_up),
                web.post("/subjects/{subject}/versions", self._register),
                web.put("/config/{subject}", self._configure),
            ]
        )
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _watch(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.fails_with is not None:
            return _answer({"error_code": self.fails_with, "message": "canary"}, self.fails_with)
        answer = await handler(request)
        assert isinstance(answer, web.StreamResponse)
        return answer

    async def _schema(self, request: web.Request) -> web.Response:
        number = int(request.match_info["id"])
        if not 0 < number <= len(self._schemas):
            return _answer({"error_code": 40403, "message": "Schema not found"}, 404)
        entry = self._schemas[number - 1]
        # Confluent's registry leaves the type of Avro out.
        return _answer({"schema": entry["schema"]} if entry["schemaType"] == "AVRO" else entry)

    async def _look_up(self, request: web.Request) -> web.Response:
        body = await request.json()
        entry = {"schema": body["schema"], "schemaType": body.get("schemaType", "AVRO")}
        number = self._schemas.index(entry) + 1 if entry in self._schemas else 0
        if number not in self._subjects.get(request.match_info["subject"], set()):
            return _answer({"error_code": 40401, "message": "Subject not found"}, 404)
        return _answer({"id": number, "version": 1, **entry})

    async def _register(self, request: web.Request) -> web.Response:
        if self.read_only:
            return _answer({"error_code": 40301, "message": "canary"}, 403)
        body = await request.json()
        number = self.put(body["schema"], body.get("schemaType", "AVRO"))
        self._subjects.setdefault(request.match_info["subject"], set()).add(number)
        return _answer({"id": number})

    async def _configure(self, request: web.Request) -> web.Response:
        self.compatibility[request.match_info["subject"]] = (await request.json())["compatibility"]
        return _answer(await request.json())


def _answer(body: Any, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), status=status, content_type=MEDIA_TYPE)
