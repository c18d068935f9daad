"""The demo: the whole path as separate processes on this machine, measured, questioned, and checked against its bill.

Everything lives in a temporary directory and in child processes that die with this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import processor
from processor.accounts import UsageSums
from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.embedded import EmbeddedBroker, EmbeddedCache, dying_with_parent, end, free_port
from processor.adapters.reader import KafkaReader
from processor.cli.console import FAILED, INTERRUPTED, err, out, print_json, run
from processor.cli.corpus import Corpus, of_files, standard_library
from processor.cli.settings_table import environment_names
from processor.cli.totals import add, read_totals, table
from processor.client import Client, Outcome, ReceivedResult
from processor.domain import CallKind, ProviderCall, Vector
from processor.errors import EmbeddedUnavailable
from processor.ports import Undecodable
from processor.settings import PREFIX, Settings, load

TENANT = "demo"
COLLECTION = "demo"
PARTITIONS = 4
LEAST_CHUNKS = 1_000
START_TIMEOUT_S = 60
WORK_TIMEOUT_S = 170
BOOKS_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a run, as the last line of --json has them."""

    chunks: int
    results: int
    errors: int
    lost: int
    second_pass_hits: int
    usage_tokens: int
    ledger_tokens: int
    residual_tokens: int
    questions_hit: str
    seconds: float

    def faults(self, *, least_chunks: int) -> list[str]:
        """What is not as it must be, in words."""
        hit, asked = self.questions_hit.split("/")
        bars = {
            f"at least {least_chunks} chunks": self.chunks >= least_chunks,
            "a result for each chunk": self.results == self.chunks,
            "no error": self.errors == 0,
            "nothing lost": self.lost == 0,
            "the second pass answered from the cache": self.second_pass_hits == self.chunks,
            "billed tokens equal to the ledger's": self.usage_tokens == self.ledger_tokens > 0,
            "no residual": self.residual_tokens == 0,
            "every question answered": hit == asked,
        }
        return [bar for bar, met in bars.items() if not met]


