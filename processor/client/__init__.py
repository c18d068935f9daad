"""What ingestion and query services import: `async with Client(bootstrap_servers="...") as client: ...`."""

from __future__ import annotations

from processor.client.client import Client, DocumentOutcome
from processor.client.outcomes import Outcome
from processor.client.requests import RequestOptions
from processor.domain import Chunk, Fault, ReceivedResult, ReplyTo, Usage
from processor.errors import (
    BrokerUnavailable,
    DeliveryFailed,
    ProcessorError,
    RegistryUnavailable,
    RequestRefused,
    SettingsError,
    TopicsError,
)

__all__ = [
    "BrokerUnavailable",
    "Chunk",
    "Client",
    "DeliveryFailed",
    "DocumentOutcome",
    "Fault",
    "Outcome",
    "ProcessorError",
    "ReceivedResult",
    "RegistryUnavailable",
    "ReplyTo",
    "RequestOptions",
    "RequestRefused",
    "SettingsError",
    "TopicsError",
    "Usage",
]
