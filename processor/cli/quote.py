"""`quote`: files or a topic in, what embedding them would take and cost out. Nothing is sent, embedded or written."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from processor.adapters import topics
from processor.adapters.avro import Codec, encode_request
from processor.adapters.catalogue import ModelCatalogue, load_catalogue
from processor.adapters.clock import SystemClock
from processor.adapters.deployments import read_deployments
from processor.adapters.reader import KafkaReader
from processor.adapters.redis_cache import RedisCache
from processor.adapters.tokens import LocalTokenCounter
from processor.app import open_gate, worker_policy
from processor.cli.console import err, money
from processor.cli.produce import read_text, text_files
from processor.cli.splitter import split_text
from processor.client.requests import check, split
from processor.decode import Checker
from processor.domain import Action, Chunk, ErrorCode, Fault, Lane, Request, Source, TokenSource
from processor.errors import BrokerUnavailable, RequestRefused
from processor.limits import Gate
from processor.ports import Undecodable
from processor.quote import Pace, Quote, Quoter
from processor.settings import PREFIX, Settings
from processor.work import Policy

TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
CALL_S = 1.0
"""Assumed of a provider over the network, when neither its limits nor this are given."""
ON_THIS_MACHINE = frozenset({"local", "sentence-transformers"})
REDIS_TIMEOUT_MS = 5_000
"""Nobody waits for a vector here: a look-up may take longer than a worker's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is quoted, beside the source. `tenant_id` of a topic: only this tenant's; None with files: in no cache.

    `model` and `dimensions` replace what the requests of a topic name. `begin`: where a topic is read from.
    """

    tenant_id: str | None = None
    model: str | None = None
    dimensions: int | None = None
    max_characters: int = 800
    overlap_characters: int = 0
    begin: Literal["committed", "beginning"] = "committed"
    call_s: float | None = None


class Quoted(NamedTuple):
    """A record as a worker would meet it."""

    source: Source
    decoded: Request | Undecodable
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """The quote, the least time by these limits, and what was assumed, in sentences."""

    quote: Quote
    minutes: float | None
    bound_by: str | None
    assumed: Sequence[str] = field(default=())

    def fields(self) -> dict[str, Any]:
        """For JSON; `texts_to_embed`, `tokens`, `calls` and `cost_nanos` are the sums of `spaces`."""
        quote, total = self.quote, asdict(self.quote.total)
        return (
            asdict(quote)
            | {"texts_to_embed": total.pop("texts"), **total}
            | {"minutes": self.minutes, "bound_by": self.bound_by, "assumed": list(self.assumed)}
        )


async def quote_sources(settings: Settings, sources: Sequence[str], wishes: Wishes) -> Report:
    """Files and directories, or one topic. RequestRefused, TopicsError or BrokerUnavailable when they can't be read."""
    paths = [Path(source) for source in sources]
    missing = [str(path) for path in paths if not path.exists()]
    if not missing:
        return await _quote(settings, _Files(settings, paths, wishes), wishes)
    if len(sources) > 1 or not TOPIC_NAME.fullmatch(missing[0]):
        raise RequestRefused(f"{missing[0]}: no such file or directory; name files and directories, or one topic")
    topic = await _Topic.open(settings, missing[0], wishes)
    return await _quote(topic.settings, topic, wishes)


class _Files:
    """Files as `produce` would send them: a document each."""

    reply_partitions: dict[str, int] = {}  # noqa: RUF012  (nothing here asks for a reply)

    def __init__(self, settings: Settings, paths: Sequence[Path], wishes: Wishes) -> None:
        self.in_cache = wishes.tenant_id is not None
        self._settings = settings
        self._paths = paths
        self._wishes = wishes

    async def records(self) -> AsyncGenerator[Quoted, None]:
        wishes, now_ms = self._wishes, time.time_ns() // 1_000_000
        for path in text_files(self._paths):
            pieces = split_text(
                read_text(path),
                max_characters=wishes.max_characters,
                overlap_characters=wishes.overlap_characters,
            )
            if pieces:
                request = _request(wishes, path.as_posix(), pieces)
                check(request)
                for part in split(request, max_bytes=self._settings.max_request_bytes, encode=encode_request):
                    yield Quoted(Source("", 0, 0, now_ms), part, len(encode_request(part)))


