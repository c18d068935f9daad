"""The commands under `usage`: what finance and the operator ask of the bill."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from processor.cli import report as reports
from processor.cli.console import AsJson, Options, err, fail_if, is_utf8, out, print_json, run, visible
from processor.cli.invoice_file import InvoiceFault, read_invoice
from processor.cli.totals import read_totals
from processor.settings import load

app = typer.Typer(help="What was embedded for whom, what it cost, and whether it adds up.", no_args_is_help=True)

Days = "A UTC day 2026-11-21 or month 2026-11"


@app.command()
def report(
    by: Annotated[reports.By, typer.Option(help="What the rows are.")] = "month",
    first: Annotated[str | None, typer.Option("--from", help=f"{Days} to begin with; default: the first.")] = None,
    last: Annotated[str | None, typer.Option("--to", help=f"{Days} to end with, included; default: the last.")] = None,
    payer: Annotated[str | None, typer.Option(help="Only this payer's; default: all of them together.")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV for spreadsheets, without the total.")] = False,
) -> None:
    """Print the totals of tokens and money as the aggregator publishes them, by one thing, with their sum.

    Months and days are UTC. Costs are exact: in CSV as dollars and as nano-dollars. A charge without agent or
    collection is in the row (none).
    """
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv", param_hint="--csv")
    try:
        chosen = reports.periods(by, first, last)
    except reports.PeriodFault as fault:
        raise typer.BadParameter(str(fault), param_hint=fault.option) from None
    shown = reports.report(run(read_totals(load()), debug=Options.debug), by, chosen, payer)
    if as_json:
        for line in reports.json_lines(shown):
            print_json(line)
    elif as_csv:
        reports.write_csv(shown, sys.stdout)
    elif shown.rows:
        out.print(reports.table(shown))
    else:
        err.print("no totals of this choice; they appear some seconds after the requests while an aggregator runs")


@app.command()
def audit(
    invoice: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Daily amounts of the provider: CSV or JSON of date,tokens,amount."
        ),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Whose invoice it is, as the ledger names deployments; default: everybody's.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The aggregator's store; default: that of the settings, if here."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute totals and ledger from the retained logs and print every difference and residual.

    Compares with the published totals, budgets and task progress, the late charges set apart, the aggregator's own
    ledger, and an invoice, which must lie between what receipts say and that plus what nobody confirmed. Exit code 1
    when anything is unexplained. Nothing is changed.
    """
    from processor.cli.audit import audit_lines, print_audit, run_audit

    if provider is not None and invoice is None:
        raise typer.BadParameter("needs --invoice: it says whose that is", param_hint="--provider")
    try:
        bills = None if invoice is None else read_invoice(invoice)
    except InvoiceFault as fault:
        raise typer.BadParameter(str(fault), param_hint="--invoice") from None
    found = run(run_audit(load(), invoice=bills, provider=provider, store=store), debug=Options.debug)
    if as_json:
        for line in audit_lines(found):
            print_json(line)
        print_json(found.fields())
    else:
        print_audit(found, out)
    fail_if(not found.clean)


@app.command("explain")
def explain_request(
    correlation_id: Annotated[str, typer.Argument(help="The sender's name for the request.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Look only at records appended from this UTC day 2026-11-21 on: faster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell the life and price of a request: records, outcomes, charge, attempts, dead letters. No text is shown.

    Every topic is read. Requests of one correlation id that differ in their contents are told one by one. Exit code 1
    when there is none.
    """
    from processor.cli.explain import explain, sentences

    try:
        since_ms = None if since is None else _begins_ms(since)
    except ValueError:
        raise typer.BadParameter("must be a day such as 2026-11-21", param_hint="--since") from None
    if not correlation_id or not is_utf8(correlation_id):
        raise typer.BadParameter("must be a text, and not empty", param_hint="CORRELATION_ID")
    told = run(explain(load(), correlation_id, tenant_id=tenant, since_ms=since_ms), debug=Options.debug)
    if as_json:
        for life in told.lives:
            print_json(life.fields())
        for letter in told.dead_letters:
            print_json(letter.fields())
    else:
        for line in sentences(told):
            out.print(visible(line), markup=False, highlight=False)
    if not told:
        err.print("no topic holds a request of this correlation id")
    fail_if(not told)


def _begins_ms(day: str) -> int:
    """Kafka knows no time before 1970."""
    return max(int(datetime.strptime(f"{day}Z", "%Y-%m-%d%z").timestamp() * 1000), 0)


@app.command()
def rebuild(
    forget_totals: Annotated[
        bool,
        typer.Option(
            "--forget-totals",
            help="Delete the published totals and tasks too: token-usage was made again, they are of no log.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Set the aggregator's store aside: it is lost or damaged, or its topics have grown or were made again.

    The next start makes it again from the topics. Stop the aggregator first, and do this wherever an aggregator or a
    standby keeps a store of its own. Asks before it changes anything.
    """
    from processor.cli.rebuild import carry_out, plan

    loaded = load()
    planned = run(plan(loaded, forget_totals=forget_totals), debug=Options.debug)
    out.print("\n".join(planned.sentences()), markup=False, highlight=False)
    if not yes:
        typer.confirm("Go on?", abort=True)
    aside = run(carry_out(loaded, planned), debug=Options.debug)
    moved = "" if aside is None else f"the former store is {aside}; "
    out.print(f"done: {moved}start the aggregator", markup=False, highlight=False)
