"""`cache warm`: vectors that exist already, in a results topic or in files, are put where workers look them up.

Who pays is decided here. A warmed entry names its real leader only when that request's charge is in the log, and near
enough that another copy of it can't become a second one; else nobody's: then every item that finds it is saved.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import UUID

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.catalogue import load_catalogue
from processor.adapters.openai_answers import MAX_BILL_TOKENS
from processor.adapters.reader import KafkaReader
from processor.adapters.tokens import LocalTokenCounter
from processor.aggregate import DAY_MS
from processor.app import worker_policy
from processor.cache import CacheKeys
from processor.cli.cache import open_cache
from processor.decode import Checker, too_long
from processor.domain import (
    Action,
    CacheLevel,
    Chunk,
    EmbeddingFunction,
    Entry,
    Fault,
    Item,
    Lane,
    ReceivedResult,
    Record,
    Request,
    Status,
    TokenSource,
    Usage,
    Vector,
)
from processor.errors import RequestRefused
from processor.identity import request_id
from processor.ports import TokenCounter, Undecodable, VectorCache
from processor.settings import CACHE_LIVES, Settings

T = TypeVar("T")

NOBODY = Item("warmed", 0)
"""The leader of an entry that is saved to whoever finds it: request ids are UUIDs, so no item equals this one."""

ENTRIES_A_TRIP = 256
LENGTH_TOLERANCE = 0.01
"""How far from 1 the length of a normalised vector may be that was written as text, or as halves."""


@dataclass(slots=True)
class Warmed:
    """`stored` are new in Redis, `known` were there. `skipped`: results that no entry was made of, by reason."""

    stored: int = 0
    known: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        """For people."""
        skipped = ", ".join(f"{number:,} {REASONS[reason]}" for reason, number in sorted(self.skipped.items()))
        return f"{self.stored:,} entries stored, {self.known:,} were there" + (
            f"; skipped: {skipped}" if skipped else ""
        )


REASONS = {
    "no_request": "without their request, which is no longer retained or would be refused today",
    "other_function": "that the request would not get today: of another vector space",
    "own": "that were to stay out of the cache (use_cache=false)",
    "not_charged": "of requests that are not charged yet",
    "cut": "of texts that were cut by a policy that is not known any more",
}


_SOURCES = frozenset(map(str, TokenSource))


class Warmer:
    """Puts entries where there are none, many at a time. The first one offered for a key stands."""

    def __init__(self, cache: VectorCache) -> None:
        self.warmed = Warmed()
        self._cache = cache
        self._waiting: dict[int, dict[bytes, Entry]] = {}
        self._former: dict[bytes, bytes] = {}

    async def offer(self, key: bytes, former: bytes | None, entry: Entry) -> None:
        """`former`: where the text's entry would lie under the secret before."""
        waiting = self._waiting.setdefault(entry.vector.size, {})
        waiting.setdefault(key, entry)
        if former is not None:
            self._former[key] = former
        if len(waiting) >= ENTRIES_A_TRIP:
            await self.flush()

    async def flush(self) -> None:
        """Store what waits."""
        for dimensions, entries in self._waiting.items():
            known = await self._cache.get_many(list(entries), dimensions, self._former)
            await self._cache.put_many({key: entry for key, entry in entries.items() if key not in known})
            self.warmed.known += len(known)
            self.warmed.stored += len(entries) - len(known)
        self._waiting.clear()
        self._former.clear()


# --- from a results topic --------------------------------------------------------------------------------


@dataclass(slots=True)
class Asked:
    """What is kept of a request: where the entries of its texts lie, by position, and what its charge says."""

    function: EmbeddingFunction
    first_chunk_index: int
    own: bool
    says_how_to_cut: bool
    keys: Sequence[bytes]
    former: Sequence[bytes | None]
    attempt_id: str | None = None
    charged_at_ms: int | None = None
    """When the last copy of its charge was appended."""


class Offered(NamedTuple):
    """An entry and where it belongs. `paid`: the result is its leader's own, as far as a result can tell."""

    key: bytes
    former: bytes | None
    entry: Entry
    paid: bool


