"""Every command: parses, calls, prints. What is more than that lies in its own module beside this one."""

from __future__ import annotations

import sys
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from processor.adapters import topics as topic_adapter
from processor.cli import console, settings_table
from processor.cli import doctor as doctor_checks
from processor.cli.console import EXIT_CODES, AsJson, Options, err, fail_if, out, print_json, run
from processor.cli.usage import app as usage_app
from processor.client import Client, ReceivedResult
from processor.domain import Lane
from processor.errors import ProcessorError
from processor.settings import load

app = typer.Typer(
    name="embedding-processor",
    help="Embeds chunk events from Kafka: one vector per chunk, and an exact bill.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
topics_app = typer.Typer(help="Make and check the topics.", no_args_is_help=True)
app.add_typer(topics_app, name="topics")
app.add_typer(usage_app, name="usage")
cache_app = typer.Typer(help="Look into the shared cache, erase a tenant from it, fill it.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command line; an error of ours is one readable line, with --debug a traceback before it."""
    try:
        app()
    except ProcessorError as error:
        if Options.debug:
            err.print_exception()
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(console.exit_code(error))


@app.callback()
def _common(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False) -> None:
    Options.debug = debug


@app.command()
def worker(
    lane: Annotated[
        Lane | None,
        typer.Option(help="bulk takes embedding-requests, interactive takes embedding-queries [EMBEDDING_LANE]."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Workers on this machine; their ports count up from EMBEDDING_HTTP_PORT.")
    ] = 1,
) -> None:
    """Run a worker until SIGTERM or Ctrl-C: it consumes requests and writes results, usage and the ledger.

    With --processes, as many of them, each in a process of its own; when one ends, all end.
    """
    from processor.app import run_worker
    from processor.cli.processes import run_processes

    loaded = load() if lane is None else load(lane=lane)
    if processes > 1:
        raise typer.Exit(run_processes(processes, loaded, "worker", "--lane", loaded.lane))
    raise typer.Exit(run_worker(loaded))


@app.command()
def aggregator() -> None:
    """Run the aggregator until SIGTERM or Ctrl-C: it folds usage into totals. A second one stands by."""
    from processor.app import run_aggregator

    raise typer.Exit(run_aggregator(load()))


@topics_app.command("create")
def topics_create(
    partitions: Annotated[int | None, typer.Option(min=1, help="Partitions of each topic instead of its own.")] = None,
    replication: Annotated[
        int | None, typer.Option(min=1, help="Copies of each partition; default 3 or fewer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the topics that are missing; what exists is left as it is."""
    made = run(topic_adapter.create(load(), partitions=partitions, replication=replication), debug=Options.debug)
    if as_json:
        print_json({"made": made})
    else:
        out.print("\n".join(f"made {name}" for name in made) or "nothing to do: every topic exists", markup=False)


@topics_app.command("check")
def topics_check(as_json: AsJson = False) -> None:
    """Say what is wrong with the topics and how to mend it. Exit code 1 when a worker would refuse to start."""
    findings = run(topic_adapter.check(load()), debug=Options.debug)
    for finding in findings:
        if as_json:
            print_json(finding._asdict())
        else:
            out.print(f"{finding.severity}: {finding.topic}: {finding.what}; {finding.fix}", markup=False)
    if not findings and not as_json:
        out.print("every topic is as described")
    fail_if(any(finding.severity is topic_adapter.Severity.ERROR for finding in findings))


@app.command()
def produce(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Text files, or directories of them.")],
    tenant: Annotated[str, typer.Option(help="Whose texts they are, and who pays.")],
    collection: Annotated[str | None, typer.Option(help="Collection that the documents belong to.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the worker's.")] = None,
    max_characters: Annotated[int, typer.Option(min=20, help="Longest chunk, in characters.")] = 800,
    overlap: Annotated[int, typer.Option(min=0, help="Characters that a chunk repeats of the one before.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Delete chunks that a document had before.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcomes and print failures.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest wait for one document, in seconds.")] = 300,
    as_json: AsJson = False,
) -> None:
    """Split files into chunks and request their vectors; a file is a document, named by its path.

    Paragraphs are kept together while they fit, then sentences, then words. Exit code 1 when, with --wait or
    --replace, a chunk failed or timed out.
    """
    from processor.cli.produce import produce_files

    if 2 * overlap >= max_characters:
        raise typer.BadParameter("must stay below half of --max-characters", param_hint="--overlap")
    summary = run(
        produce_files(
            load(),
            paths,
            tenant_id=tenant,
            collection=collection,
            model=model,
            max_characters=max_characters,
            overlap_characters=overlap,
            replace=replace,
            wait=wait or replace,
            timeout_s=timeout_s,
        ),
        debug=Options.debug,
    )
    if as_json:
        print_json(asdict(summary))
    else:
        out.print(summary.sentence(), markup=False)
    fail_if(summary.failed or summary.timed_out)


@app.command()
def quote(
    sources: Annotated[list[str], typer.Argument(help="Text files, directories of them, or one topic of requests.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose texts the files are, for the cache; of a topic: only this one's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model; default: the worker's, or what the requests of a topic name.")
    ] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Dimensions; default: the model's.")] = None,
    max_characters: Annotated[int, typer.Option(min=20, help="Longest chunk of a file, in characters.")] = 800,
    overlap: Annotated[int, typer.Option(min=0, help="Characters that a chunk repeats of the one before.")] = 0,
    begin: Annotated[
        Literal["committed", "beginning"],
        typer.Option("--from", help="Of a topic: what the workers have not committed, or all that is retained."),
    ] = "committed",
    call_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long a call takes; default: 1 s when no limits are set.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what embedding would take and cost: texts, tokens, calls, minutes, money. Nothing is sent.

    Files are split as by `produce`. Texts are counted by the model's tokenizer, equal ones of a tenant once, and those
    in Redis not at all. Settings are read as a worker reads them.
    """
    from processor.cli.quote import Wishes, print_report, quote_sources

    if 2 * overlap >= max_characters:
        raise typer.BadParameter("must stay below half of --max-characters", param_hint="--overlap")
    wishes = Wishes(
        tenant_id=tenant,
        model=model,
        dimensions=dimensions,
        max_characters=max_characters,
        overlap_characters=overlap,
        begin=begin,
        call_s=call_seconds,
    )
    report = run(quote_sources(load(), sources, wishes), debug=Options.debug)
    if as_json:
        print_json(report.fields())
    else:
        print_report(report, out)


@app.command()
def results(
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on when the end is reached.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin at the present end; goes with --follow.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="With --json: the vectors too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print outcomes as they were written, the first copy of each. No text is in them."""

    async def show() -> None:
        async with Client(load()) as client:
            stream = client.results(from_beginning=not new, follow=follow)
            async with aclosing(stream):
                async for result in stream:
                    if tenant in (None, result.tenant_id):
                        _print_result(result, vectors=vectors, as_json=as_json)

    if new and not follow:
        raise typer.BadParameter("needs --follow: there is nothing beyond the end yet", param_hint="--new")
    run(show(), debug=Options.debug)


def _print_result(result: ReceivedResult, *, vectors: bool, as_json: bool) -> None:
    if as_json:
        fields = asdict(result)
        vector = fields.pop("vector")
        if vectors:
            fields["vector"] = None if vector is None else vector.tolist()
        print_json(fields)
        return
    what = result.error.message if result.error else f"{result.dimensions} dimensions, {result.token_count} tokens"
    where = f"{result.document_id or '-'} {result.chunk_id or f'(all {result.length})'}"
    out.print(f"{result.tenant_id} {where} {result.status} {result.cache} {what}", markup=False, highlight=False)


@cache_app.command("stats")
def cache_stats(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's entries.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count the entries in Redis, and say how it fares: size, life, memory, evictions, hits.

    Bytes and life are those of a sample. Hits are the server's, of all its clients; each worker's own, and the corrupt
    entries that it met, are in its metrics (cache_lookups, cache_faults).
    """
    from processor.cli.cache import read_stats, stats_fields, stats_sentences

    stats = run(read_stats(load(), tenant), debug=Options.debug)
    if as_json:
        print_json(stats_fields(stats))
    else:
        out.print("\n".join(stats_sentences(stats)), markup=False, highlight=False)


@cache_app.command("purge")
def cache_purge(
    tenant: Annotated[str, typer.Option(help="Whose vectors are erased.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a tenant's vectors from Redis, and from the memory of running workers within seconds.

    Asks first. Needs the workers' settings of the cache: its secret, and the former one while that is changed. What the
    tenant still sends is cached anew.
    """
    from processor.cli.cache import count, purge

    loaded = load()
    if not yes:
        found = run(count(loaded, tenant), debug=Options.debug)
        typer.confirm(f"Erase {found:,} entries of {tenant}?", abort=True, err=True)
    purged = run(purge(loaded, tenant), debug=Options.debug)
    if as_json:
        print_json(asdict(purged))
    else:
        out.print(purged.sentence(), markup=False, highlight=False)


@cache_app.command("warm")
def cache_warm(
    files: Annotated[
        list[Path] | None, typer.Argument(exists=True, dir_okay=False, help="JSON lines, a vector each; or nothing.")
    ] = None,
    from_results: Annotated[
        bool, typer.Option("--from-results", help="Take the results that Kafka retains, with their requests.")
    ] = False,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put vectors that exist already into Redis, where there are none; nobody is charged for it, then or later.

    A line of a file is {"tenant", "model", "text", "vector"} and, where the request names them too, "dimensions",
    "input_type", "truncate"; "tokens" is what the provider billed, else they are counted here. The vectors must be
    those that the model of that name gives today, its prefix included. Settings are read as a worker reads them.
    """
    from processor.cli.warm import warm_from_files, warm_from_results

    if bool(files) == from_results:
        raise typer.BadParameter("give files, or --from-results", param_hint="FILES")
    loaded = load()
    work = warm_from_results(loaded, tenant) if from_results else warm_from_files(loaded, files or [], tenant)
    warmed = run(work, debug=Options.debug)
    if as_json:
        print_json(asdict(warmed))
    else:
        out.print(warmed.sentence(), markup=False, highlight=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at settings, broker, topics, cache, registry and provider; say cause and fix. Nothing is embedded."""

    async def look() -> list[doctor_checks.Check]:
        return [check async for check in doctor_checks.examine()]

    checks = run(look(), debug=Options.debug)
    if as_json:
        for check in checks:
            print_json(asdict(check))
    else:
        view = Table("", "what", "finding", "fix")
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        for check in checks:
            view.add_row(f"[{colours[check.state]}]{check.state}[/]", check.name, escape(check.what), escape(check.fix))
        out.print(view)
    fail_if(any(check.state == "error" for check in checks))


@app.command()
def settings() -> None:
    """Print every setting with its default and meaning, as Markdown (docs/settings.md)."""
    sys.stdout.write(settings_table.markdown())


@app.command()
def demo(
    files: Annotated[
        list[Path] | None, typer.Argument(exists=True, help="Texts; default: Python's docstrings.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it all up and print the addresses.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole path on this machine: broker, cache, local model, workers, aggregator, questions, bill.

    Needs nothing but this package with its extras local and embedded. Ctrl-C leaves no process and no file behind.
    Exit code 1 when a figure is not as it must be.
    """
    from processor.cli.demo import run_demo

    raise typer.Exit(run_demo(files or [], as_json=as_json, keep=keep, debug=Options.debug))
