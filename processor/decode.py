"""Step 1, second half: a decoded request is checked against the contract. Bad input becomes a value (`Fault`).

Each check names the field and the fix. Order matters only where one check makes the next one safe.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from processor.domain import (
    ACTION_ALIASES,
    EMBEDDING_ACTIONS,
    INTERACTIVE_ACTIONS,
    MAX_MANIFEST_VECTORS,
    OPERATION_OF,
    Action,
    EmbeddingFunction,
    ErrorCode,
    Fault,
    InputType,
    Lane,
    Request,
    Truncate,
)
from processor.ports import Catalogue
from processor.work import Plan, Policy

EMPTY_TEXT = Fault(ErrorCode.EMPTY_TEXT, "chunks.text", "chunks.text: empty or blank; leave the chunk out")


def too_long(tokens: int, function: EmbeddingFunction) -> Fault | None:
    """The fault of a text of so many tokens, or None when it fits or the policy is to cut it."""
    limit = function.model.max_input_tokens
    if tokens <= limit or function.truncate is not Truncate.ERROR:
        return None
    return Fault(
        ErrorCode.TEXT_TOO_LONG,
        "chunks.text",
        f"chunks.text: {tokens} tokens, the model takes {limit}; split it or set truncate to truncate_end",
    )


class Checker:
    """Says what requests ask for, or why they are refused as a whole. Remembers what equal wishes came to."""

    def __init__(self, policy: Policy, catalogue: Catalogue) -> None:
        self._policy = policy
        self._catalogue = catalogue
        self._plans: dict[object, Plan] = {}

    def check(self, request: Request, size_bytes: int) -> Plan | Fault:
        """`size_bytes` is that of the record's value, which no field of it can exceed."""
        policy = self._policy
        action = ACTION_ALIASES.get(request.action)
        if action is None:
            return _invalid("action", f"must be one of {', '.join(sorted(ACTION_ALIASES))}")
        if policy.lane is Lane.INTERACTIVE and action not in INTERACTIVE_ACTIONS:
            return Fault(ErrorCode.WRONG_LANE, "action", f"{action} is served on the request topic, send it there")
        return (
            (_check_ids(request) if size_bytes > MAX_ID_BYTES or request.agent_owner_id is not None else None)
            or _check_size(request, action, size_bytes, policy)
            or _check_lists(request, action, policy)
            or _check_numbers(request)
            or (_check_reply(request, policy) if request.reply_to is not None else None)
            or (_check_sink(request, policy) if action in _LISTS_IDS else None)
            or self._plan(request, action)
        )

    def _plan(self, request: Request, action: Action) -> Plan | Fault:
        wish = request.sender or (action, request.model, request.dimensions, request.input_type, request.truncate)
        plan = self._plans.get(wish)
        if plan is None:
            resolved = _resolve(request, action, policy=self._policy, catalogue=self._catalogue)
            if isinstance(resolved, Fault):
                return resolved
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[wish] = resolved
        return plan


MAX_PLANS = 4096
"""Plans remembered; a sender can ask for any number of dimensions that a model can be cut to."""


def _invalid(field: str, message: str) -> Fault:
    return Fault(ErrorCode.INVALID_REQUEST, field, f"{field}: {message}")


MAX_OWNER_BYTES = 256
"""A provider call's intent names the payer of each of up to 2,048 items, and must fit into a record."""
MAX_ID_BYTES = 1024
MAX_UTF8_BYTES = 4
"""Of one character."""
MAX_SPACES = 32
"""A delete writes a tombstone for each chunk id in each space."""
_IDS = (
    "collection",
    "document_id",
    "task_id",
    "agent_id",
    "conversation_id",
    "run_id",
    "source_service",
    "model",
    "input_type",
    "truncate",
)


_id_values = attrgetter(*_IDS, "agent_owner_id")


