"""The codec without a registry, for tests that read and write records without an event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from processor.adapters.avro import Codec
from processor.domain import ErrorCode, Fault, ReceivedResult, Request, Status
from processor.ports import Destination
from tests.support.builders import a_record, a_result

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


def decoded(value: bytes | None) -> Any:
    """The request that a record of this value holds, or why there is none."""
    return done(CODEC.decode(a_record(value)))


def value_of(name: str, message: Any) -> bytes:
    """The value of a message to that destination."""
    value = CODEC.encode(Destination(name, message)).value
    assert value is not None
    return value


def can_be_answered(request: Request) -> bool:
    """Whether an error result of the request survives the wire; one that did not would stop the stream."""
    fault = Fault(ErrorCode.INVALID_REQUEST, "", "")
    result = a_result(request, chunk_index=-1, length=0, chunk_id="", status=Status.ERROR, error=fault)
    received = read(ReceivedResult, value_of("results", result))
    return isinstance(received, ReceivedResult) and received.task_total == request.task_total
