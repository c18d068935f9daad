"""The codec without a registry, for tests that read and write records without an event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from processor.adapters.avro import Codec
from processor.ports import Destination

CODEC = Codec()


def done(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("it waits for something")


def read(kind: type, value: bytes | None) -> Any:
    """The value as that domain class, or why it can't be read."""
    return done(CODEC.read(kind, value))


def value_of(name: str, message: Any) -> bytes:
    """The value of a message to that destination."""
    value = CODEC.encode(Destination(name, message)).value
    assert value is not None
    return value