class Join:
    """Makes entries of results: a result has the vector, its request the text, its charge the attempt.

    Take all requests first, then their charges, then results. `safe_after_ms`: a copy of a charge that was last
    appended after this is a duplicate for as long as a new entry lives. About 200 bytes a text are remembered.
    """

    def __init__(self, keys: CacheKeys, *, tenant_id: str | None, safe_after_ms: int) -> None:
        self._keys = keys
        self._tenant_id = tenant_id
        self._safe_after_ms = safe_after_ms
        self._asked: dict[bytes, Asked] = {}

    def take_request(self, request: Request, size_bytes: int, checker: Checker) -> None:
        """One that embeds nothing, or would be refused today, is left out."""
        if self._tenant_id not in (None, request.tenant_id):
            return
        # Where the answer went is of no matter, and that topic need not be there any more.
        plan = checker.check(replace(request, reply_to=None), size_bytes)
        if isinstance(plan, Fault) or plan.operation is None or plan.function is None:
            return
        function, keys, texts = plan.function, self._keys, [chunk.text for chunk in request.chunks]
        self._asked[_name(request_id(request))] = Asked(
            function,
            request.first_chunk_index,
            not request.use_cache,
            request.truncate is not None,
            [keys.present(request.tenant_id, function, text, None) for text in texts],
            [keys.former(request.tenant_id, function, text, None) if keys.rotating else None for text in texts],
        )

    def take_charge(self, usage: Usage, append_ms: int) -> None:
        """Copies in offset order: the first one is the charge, each later one renews its time."""
        asked = self._asked.get(_name(usage.request_id))
        if asked is None or usage.event_key is not None:  # a refusal, or another service's
            return
        if asked.charged_at_ms is None and len(usage.parts) == 1:
            asked.attempt_id = usage.parts[0].attempt_id
        asked.charged_at_ms = append_ms

    def entry_of(self, result: ReceivedResult) -> Offered | str | None:
        """The entry, or one of REASONS; None for what has no vector, or is another tenant's."""
        if result.status != Status.OK or result.vector is None or self._tenant_id not in (None, result.tenant_id):
            return None
        asked = self._asked.get(_name(result.request_id))
        position = -1 if asked is None else result.chunk_index - asked.first_chunk_index
        if asked is None or not 0 <= position < len(asked.keys):
            return "no_request"
        function = asked.function
        if result.vector_space != function.space_name or not _is_finite(result.vector, function):
            return "other_function"
        if asked.own:
            return "own"
        if asked.charged_at_ms is None:
            return "not_charged"
        if result.cut_tokens and not asked.says_how_to_cut:
            return "cut"
        paid = result.cache == CacheLevel.MISS
        leader, attempt_id = NOBODY, ""
        if paid and asked.attempt_id is not None and asked.charged_at_ms > self._safe_after_ms:
            leader, attempt_id = Item(result.request_id, result.chunk_index), asked.attempt_id
        entry = Entry(
            vector=result.vector,
            tokens=result.token_count,
            leader=leader,
            attempt_id=attempt_id,
            token_source=TokenSource(result.token_source) if result.token_source in _SOURCES else TokenSource.ESTIMATE,
            cut_tokens=result.cut_tokens,
        )
        return Offered(asked.keys[position], asked.former[position], entry, paid)


def _name(request: str) -> bytes:
    """Of a request id, in a quarter of the memory; others who share the usage topic have ids of their own kind."""
    try:
        return UUID(request).bytes
    except ValueError:
        return b"other:" + request.encode()


def safe_after_ms(settings: Settings, now_ms: int) -> int:
    """A copy of a charge is a duplicate for two horizons. Whoever finds an entry of now does so within its lives, and
    is charged, if not late, within a horizon of that."""
    return now_ms + CACHE_LIVES * settings.cache_ttl_s * 1000 - settings.horizon_days * DAY_MS