class Child:
    """One of our processes, its log in a file; its end is quoted when it dies."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self._log = folder / f"{name}.log"
        package = str(Path(processor.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                dying_with_parent([sys.executable, "-m", "processor", *arguments]),
                cwd=folder,
                env=os.environ | {"EMBEDDING_HTTP_PORT": str(self.port), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises EmbeddedUnavailable when it has ended."""
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise EmbeddedUnavailable(f"{self.name} ended with {self._process.returncode}:\n{tail}")

    def get(self, path: str) -> dict[str, Any]:
        """A JSON document of its internal port; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                document: dict[str, Any] = json.load(answer)
                return document
        except (urllib.error.URLError, OSError, ValueError):
            return {}

    def ready(self) -> bool:
        self.check()
        return bool(self.get("/health/ready").get("ready"))

    def stop(self) -> None:
        end(self._process, grace_s=5.0)


class Stack:
    """Broker, cache, topics, two workers and the aggregator; gone without a trace when the context is left."""

    def __init__(self, context: ExitStack) -> None:
        self.folder = Path(context.enter_context(tempfile.TemporaryDirectory(prefix="embedding-demo-")))
        self.broker = context.enter_context(EmbeddedBroker())
        self.cache = context.enter_context(EmbeddedCache())
        context.enter_context(_environment(self._variables()))
        self.settings: Settings = load(_env_file=None)
        self.children: list[Child] = []
        self._context = context

    def start(self) -> None:
        """Start our processes; `ready` says when they answer."""
        for name, *arguments in (("worker",), ("interactive", "--lane", "interactive"), ("aggregator",)):
            command = ["aggregator"] if name == "aggregator" else ["worker", *arguments]
            child = Child(name, command, self.folder)
            self._context.callback(child.stop)
            self.children.append(child)

    @property
    def aggregator(self) -> Child:
        return self.children[-1]

    def addresses(self) -> Iterator[tuple[str, str]]:
        yield "Kafka", self.broker.bootstrap_servers
        yield "Redis", self.cache.url
        for child in self.children:
            yield child.name, f"http://127.0.0.1:{child.port}"
        yield "files", str(self.folder)

    def variables_of_users(self) -> dict[str, str]:
        """What a client or a command of ours needs to be told in order to use this stack."""
        return {
            "EMBEDDING_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "EMBEDDING_REDIS_URL": self.cache.url,
            "EMBEDDING_CACHE_SECRET": "demo",
            "EMBEDDING_PROVIDER": "local",
            # The embedded broker knows neither.
            "EMBEDDING_PRODUCER_IDEMPOTENT": "false",
            "EMBEDDING_REQUIRE_LOG_APPEND_TIME": "false",
        }

    def _variables(self) -> dict[str, str]:
        return self.variables_of_users() | {
            "EMBEDDING_AGGREGATOR_STORE": str(self.folder / "aggregator.sqlite"),
            # The embedded broker lets a group wait for half a session.
            "EMBEDDING_SESSION_TIMEOUT_S": "6",
            "EMBEDDING_HEARTBEAT_INTERVAL_S": "1",
            "EMBEDDING_LEASE_MARGIN_S": "1",
            "EMBEDDING_LOG_LEVEL": "INFO",
        }


def run_demo(files: Sequence[Path], *, as_json: bool, keep: bool, debug: bool = False) -> int:
    """Run it all and return the exit code: 0 when every figure is as it must be. EmbeddedUnavailable if it can't."""
    started = time.monotonic()
    screen = err if as_json else out
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    corpus = of_files(files) if files else standard_library()
    try:
        with ExitStack() as context:
            try:
                stack = Stack(context)
                report = run(_Show(stack, corpus, screen, started).run(), debug=debug)
                faults = report.faults(least_chunks=1 if files else LEAST_CHUNKS)
                for fault in faults:
                    err.print(f"NOT MET: {fault}", style="red")
                if as_json:
                    print_json(asdict(report))
                if keep:
                    _wait(stack, screen)
            finally:
                _ignore_signals()
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print("interrupted: everything was stopped and removed")
        return INTERRUPTED
    return FAILED if faults else 0


