"""How the shared cache and the shared quota reach Redis: a client, and a bound on what each trip may take."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterCrossSlotError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)

from processor.errors import CacheUnavailable, QuotaUnavailable, SettingsError
from processor.settings import PREFIX, Settings

Client = Redis | RedisCluster

NODE_SHARE = 0.7
"""Of a trip's time, for one node of a Cluster: the client must see that a node is silent before the trip is over. Only
then it asks the others who has the slots now; else a node that was replaced would be waited for until a restart."""


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """Where Redis is and what it asks of us. What the URL says of user and password goes before the fields here."""

    url: str = field(repr=False)
    cluster: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """SettingsError when the URL is missing or the password can't be read."""
        if not settings.redis_url:
            raise SettingsError(f"{PREFIX}REDIS_URL: is missing")
        return cls(
            settings.redis_url,
            cluster=settings.redis_cluster,
            username=settings.redis_username,
            password=settings.secret("redis_password"),
            ca_file=settings.redis_ca_file,
            cert_file=settings.redis_cert_file,
            key_file=settings.redis_key_file,
        )

    def open(self, *, timeout_s: float, retries: int, decode_responses: bool = False) -> Client:
        """Nothing is sent yet. SettingsError when the URL is none, or a certificate or key can't be used."""
        self._check_files()
        of_node_s = NODE_SHARE * timeout_s if self.cluster else timeout_s
        options: dict[str, Any] = {
            "username": self.username,
            "password": self.password,
            "protocol": 2,
            "socket_timeout": of_node_s,
            "socket_connect_timeout": of_node_s,
            "retry": Retry(NoBackoff(), retries),
            "decode_responses": decode_responses,
        }
        if self.url.startswith("rediss://"):
            options |= {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}
        try:
            if self.cluster:
                return RedisCluster.from_url(self.url, **options)
            # Its connection is closed then: the address may lead to another primary by now. A Cluster says which.
            return Redis.from_url(self.url, retry_on_error=[ReadOnlyError], **options)
        except ValueError:
            raise SettingsError(f"{PREFIX}REDIS_URL: must be redis://, rediss:// or unix://") from None
        except RedisClusterException:
            raise SettingsError(f"{PREFIX}REDIS_URL: of a cluster must name a host, and no database but 0") from None

    def _check_files(self) -> None:
        """What the client would only find out with its first connection."""
        files = {"CA": self.ca_file, "CERT": self.cert_file, "KEY": self.key_file}
        given = {f"{PREFIX}REDIS_{name}_FILE": path for name, path in files.items() if path is not None}
        if not self.url.startswith("rediss://"):
            if given:
                raise SettingsError(f"{', '.join(given)}: for rediss:// alone, correct {PREFIX}REDIS_URL")
            return
        for name, path in given.items():
            try:
                path.read_bytes()
            except OSError as error:
                raise SettingsError(f"{name}: can't read it: {error.strerror}") from None
        if self.key_file is not None and self.cert_file is None:
            raise SettingsError(f"{PREFIX}REDIS_CERT_FILE: is missing beside {PREFIX}REDIS_KEY_FILE")
        context = ssl.create_default_context()
        try:
            name = f"{PREFIX}REDIS_CA_FILE"
            if self.ca_file is not None:
                context.load_verify_locations(self.ca_file)
            name = f"{PREFIX}REDIS_CERT_FILE"
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except ssl.SSLError:
            raise SettingsError(f"{name}: must be a PEM file, of a certificate with its key") from None


NO_REDIS = (ValueError, TypeError, LookupError, RecursionError)
"""What the client raises when an answer is none of Redis."""

CLOSED = (AttributeError, RuntimeError)
"""And when its connection was closed under it: a trip that finds a node of a Cluster gone closes those of all."""


@asynccontextmanager
async def trip(timeout_s: float, unavailable: type[CacheUnavailable | QuotaUnavailable]) -> AsyncIterator[None]:
    """Raises `unavailable` when Redis refuses, is not there, takes longer or talks nonsense."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (RedisError, RedisClusterException, OSError, TimeoutError, *NO_REDIS, *CLOSED) as error:
        raise unavailable(f"redis: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """The class of the fault, and the settings to look at. No message: one can quote the command, or the address."""
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case AuthenticationError():
                return f"AuthenticationError: correct {PREFIX}REDIS_USERNAME and {PREFIX}REDIS_PASSWORD, or its file"
            case NoPermissionError():
                return f"NoPermissionError: grant more to the user of {PREFIX}REDIS_USERNAME"
            case ClusterCrossSlotError() | MovedError():
                return f"{type(cause).__name__}: it is a Cluster, set {PREFIX}REDIS_CLUSTER=true"
            case ssl.SSLCertVerificationError():
                return f"SSLCertVerificationError: correct {PREFIX}REDIS_CA_FILE, or the host in {PREFIX}REDIS_URL"
            case ssl.SSLError():
                return f"SSLError: correct {PREFIX}REDIS_URL and {PREFIX}REDIS_CERT_FILE"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, NO_REDIS):
        return f"{type(error).__name__}: what answers is no Redis, correct {PREFIX}REDIS_URL"
    if isinstance(error, CLOSED):
        return "connection closed, another trip found a node gone"
    if isinstance(error, ConnectionError | redis.exceptions.ConnectionError | RedisClusterException):
        settings = f"{PREFIX}REDIS_URL"
        if isinstance(error, RedisClusterException):  # also when what answers is no Cluster
            settings += f" or {PREFIX}REDIS_CLUSTER"
        return f"{type(error).__name__}: correct {settings}, or start it; with TLS look at the certificates"
    return type(error).__name__