async def warm_from_results(settings: Settings, tenant_id: str | None) -> Warmed:
    """Join the results with the requests and charges that are retained; done again it ends the same.

    Raises BrokerUnavailable, TopicsError or CacheUnavailable.
    """
    keys = CacheKeys.of(worker_policy(settings, {}))
    join = Join(keys, tenant_id=tenant_id, safe_after_ms=safe_after_ms(settings, time.time_ns() // 1_000_000))
    catalogue = load_catalogue(settings)
    for name, lane in (("requests", Lane.BULK), ("queries", Lane.INTERACTIVE)):
        checker = Checker(worker_policy(settings.model_copy(update={"lane": lane}), {}), catalogue)
        async for record, request in _read(settings, name, Request):
            join.take_request(request, len(record.value or b""), checker)
    async for record, usage in _read(settings, "usage", Usage):
        join.take_charge(usage, record.source.append_ms)
    async with open_cache(settings) as cache:
        warmer = Warmer(cache)
        brought, others = set[bytes](), set[bytes]()
        async for _, result in _read(settings, "results", ReceivedResult):
            offered = join.entry_of(result)
            if isinstance(offered, str):
                warmer.warmed.skipped[offered] += 1
            elif offered is not None and offered.paid and offered.key not in brought:
                brought.add(offered.key)
                await warmer.offer(offered.key, offered.former, offered.entry)
            elif offered is not None and not offered.paid:
                others.add(offered.key)
        # What was found in a cache is the same vector as its payer's, and only wanted when that one's has expired.
        if others := others - brought:
            async for _, result in _read(settings, "results", ReceivedResult):
                offered = join.entry_of(result)
                if isinstance(offered, Offered) and offered.key in others:
                    others.discard(offered.key)
                    await warmer.offer(offered.key, offered.former, offered.entry)
        await warmer.flush()
    return warmer.warmed


async def _read(settings: Settings, name: str, kind: type[T]) -> AsyncIterator[tuple[Record, T]]:
    """What can be decoded of a topic as of now, in offset order of each partition. TopicsError when it is missing."""
    topic = settings.topic(topics.topics()[name].name)
    codec = Codec.from_settings(settings)
    try:
        reader = KafkaReader(settings, group_id=settings.group_id)
        async with aclosing(reader.read(topic)) as fetched:
            async for records in fetched:
                for record in records:
                    message = await codec.read(kind, record.value)
                    if not isinstance(message, Undecodable):
                        yield record, message
    finally:
        await codec.close()


# --- from files ------------------------------------------------------------------------------------------


class Line(BaseModel):
    """One vector of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(min_length=1)
    model: str
    dimensions: int | None = None
    input_type: str | None = None
    truncate: str | None = None
    text: str
    vector: list[float]
    tokens: int | None = Field(None, ge=1, le=MAX_BILL_TOKENS)


async def warm_from_files(settings: Settings, paths: Sequence[Path], tenant_id: str | None) -> Warmed:
    """Store what the lines say; RequestRefused names the first that can't be used, those before it are stored."""
    policy = worker_policy(settings, {})
    keys, checker = CacheKeys.of(policy), Checker(policy, load_catalogue(settings))
    async with open_cache(settings) as cache:
        warmer = Warmer(cache)
        try:
            for line, function, entry in entries_of_files(paths, checker, LocalTokenCounter()):
                if tenant_id in (None, line.tenant):
                    present = keys.present(line.tenant, function, line.text, None)
                    former = keys.former(line.tenant, function, line.text, None) if keys.rotating else None
                    await warmer.offer(present, former, entry)
        finally:
            await warmer.flush()
    return warmer.warmed


def entries_of_files(
    paths: Sequence[Path], checker: Checker, counter: TokenCounter
) -> Iterator[tuple[Line, EmbeddingFunction, Entry]]:
    """Each line as an entry that nobody pays for. RequestRefused for one that no request could get its vector from."""
    for path in paths:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = Line.model_validate_json(raw)
                    yield line, *_entry(line, checker, counter)
                except ValidationError as error:
                    fault = error.errors(include_input=False, include_context=False, include_url=False)[0]
                    field = ".".join(map(str, fault["loc"])) or "line"
                    raise RequestRefused(f"{path}:{number}: {field}: {fault['msg']}") from None
                except RequestRefused as error:
                    raise RequestRefused(f"{path}:{number}: {error}") from None


def _entry(line: Line, checker: Checker, counter: TokenCounter) -> tuple[EmbeddingFunction, Entry]:
    request = Request(
        tenant_id=line.tenant,
        correlation_id="warm",
        action=Action.GENERATE,
        model=line.model,
        dimensions=line.dimensions,
        input_type=line.input_type,
        truncate=line.truncate,
        chunks=(Chunk("0", line.text),),
    )
    plan = checker.check(request, 0)
    if isinstance(plan, Fault):
        raise RequestRefused(plan.message)
    function = plan.function
    assert function is not None
    if not line.text or line.text.isspace():
        raise RequestRefused("text: is blank; leave the line out")
    counted = counter.count([function.prefix + line.text], function.model)
    if fault := too_long(counted.counts[0], function):
        raise RequestRefused(fault.message)
    with np.errstate(over="ignore"):  # what float32 does not hold is inf there, and refused
        vector = np.array(line.vector, np.float32)
    if not _is_sound(vector, function):
        normalised = ", of length 1" if function.space.normalised else ""
        raise RequestRefused(f"vector: must be {function.dimensions} finite numbers, not all 0{normalised}")
    tokens, source = (counted.counts[0], counted.source) if line.tokens is None else (line.tokens, TokenSource.PROVIDER)
    return function, Entry(vector, tokens, NOBODY, "", source)


def _is_finite(vector: Vector, function: EmbeddingFunction) -> bool:
    """Whether it has the function's dimensions, all numbers, not all 0: others may write to a topic too."""
    return vector.shape == (function.dimensions,) and bool(np.isfinite(vector).all()) and bool(vector.any())


def _is_sound(vector: Vector, function: EmbeddingFunction) -> bool:
    """Whether it can be a vector of the function."""
    if not _is_finite(vector, function):
        return False
    return not function.space.normalised or abs(float(np.linalg.norm(vector)) - 1) <= LENGTH_TOLERANCE