class _Show:
    """The acts of the demo, in order."""

    def __init__(self, stack: Stack, corpus: Corpus, screen: Console, started: float) -> None:
        self._stack = stack
        self._corpus = corpus
        self._screen = screen
        self._started = started
        self._texts = {c.chunk_id: c.text for chunks in corpus.documents.values() for c in chunks}

    async def run(self) -> Report:
        """All acts. EmbeddedUnavailable as soon as one of our processes dies."""
        acts, watch = asyncio.create_task(self._acts()), asyncio.create_task(self._watch())
        done, _ = await asyncio.wait({acts, watch}, return_when=asyncio.FIRST_COMPLETED)
        for task in {acts, watch} - done:
            task.cancel()
        await asyncio.gather(acts, watch, return_exceptions=True)
        if acts not in done:
            watch.result()
        return acts.result()

    async def _watch(self) -> None:
        while True:
            for child in self._stack.children:
                child.check()
            await asyncio.sleep(0.5)

    async def _acts(self) -> Report:
        stack, corpus = self._stack, self._corpus
        self._say(f"{corpus.size:,} chunks of {len(corpus.documents)} documents; starting broker, cache, workers")
        await topics.create(stack.settings, partitions=PARTITIONS, replication=1)
        stack.start()
        for child in stack.children:
            await _until(child.ready, within_s=START_TIMEOUT_S, what=f"{child.name} is ready")
        self._say(f"ready after {time.monotonic() - self._started:.1f} s")
        async with Client(stack.settings, source_service="demo") as client:
            first = await self._ingest(client, "first", "first pass: embed")
            hits = await self._ask(client, first)
            second = await self._ingest(client, "second", "second pass: cached")
            written = await self._written(client)
        requests = {outcome.request_id for outcome in [*first, *second]}
        usage = await self._usage(requests=len(requests) + len(corpus.questions))
        ledger_tokens = await self._ledger_tokens()
        summary = await self._settled(ledger_tokens)
        again = [outcome.result.cache for outcome in second if outcome.ok and outcome.result]
        report = Report(
            chunks=corpus.size,
            results=written["first"],
            errors=sum(not outcome.ok and not outcome.timed_out for outcome in [*first, *second]),
            lost=sum(outcome.timed_out for outcome in [*first, *second]) + 2 * corpus.size - sum(written.values()),
            second_pass_hits=sum(cache in {"l1", "l2"} for cache in again),
            usage_tokens=usage.billed_tokens,
            ledger_tokens=ledger_tokens,
            residual_tokens=int(summary["residual_tokens"]),
            questions_hit=f"{hits}/{len(corpus.questions)}",
            seconds=round(time.monotonic() - self._started, 1),
        )
        self._say(
            f"{report.results:,} results, {report.errors} errors, {report.lost} lost; "
            f"{report.second_pass_hits:,} cache hits in the second pass\n"
            f"billed {report.usage_tokens:,} tokens, the provider's receipts say {report.ledger_tokens:,}, "
            f"residual {report.residual_tokens:,}; {report.seconds} s"
        )
        return report

    async def _ingest(self, client: Client, correlation_id: str, title: str) -> list[Outcome]:
        """Every document as a request of its own, all at once."""
        with _bar(self._screen, title, self._corpus.size) as advance:

            async def ingest(document_id: str) -> list[Outcome]:
                chunks = self._corpus.documents[document_id]
                outcomes = await client.embed(
                    chunks,
                    tenant_id=TENANT,
                    collection=COLLECTION,
                    document_id=document_id,
                    correlation_id=f"{correlation_id} {document_id}",
                    timeout_s=WORK_TIMEOUT_S,
                )
                advance(len(chunks))
                return outcomes

            by_document = await asyncio.gather(*map(ingest, self._corpus.documents))
        return [outcome for outcomes in by_document for outcome in outcomes]

    async def _ask(self, client: Client, outcomes: Iterable[Outcome]) -> int:
        """How many questions find their chunk among the three nearest vectors."""
        found = [(outcome.chunk_id, outcome.vector) for outcome in outcomes if outcome.vector is not None]
        names, vectors = [name for name, _ in found], np.array([vector for _, vector in found])
        hits = 0
        for question in self._corpus.questions:
            answer = await client.embed_query(question.text, tenant_id=TENANT, timeout_s=30)
            nearest = _nearest(names, vectors, answer.vector) if answer.vector is not None and names else []
            hit = bool(question.answers & {name for name, _ in nearest})
            hits += hit
            self._say(f"{'found' if hit else 'NOT FOUND'}: {question.text}")
            for name, similarity in nearest:
                self._say(f"  {similarity:.2f}  {_line(self._texts[name])}")
        return hits

    async def _written(self, client: Client) -> dict[str, int]:
        """By pass, the chunks with an `ok` on the results topic, each counted once."""
        written = {"first": 0, "second": 0}
        async with aclosing(client.results(follow=False, remember=None)) as results:
            async for result in results:
                name = result.correlation_id.split(" ", 1)[0]
                if name in written and _is_vector(result):
                    written[name] += 1
        return written

    async def _usage(self, *, requests: int) -> UsageSums:
        """The published totals once they account for every request, shown as a table."""
        sums = UsageSums()
        shown = {}

        async def complete() -> bool:
            nonlocal sums, shown
            totals = await read_totals(self._stack.settings)
            shown = {key: value for key, value in totals.items() if len(key.bucket) == len("2026-11")}
            sums = add(value for key, value in shown.items() if key.dimension == "all")
            return sums.requests >= requests

        with contextlib.suppress(TimeoutError):  # the figures say it then
            await _until_async(complete, within_s=BOOKS_TIMEOUT_S)
        self._screen.print(table({k: v for k, v in shown.items() if k.dimension in {"all", "operation"}}))
        return sums

    async def _ledger_tokens(self) -> int:
        """What the receipts on `embedding-calls` say was billed, each attempt once."""
        settings, codec = self._stack.settings, Codec()
        billed: dict[str, int] = {}
        reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
        async with aclosing(reader.read(settings.topic(topics.topics()["calls"].name))) as fetched:
            async for records in fetched:
                for record in records:
                    call = await codec.read(ProviderCall, record.value)
                    if not isinstance(call, Undecodable) and call.kind is CallKind.RECEIPT:
                        billed.setdefault(call.attempt_id, call.billed_tokens or 0)
        return sum(billed.values())

    async def _settled(self, ledger_tokens: int) -> dict[str, Any]:
        """The aggregator's own books, once it has folded the whole ledger."""
        books: dict[str, Any] = {}

        async def settled() -> bool:
            nonlocal books
            books = await asyncio.to_thread(self._stack.aggregator.get, "/ledger")
            return bool(books) and books["billed_tokens"] >= ledger_tokens and not books["in_flight_attempts"]

        with contextlib.suppress(TimeoutError):
            await _until_async(settled, within_s=BOOKS_TIMEOUT_S)
        if not books:
            raise EmbeddedUnavailable("the aggregator does not answer on its internal port")
        return books

    def _say(self, text: str) -> None:
        self._screen.print(text, markup=False, highlight=False)