def _check_ids(request: Request) -> Fault | None:
    longest = max([len(value) for value in _id_values(request) if value is not None])
    if longest * MAX_UTF8_BYTES <= MAX_OWNER_BYTES and request.reply_to is None:
        return None
    if (field := next(iter(_too_long_ids(request)), None)) is not None:
        limit = MAX_OWNER_BYTES if field == "agent_owner_id" else MAX_ID_BYTES
        return _invalid(field, f"over {limit} bytes; it is copied into each result")
    return None


def _too_long_ids(request: Request) -> list[str]:
    """The names of the echoed fields that are too long to be echoed."""
    found = [name for name in _IDS if len((getattr(request, name) or "").encode()) > MAX_ID_BYTES]
    if len((request.agent_owner_id or "").encode()) > MAX_OWNER_BYTES:
        found.append("agent_owner_id")
    reply = request.reply_to
    if reply is not None and len((reply.topic + (reply.reply_type or "")).encode()) > MAX_ID_BYTES:
        found.append("reply_to")
    return found


def echoable(request: Request, policy: Policy) -> Request:
    """A refused request without what is too long to be echoed: it may be what it is refused for."""
    dropped: dict[str, Any] = {name: "" if name == "source_service" else None for name in _too_long_ids(request)}
    if len(request.action.encode()) > MAX_ID_BYTES:
        dropped["action"] = ""
    if metadata_bytes(request) > policy.max_metadata_bytes:
        dropped["metadata"] = {}
    return replace(request, **dropped) if dropped else request


def _check_size(request: Request, action: Action, size_bytes: int, policy: Policy) -> Fault | None:
    if size_bytes > policy.max_request_bytes:
        limit = f"over {policy.max_request_bytes} bytes"
        if action is Action.DOCUMENT_MANIFEST:
            return Fault(
                ErrorCode.DOCUMENT_TOO_LARGE,
                "chunk_ids",
                f"chunk_ids: {limit}; use fewer or shorter chunk ids",
            )
        return _invalid("chunks", f"the request is {limit}; split it into parts with first_chunk_index")
    if request.metadata and metadata_bytes(request) > policy.max_metadata_bytes:
        return _invalid("metadata", f"over {policy.max_metadata_bytes} bytes; it is copied into each result")
    return None


def metadata_bytes(request: Request) -> int:
    return sum(len(key.encode()) + len(value.encode()) for key, value in request.metadata.items())


def _check_lists(request: Request, action: Action, policy: Policy) -> Fault | None:
    listed, other = ("chunk_ids", "chunks") if action in _LISTS_IDS else ("chunks", "chunk_ids")
    if getattr(request, other):
        return _invalid(other, f"must be empty for {action}; it takes {listed}")
    ids = [chunk.chunk_id for chunk in request.chunks] or request.chunk_ids
    if not ids and action is not Action.DOCUMENT_MANIFEST:
        return _invalid(listed, f"must not be empty for {action}")
    if action is not Action.DOCUMENT_MANIFEST and len(ids) > policy.max_chunks:
        return _invalid(listed, f"at most {policy.max_chunks} of them; split the request")
    if action is Action.GENERATE_QUERY and len(ids) != 1:
        return _invalid("chunks", "generate_query takes exactly one text; use generate for more")
    if len(ids) > 1 and len(set(ids)) != len(ids):
        return _invalid(f"{listed}.chunk_id" if listed == "chunks" else listed, "a chunk id is there twice")
    return None


_LISTS_IDS = frozenset({Action.DELETE, Action.DOCUMENT_MANIFEST})


MAX_INDEX = 1_000_000_000
"""Of the first chunk of a part: an index must fit where cache entries and sinks keep it, 31 bits."""


def _check_numbers(request: Request) -> Fault | None:
    if not 0 <= request.first_chunk_index <= MAX_INDEX:
        return _invalid("first_chunk_index", f"must be 0 to {MAX_INDEX}")
    if request.chunk_count is not None and request.chunk_count < request.first_chunk_index + request.length:
        return _invalid("chunk_count", "must be at least first_chunk_index plus the number of chunks of this request")
    if request.task_total is not None and request.task_total < 0:
        return _invalid("task_total", "must not be negative")
    return None