class _Topic:
    """What a topic of requests holds, or what the workers' group has not committed of it."""

    in_cache = True

    def __init__(self, settings: Settings, name: str, reply_partitions: dict[str, int], wishes: Wishes) -> None:
        self.settings = settings
        self.reply_partitions = reply_partitions
        self._name = name
        self._wishes = wishes

    @classmethod
    async def open(cls, settings: Settings, name: str, wishes: Wishes) -> _Topic:
        """`name` with the prefix of the settings or without."""
        full, replies = settings.topic(name), [settings.topic(reply) for reply in settings.reply_topics]
        try:
            counts = await topics.partition_counts(settings, {full, name, *replies})
        except BrokerUnavailable as error:
            raise BrokerUnavailable(
                f"{name}: no such file or directory, and topics can't be looked up: {error}"
            ) from None
        if full not in counts and name not in counts:
            ours = (settings.topic(topics.topics()[topic].name) for topic in sorted(topics.REQUEST_TOPICS))
            raise RequestRefused(f"{name}: no such file, directory or topic; topics of requests are {', '.join(ours)}")
        full = full if full in counts else name
        lanes = {
            settings.topic(topics.topics()[topic].name): lane
            for topic, lane in (("requests", Lane.BULK), ("queries", Lane.INTERACTIVE))
        }
        settings = settings.model_copy(update={"lane": lanes.get(full, settings.lane)})
        return cls(settings, full, {reply: counts[reply] for reply in replies if reply in counts}, wishes)

    async def records(self) -> AsyncGenerator[Quoted, None]:
        settings, wishes = self.settings, self._wishes
        codec = Codec.from_settings(settings)
        reader = KafkaReader(settings, group_id=f"{settings.group_id}-{settings.lane}")
        begin = await reader.committed(self._name) if wishes.begin == "committed" else {}
        try:
            async with aclosing(reader.read(self._name, begin)) as fetched:
                async for records in fetched:
                    for record in records:
                        decoded = codec.decode_now(record) or await codec.decode(record)
                        if isinstance(decoded, Request):
                            if wishes.tenant_id not in (None, decoded.tenant_id):
                                continue
                            decoded = _instead(decoded, wishes)
                        yield Quoted(record.source, decoded, len(record.value or b""))
        finally:
            await codec.close()


def _request(wishes: Wishes, name: str, pieces: Sequence[str]) -> Request:
    return Request(
        tenant_id=wishes.tenant_id or "nobody",
        correlation_id=name,
        action=Action.GENERATE,
        model=wishes.model,
        dimensions=wishes.dimensions,
        document_id=name,
        chunks=tuple(Chunk(str(place), piece) for place, piece in enumerate(pieces)),
    )


def _instead(request: Request, wishes: Wishes) -> Request:
    if wishes.model is None and wishes.dimensions is None:
        return request
    return replace(
        request,
        model=wishes.model or request.model,
        dimensions=wishes.dimensions if wishes.dimensions is not None or wishes.model else request.dimensions,
    )


async def _quote(settings: Settings, source: _Files | _Topic, wishes: Wishes) -> Report:
    catalogue, policy = load_catalogue(settings), worker_policy(settings, source.reply_partitions)
    _refuse_what_nobody_serves(catalogue, policy, wishes)
    patient = settings.model_copy(update={"redis_timeout_ms": max(settings.redis_timeout_ms, REDIS_TIMEOUT_MS)})
    gates = _gates(settings, catalogue)
    redis = RedisCache.from_settings(patient, read_only=True) if settings.redis_url and source.in_cache else None
    quoter = Quoter(
        policy,
        catalogue=catalogue,
        cache=redis,
        counter=LocalTokenCounter(),
        clock=SystemClock(),
        max_call_tokens=min((most for gate in gates if (most := gate.max_call_tokens) is not None), default=None),
    )
    columns = TextColumn("{task.description}"), TextColumn("{task.completed:,} texts")
    try:
        with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
            bar = progress.add_task("counted", total=None)
            async with aclosing(source.records()) as records:
                async for record in records:
                    await quoter.take(*record)
                    progress.update(bar, completed=quoter.quote.texts)
        quote = await quoter.finish()
    finally:
        if redis is not None:
            await redis.close()
    pace = _pace(settings, gates, wishes)
    found = pace.minutes(quote.total)
    minutes, bound_by = found or (None, None)
    assumed = [*_of_the_cache(settings, source, quote), *_of_the_pace(settings, pace), *_of_the_count(quote)]
    return Report(quote, minutes, bound_by, assumed)


def _refuse_what_nobody_serves(catalogue: ModelCatalogue, policy: Policy, wishes: Wishes) -> None:
    """Said once, instead of for each request: RequestRefused for a model or dimensions that no request can have."""
    asked = Checker(policy, catalogue).check(_request(wishes, "quote", ["text"]), 0)
    if isinstance(asked, Fault):
        served = ", ".join(model["model"] for model in catalogue.describe() if model["served"])
        of_model = asked.code in {ErrorCode.UNKNOWN_MODEL, ErrorCode.MODEL_NOT_SERVED}
        raise RequestRefused(f"{asked.message}; served are {served}" if of_model else asked.message)