def _is_vector(result: ReceivedResult) -> bool:
    return result.status == "ok" and result.vector is not None


def _nearest(names: Sequence[str], vectors: Vector, question: Vector, *, count: int = 3) -> list[tuple[str, float]]:
    """(chunk id, cosine) of the nearest; the model's vectors have length 1."""
    similarity = vectors @ question
    return [(names[place], float(similarity[place])) for place in np.argsort(-similarity)[:count]]


def _line(text: str, characters: int = 90) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


@contextmanager
def _bar(screen: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A live bar on a terminal, elsewhere a line for each quarter."""
    if screen.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=screen) as progress:
            bar = progress.add_task(title, total=total)
            yield lambda count: progress.advance(bar, count)
        return
    done, started = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if 4 * before // total < 4 * done // total:
            screen.print(f"{title} {done:,}/{total:,} after {time.monotonic() - started:.1f} s", highlight=False)

    yield advance


async def _until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    async def asked() -> bool:
        return await asyncio.to_thread(condition)

    try:
        await _until_async(asked, within_s=within_s)
    except TimeoutError:
        raise EmbeddedUnavailable(f"not within {within_s:.0f} s: {what}") from None


async def _until_async(condition: Callable[[], Any], *, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - conditions of other processes
            await asyncio.sleep(0.2)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These settings and no others, whatever this shell has set; restored afterwards."""
    before = dict(os.environ)
    ours = {name for key, field in Settings.model_fields.items() for name in environment_names(key, field)}
    try:
        for name in list(os.environ):
            if name in ours or name.startswith(PREFIX):
                del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ignore_signals() -> None:
    """What has begun to stop is stopped to the end, however often Ctrl-C is pressed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _wait(stack: Stack, screen: Console) -> None:
    screen.print("Everything stays up until Ctrl-C:", highlight=False)
    for name, address in stack.addresses():
        screen.print(f"  {name:12} {address}", highlight=False)
    screen.print("To use it from another shell:", highlight=False)
    words = " ".join(f"{name}={value}" for name, value in stack.variables_of_users().items())
    screen.print(f"  export {words}", highlight=False)
    while True:
        for child in stack.children:
            child.check()
        time.sleep(1)
