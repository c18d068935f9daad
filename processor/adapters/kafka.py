"""How every client of ours connects to Kafka, by the settings, and what we say when that fails."""

from __future__ import annotations

import ssl
from typing import Any

from aiokafka.errors import UnknownError

from processor.errors import BrokerUnavailable, SettingsError
from processor.settings import PREFIX, Settings


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
    return BrokerUnavailable(said + f"check {PREFIX}BOOTSTRAP_SERVERS, the security settings and our rights")


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