def _gates(settings: Settings, catalogue: ModelCatalogue) -> list[Gate]:
    """A gate for each deployment, as one worker has it; no key is asked for."""
    limits = [(settings.requests_per_minute, settings.tokens_per_minute)]
    accounts: list[object] = [None]
    if settings.deployments_file is not None:
        served = [row["model"] for row in catalogue.describe() if row["served"]]
        entries = read_deployments(settings.deployments_file, provider=settings.provider, served=served)
        limits = [
            (entry.requests_per_minute or limits[0][0], entry.tokens_per_minute or limits[0][1]) for entry in entries
        ]
        accounts = [(entry.provider, entry.base_url, entry.api_key_file, entry.api_key_env) for entry in entries]
    return [
        open_gate(settings, *limit, sharers=settings.limit_sharers * accounts.count(account), clock=SystemClock())
        for limit, account in zip(limits, accounts, strict=True)
    ]


def _pace(settings: Settings, gates: Sequence[Gate], wishes: Wishes) -> Pace:
    """All workers of the lane at what their gates let pass; without limits, so many calls at a time."""
    requests = [gate.requests.per_s * 60 * settings.limit_sharers for gate in gates]
    tokens = [gate.tokens.per_s * 60 * settings.limit_sharers for gate in gates]
    pace = Pace(
        requests_per_minute=sum(requests) if sum(requests) < inf else None,
        tokens_per_minute=sum(tokens) if sum(tokens) < inf else None,
        concurrent_calls=settings.max_concurrent_calls * settings.limit_sharers * len(gates),
        call_s=wishes.call_s,
    )
    unlimited = pace.requests_per_minute is None and pace.tokens_per_minute is None
    if unlimited and pace.call_s is None and settings.provider not in ON_THIS_MACHINE:
        return replace(pace, call_s=CALL_S)
    return pace


def _of_the_pace(settings: Settings, pace: Pace) -> Iterator[str]:
    limits = [
        f"{rate:,.0f} {name} a minute"
        for rate, name in ((pace.requests_per_minute, "requests"), (pace.tokens_per_minute, "tokens"))
        if rate is not None
    ]
    if limits:
        yield f"{' and '.join(limits)}: what workers of the {settings.lane} lane use of the limits that are set"
    if pace.call_s is not None:
        yield f"{pace.concurrent_calls} calls at a time of {pace.call_s:g} s each (--call-seconds)"
    elif not limits:
        yield "how long a call of a model on this machine takes is not known: measure it, give it as --call-seconds"


def _of_the_cache(settings: Settings, source: _Files | _Topic, quote: Quote) -> Iterator[str]:
    if not source.in_cache:
        yield "no text is in a cache: that depends on the --tenant"
    elif not settings.redis_url:
        yield f"no text is in a cache: {PREFIX}REDIS_URL is not set"
    elif quote.cache_unavailable is not None:
        yield f"no text is in the cache from where it did not answer ({quote.cache_unavailable})"
    else:
        yield "what is in Redis now is still there when it is asked for"


def _of_the_count(quote: Quote) -> Iterator[str]:
    if quote.token_source is not TokenSource.TOKENIZER:
        yield "tokens are estimated by characters: the model's tokenizer is not there (extra `tokens`, or `local`)"


def print_report(report: Report, out: Console) -> None:
    """A few lines, a row for each vector space, and what was assumed."""
    quote, total = report.quote, report.quote.total
    copies = f", {quote.copies:,} of them sent again, counted once" if quote.copies else ""
    for line in (
        f"{quote.requests:,} requests with {quote.texts:,} texts of {quote.characters:,} characters{copies}",
        f"{total.texts:,} to embed, {quote.repeated_texts:,} repeated, {quote.cached_texts:,} in the cache"
        + (f", {quote.truncated_texts:,} cut to the model's limit" if quote.truncated_texts else ""),
        *(f"{texts:,} texts would fail: {code}" for code, texts in sorted(quote.failed_texts.items())),
        *(f"{requests:,} requests would be refused: {code}" for code, requests in sorted(quote.refused.items())),
        *(f"{records:,} records can't be read: {reason}" for reason, records in sorted(quote.unreadable.items())),
    ):
        out.print(line, markup=False, highlight=False)
    view = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    view.add_column("vector space", overflow="fold")
    for name in ("texts", "tokens", "calls", "cost"):
        view.add_column(name, justify="right")
    rows = [(escape(space), share) for space, share in sorted(quote.spaces.items())]
    for name, share in rows if len(rows) == 1 else [*rows, ("all", total)]:
        unpriced = "" if not share.unpriced_tokens else f" + {share.unpriced_tokens:,} unpriced"
        view.add_row(
            name, f"{share.texts:,}", f"{share.tokens:,}", f"{share.calls:,}", money(share.cost_nanos) + unpriced
        )
    out.print(view)
    if report.minutes is not None:
        time_taken = f"{report.minutes:,.1f} minutes" if report.minutes >= 1 else f"{60 * report.minutes:.1f} seconds"
        out.print(f"at least {time_taken}, bound by {report.bound_by}", highlight=False)
    for sentence in report.assumed:
        out.print(f"assumed: {sentence}", markup=False, highlight=False)
