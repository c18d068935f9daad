"""`produce`: files to documents, documents to requests, outcomes to a summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from processor.cli.console import err
from processor.cli.splitter import split_text
from processor.client import Chunk, Client, Outcome
from processor.errors import RequestRefused
from processor.settings import Settings


@dataclass(slots=True)
class Summary:
    """What was sent, and with `waited` what became of it: chunks by outcome."""

    documents: int = 0
    chunks: int = 0
    waited: bool = False
    ok: int = 0
    failed: int = 0
    timed_out: int = 0

    def sentence(self) -> str:
        sent = f"{self.chunks:,} chunks of {self.documents:,} documents sent"
        return f"{sent}: {self.ok:,} ok, {self.failed:,} failed, {self.timed_out:,} timed out" if self.waited else sent


async def produce_files(
    settings: Settings,
    paths: Sequence[Path],
    *,
    tenant_id: str,
    collection: str | None,
    model: str | None,
    max_characters: int,
    overlap_characters: int,
    replace: bool,
    wait: bool,
    timeout_s: float,
) -> Summary:
    """Send every file as a document and, with `wait`, print each failure to standard error."""
    summary = Summary(waited=wait)
    files = list(text_files(paths))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    async with Client(settings, source_service="embedding-processor produce") as client:
        with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
            bar = progress.add_task("files", total=len(files))
            for path in files:
                pieces = split_text(
                    read_text(path), max_characters=max_characters, overlap_characters=overlap_characters
                )
                chunks = [Chunk(str(place), piece) for place, piece in enumerate(pieces)]
                name = path.as_posix()
                if replace:
                    done = await client.replace_document(
                        chunks,
                        tenant_id=tenant_id,
                        collection=collection,
                        document_id=name,
                        timeout_s=timeout_s,
                        model=model,
                    )
                    count(summary, name, [*done.chunks, *([] if done.manifest.ok else [done.manifest])])
                elif chunks and wait:
                    outcomes = await client.embed(
                        chunks,
                        tenant_id=tenant_id,
                        collection=collection,
                        document_id=name,
                        timeout_s=timeout_s,
                        model=model,
                    )
                    count(summary, name, outcomes)
                elif chunks:
                    await client.submit(
                        chunks, tenant_id=tenant_id, collection=collection, document_id=name, model=model
                    )
                if chunks or replace:
                    summary.documents += 1
                    summary.chunks += len(chunks)
                else:
                    err.print(f"{name}: holds no text, nothing sent", markup=False, highlight=False)
                progress.advance(bar)
    return summary


def text_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files named, and all files below the directories named, hidden ones left out, in order."""
    for path in paths:
        if path.is_dir():
            for found in sorted(path.rglob("*")):
                if found.is_file() and not any(part.startswith(".") for part in found.relative_to(path).parts):
                    yield found
        else:
            yield path


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    except OSError as error:
        raise RequestRefused(f"{path}: can't be read: {error.strerror}") from None
    raise RequestRefused(f"{path}: byte {place} is not UTF-8; convert the file or leave it out")


def count(summary: Summary, document: str, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.ok:
            summary.ok += 1
        elif outcome.timed_out:
            summary.timed_out += 1
        else:
            summary.failed += 1
        if not outcome.ok:
            why = outcome.error.message if outcome.error else "no outcome in time"
            err.print(f"{document} {outcome.chunk_id or '(all)'}: {outcome.status}: {why}", markup=False)
