"""A Confluent-compatible schema registry: ids of what we write, schemas of what we read. Only ours are ever trusted."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp

from processor.adapters.schemas import Schema, allowed
from processor.errors import RegistryUnavailable

SCHEMA_NOT_FOUND = 40403
MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"


class SchemaRegistry:
    """Client of the few calls that framing needs. Raises RegistryUnavailable when there is no usable answer.

    A user and password in the URL are sent as basic authentication and appear in no message.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self.known: dict[int, Schema | None] = {}

    async def schema(self, schema_id: int) -> Schema | None:
        """Our released schema behind an id; None when the id is unknown or stands for a foreign schema.

        What an id stands for never changes, so answers are kept; an unknown id is asked for again next time.
        """
        if schema_id not in self.known:
            status, body = await self._request("GET", f"/schemas/ids/{schema_id}")
            if isinstance(body, dict) and body.get("error_code") == SCHEMA_NOT_FOUND:
                return None  # any other HTTP 404 may come from a proxy before the registry
            self.known[schema_id] = _ours(body) if self._usable(status, body, "schema") else None
        return self.known[schema_id]

    async def register(self, subject: str, schema: Schema) -> int:
        """The id of the schema under `subject`; it is registered there when it is new.

        A new subject is put under FULL_TRANSITIVE, where the registry lets us; our own tests hold us to it anyway.
        A known schema is only looked up, so a registry that is read-only for us will do.
        """
        path, body = f"/subjects/{quote(subject, safe='')}", {"schema": schema.text, "schemaType": "AVRO"}
        status, answer = await self._request("POST", path, body)
        if status == HTTPStatus.NOT_FOUND:
            status, answer = await self._request("POST", f"{path}/versions", body)
            self._usable(status, answer, "id")
            await self._request("PUT", f"/config/{quote(subject, safe='')}", {"compatibility": "FULL_TRANSITIVE"})
        self._usable(status, answer, "id")
        schema_id = int(answer["id"])
        self.known[schema_id] = schema
        return schema_id

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """HTTP status and JSON body (None when it isn't JSON)."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers={"Accept": MEDIA_TYPE})
        try:
            async with self._session.request(method, self._url + path, json=body) as answer:
                try:
                    return answer.status, await answer.json(content_type=None)
                except ValueError:
                    return answer.status, None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RegistryUnavailable(
                f"schema registry: no answer to {method} {path} ({type(error).__name__}); "
                "check EMBEDDING_SCHEMA_REGISTRY_URL and the registry"
            ) from None

    @staticmethod
    def _usable(status: int, body: Any, member: str) -> bool:
        """True when the answer is a success that holds the member; raises otherwise."""
        if status != HTTPStatus.OK or not isinstance(body, dict) or member not in body:
            raise RegistryUnavailable(
                f"schema registry: answered HTTP {status} without a usable {member!r}; "
                "check EMBEDDING_SCHEMA_REGISTRY_URL, our rights and the registry"
            )
        return True


def _ours(body: dict[str, Any]) -> Schema | None:
    text = body["schema"]
    avro = body.get("schemaType", "AVRO") == "AVRO"
    return allowed(text) if avro and isinstance(text, str) else None
