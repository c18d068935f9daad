"""How every client of ours connects to Kafka, by the settings, and what we say when that fails."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import UnknownError

from processor.errors import BrokerUnavailable, SettingsError
from processor.settings import PREFIX, Settings

T = TypeVar("T")

FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 5.0

METADATA_POLL_S = 0.1
"""Between two looks for the leader of a partition that has none."""

log = structlog.stdlib.get_logger(__name__)


def connection(settings: Settings) -> dict[str, Any]:
    """Keywords for aiokafka's clients; never print them, they hold a secret. Raises SettingsError."""
    protocol = settings.security_protocol
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": protocol,
    }
    if protocol.startswith("SASL"):
        options |= _sasl(settings)
    if protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(settings)
    return options


def unavailable(settings: Settings, error: BaseException) -> BrokerUnavailable:
    """What to raise in place of an error of the Kafka client."""
    said = f"the brokers at {settings.bootstrap_servers} don't answer as they should ({type(error).__name__}); "
    if isinstance(error, UnknownError) and settings.producer_idempotent:  # Tansu's answer to InitProducerId
        return BrokerUnavailable(said + f"if they are the demo's, set {PREFIX}PRODUCER_IDEMPOTENT=false")
    return BrokerUnavailable(
        said + f"check {PREFIX}BOOTSTRAP_SERVERS, the security settings and our rights",
        may_pass=isinstance(error, TimeoutError) or bool(getattr(error, "retriable", False)),
    )


async def answered(settings: Settings, ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` returns, once the brokers answer: they are waited for with back-off, for `broker_wait_s`.

    For a process that starts: ended at once, it would be started again more and more rarely while they are away, and
    late when they are back. Raises BrokerUnavailable when they stay away, or when waiting would not help.
    """
    clock = asyncio.get_running_loop()
    until, back_off_s = clock.time() + settings.broker_wait_s, FIRST_BACK_OFF_S
    while True:
        try:
            return await ask()
        except BrokerUnavailable as error:
            left_s = until - clock.time()
            if not error.may_pass or left_s <= 0:
                raise
            log.warning("waiting for the brokers", why=str(error), at_most_s=round(left_s))
        await asyncio.sleep(min(back_off_s, left_s))
        back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)


def unhurried(producer: AIOKafkaProducer) -> AIOKafkaProducer:
    """The producer, with a pause after each look at the metadata that it asks for.

    While it holds a batch for a partition without a leader (its topic was deleted, its brokers are away) aiokafka asks
    for the metadata again as soon as it has it: a thousand times a second, until the batch is given up.
    """
    client, loop = producer.client, asyncio.get_running_loop()
    look = client.force_metadata_update
    paused: asyncio.Future[bool] = loop.create_future()
    paused.set_result(True)

    def look_and_pause() -> asyncio.Future[bool]:
        nonlocal paused
        if paused.done():
            paused = loop.create_future()
            look().add_done_callback(partial(_pause, paused))
        return asyncio.shield(paused)

    client.force_metadata_update = look_and_pause
    return producer


def _pause(paused: asyncio.Future[bool], looked: asyncio.Future[bool]) -> None:
    found = not looked.cancelled() and looked.result()
    paused.get_loop().call_later(METADATA_POLL_S, paused.set_result, found)


def _sasl(settings: Settings) -> dict[str, Any]:
    password = settings.secret("sasl_password")
    if not settings.sasl_username or not password:
        raise SettingsError(
            f"{PREFIX}SASL_USERNAME and {PREFIX}SASL_PASSWORD (or {PREFIX}SASL_PASSWORD_FILE): "
            f"both are needed with {PREFIX}SECURITY_PROTOCOL={settings.security_protocol}"
        )
    return {
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": password,
    }


def _ssl_context(settings: Settings) -> ssl.SSLContext:
    ca_file, cert_file, key_file = settings.ssl_ca_file, settings.ssl_cert_file, settings.ssl_key_file
    if key_file is not None and cert_file is None:
        raise SettingsError(f"{PREFIX}SSL_CERT_FILE: is needed with {PREFIX}SSL_KEY_FILE")
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(f"{PREFIX}SSL_CA_FILE: can't use {ca_file}: {error.strerror or error}") from None
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except OSError as error:
            raise SettingsError(
                f"{PREFIX}SSL_CERT_FILE, {PREFIX}SSL_KEY_FILE: can't use {cert_file} with {key_file}: "
                f"{error.strerror or error}"
            ) from None
    return context
