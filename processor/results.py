"""Step 7, first half: outcomes become messages (results, sink view, replies, usage, tombstones, dead letters)."""

from __future__ import annotations

from collections.abc import Sequence

from processor.domain import (
    ACTION_ALIASES,
    WHOLE_REQUEST,
    Action,
    CacheLevel,
    Fault,
    Result,
    Status,
    TokenSource,
    Tombstone,
)
from processor.identity import vector_id
from processor.ports import Destination
from processor.usage import cost_of
from processor.work import Fold, Instant, Job, Outcome, Policy, Work


def settle(fold: Fold) -> bool:
    """Give every work of the fold its outcome: the leader named by the entry is billed, everybody else is saved (U3).

    A follower of a hit reports the hit's level; `coalesced` follows a miss only. A fault of the text is shared.
    False when the fold was let go because nobody wanted it, while somebody joined since: embed it anew.
    """
    entry = fold.entry
    if entry is None:
        if fold.fault is None:
            return not fold.wanted
        failed = Outcome(fault=fold.fault)
        for work in fold.works:
            if work.outcome is None:
                work.outcome = failed
        return True
    follower = CacheLevel.COALESCED if fold.level is CacheLevel.MISS else fold.level
    for work in fold.works:
        if work.outcome is None:
            work.answer(entry, fold.level, follower)
    return True


def chunk_result(work: Work, provider: str, now: Instant) -> Result:
    """The one result of a chunk of an embedding request."""
    job, outcome, chunk = work.job, work.outcome, work.chunk
    assert outcome is not None
    assert job.plan is not None
    assert job.plan.function is not None
    function, entry, request = job.plan.function, outcome.entry, job.request
    result = Result.__new__(Result)  # twenty-three keywords would take three times as long
    result.request = request
    result.source = job.source
    result.request_id = job.request_id
    result.chunk_index = work.item.index
    result.first_chunk_index = request.first_chunk_index
    result.length = 1
    result.chunk_id = chunk.chunk_id
    result.chunk_metadata = chunk.metadata
    result.vector_id = vector_id(
        request.tenant_id, request.collection, request.document_id, chunk.chunk_id, function.space_name
    )
    result.provider = provider
    result.model = function.model.name
    result.vector_space = function.space_name
    result.cache = outcome.level
    result.time_taken_ms = job.taken_ms(now)
    result.completed_at_ms = now.ms
    result.error = outcome.fault
    if entry is not None:
        result.status = Status.OK
        result.vector = entry.vector
        result.dimensions = function.dimensions
        result.token_count = entry.tokens
        result.token_source = entry.token_source
        result.cut_tokens = entry.cut_tokens
    else:
        result.status = Status.ERROR
        result.vector = None
        result.dimensions = result.token_count = result.cut_tokens = 0
        result.token_source = TokenSource.ESTIMATE
    result.cost_nanos = cost_of(result.token_count, job)
    return result


def request_result(job: Job, fault: Fault | None, now: Instant) -> Result:
    """The record with index -1: an error of the whole request, or the `ok` of a stored manifest."""
    request = job.request
    return Result(
        request=request,
        source=job.source,
        request_id=job.request_id,
        chunk_index=WHOLE_REQUEST,
        first_chunk_index=request.first_chunk_index,
        length=request.length,
        chunk_id="",
        status=Status.OK if fault is None else Status.ERROR,
        time_taken_ms=job.taken_ms(now),
        completed_at_ms=now.ms,
        error=fault,
    )


def plain_result(job: Job, index: int, chunk_id: str, status: Status, now: Instant) -> Result:
    """A chunk's outcome without a vector: of a delete, or the frame of a validation."""
    return Result(
        request=job.request,
        source=job.source,
        request_id=job.request_id,
        chunk_index=job.request.first_chunk_index + index,
        first_chunk_index=job.request.first_chunk_index,
        length=1,
        chunk_id=chunk_id,
        status=status,
        time_taken_ms=job.taken_ms(now),
        completed_at_ms=now.ms,
    )


def messages(result: Result, policy: Policy) -> list[Destination]:
    """The result, its copy for the sink view when it belongs there, and that for whoever awaits a reply."""
    request = result.request
    sent = [Destination("results", result)]
    in_sink_view = (
        policy.sink_view
        and request.document_id is not None
        and result.vector is not None
        and ACTION_ALIASES.get(request.action) is not Action.GENERATE_QUERY
    )
    if in_sink_view:
        sent.append(Destination("sink", result))
    reply = request.reply_to
    if reply is not None and 0 <= reply.partition < policy.reply_partitions.get(reply.topic, 0):
        sent.append(Destination("replies", result, topic=reply.topic, partition=reply.partition))
    return sent


class Tombstones(Sequence[Destination]):
    """One tombstone for each vector space that a delete names. Made as they are sent: they can be 65,000."""

    def __init__(self, job: Job, chunk_id: str) -> None:
        self._job = job
        self._chunk_id = chunk_id

    def __len__(self) -> int:
        return len(self._job.request.vector_spaces)

    def __getitem__(self, index: int) -> Destination:  # type: ignore[override]  # nobody wants a slice
        request = self._job.request
        space = request.vector_spaces[index]
        name = vector_id(request.tenant_id, request.collection, request.document_id, self._chunk_id, space)
        return Destination("sink", Tombstone(name, self._job.source.version))