def _check_reply(request: Request, policy: Policy) -> Fault | None:
    reply = request.reply_to
    if reply is None:
        return None
    partitions = policy.reply_partitions.get(reply.topic)
    if partitions is None:
        return Fault(
            ErrorCode.REPLY_NOT_ALLOWED,
            "reply_to.topic",
            "reply_to.topic: not in the worker's EMBEDDING_REPLY_TOPICS",
        )
    if not 0 <= reply.partition < partitions:
        return Fault(
            ErrorCode.REPLY_NOT_ALLOWED,
            "reply_to.partition",
            f"reply_to.partition: must be 0 to {partitions - 1}",
        )
    return None


def _check_sink(request: Request, policy: Policy) -> Fault | None:
    if not policy.sink_view:
        return Fault(ErrorCode.SINK_VIEW_OFF, "action", "the sink view is off (EMBEDDING_SINK_VIEW)")
    if request.document_id is None:
        return _invalid("document_id", "must name the document")
    if len(request.vector_spaces) > MAX_SPACES:
        return _invalid("vector_spaces", f"at most {MAX_SPACES} of them")
    if any(len(space.encode()) > MAX_ID_BYTES for space in request.vector_spaces):
        return _invalid("vector_spaces", f"over {MAX_ID_BYTES} bytes; it is hashed for each chunk id")
    if len(request.vector_spaces) * len(request.chunk_ids) > MAX_MANIFEST_VECTORS:
        return Fault(
            ErrorCode.DOCUMENT_TOO_LARGE,
            "vector_spaces",
            f"vector_spaces: times chunk_ids are over {MAX_MANIFEST_VECTORS}; name fewer of them",
        )
    if not request.vector_spaces and (request.chunk_ids or ACTION_ALIASES.get(request.action) is Action.DELETE):
        return _invalid("vector_spaces", "must list the vector spaces meant")
    return None


def _resolve(request: Request, action: Action, *, policy: Policy, catalogue: Catalogue) -> Plan | Fault:
    if action in _LISTS_IDS:
        return Plan(action, None, None)
    spec = catalogue.find(request.model or catalogue.default_model)
    if spec is None:
        return Fault(
            ErrorCode.UNKNOWN_MODEL,
            "model",
            "model: not in the catalogue; see /models or extend the catalogue",
        )
    if not catalogue.served(spec.name):
        return Fault(
            ErrorCode.MODEL_NOT_SERVED,
            "model",
            f"model: {spec.name} is not served by this worker's route",
            retryable=True,
        )
    dimensions = request.dimensions if request.dimensions is not None else catalogue.default_dimensions(spec)
    if not spec.allows(dimensions):
        return Fault(
            ErrorCode.BAD_DIMENSIONS,
            "dimensions",
            f"dimensions: {spec.name} has {spec.describe_dimensions()}",
        )
    try:
        input_type = InputType(
            request.input_type or (InputType.QUERY if action is Action.GENERATE_QUERY else InputType.DOCUMENT)
        )
    except ValueError:
        return _invalid("input_type", f"must be one of {', '.join(InputType)}")
    try:
        truncate = Truncate(request.truncate or policy.truncate)
    except ValueError:
        return _invalid("truncate", f"must be one of {', '.join(Truncate)}")
    function = EmbeddingFunction(spec, spec.space(dimensions), input_type, spec.prefixes.get(input_type, ""), truncate)
    return Plan(action, OPERATION_OF.get(action), function)


def counts_as_usage(request: Request) -> bool:
    """Whether an accepted request gets a usage event even when it fails as a whole (U4)."""
    return ACTION_ALIASES.get(request.action) in EMBEDDING_ACTIONS
