"""`usage report`, `audit` and `explain` on Apache Kafka, after real workers and an aggregator have done their work."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from processor.accounts import Budget, BudgetKey, TaskProgress, UsageSums
from processor.adapters.avro import Codec
from processor.adapters.kafka import connection
from processor.adapters.schemas import current
from processor.adapters.topics import topics
from processor.budgets import state_of
from processor.identity import request_id
from processor.ports import Destination
from processor.settings import Settings
from tests.support import audit
from tests.support.avro_data import encode, total_fields
from tests.support.brokers import Broker
from tests.support.ledgers import invoice_of
from tests.support.stack import Stack, until
from tests.support.traffic import hard_requests
from tests.support.world import PATIENT, World, beginner

DAY_S = 86_400
TEXT = "sentence number"
"""What many texts of the traffic hold, and no output may."""


def usage(stack: Stack, *arguments: str, code: int = 0) -> str:
    """Standard output of a command under `usage` that ends with this exit code."""
    done = stack.command("usage", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert TEXT not in done.stdout + done.stderr
    return done.stdout


def json_lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


async def append(settings: Settings, destination: Destination, value: bytes | None = None) -> None:
    """`value`: in place of the one that it has."""
    key, ours, _ = Codec().encode(destination)
    topic = settings.topic(topics()[destination.name].name)
    async with AIOKafkaProducer(**connection(settings)) as producer:
        await producer.send_and_wait(topic, ours if value is None else value, key=key, partition=0)


async def test_the_bill_is_reported_audited_and_explained(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """Reports sum to the charges, the audit holds with the provider's invoice, and each request's life is told."""
    async with beginner(kafka, unique, tmp_path)("--base-ms", "5", **PATIENT) as world:
        await world.a_worker()
        await world.traffic.send(hard_requests(60, chunks=3))
        await until(world.traffic.all_committed, within_s=300, what="every request is committed")
        books, residuals, _ = await world.finish_and_audit()
        check_reports(world, books)
        check_audit(world, books, residuals, tmp_path)
        check_explanations(world, books)
        await check_differences(world, books)


def check_reports(world: World, books: audit.Books) -> None:
    charged = [charge.usage for charge in books.charges()]
    billed = sum(usage.billed.tokens for usage in charged)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for by in ("day", "month", "payer", "model", "operation", "agent", "collection"):
        *rows, total = json_lines(usage(world.stack, "report", "--by", by, "--json"))
        assert (total["total"], total["billed_tokens"], total["requests"]) == (True, billed, len(charged))
        assert sum(row["billed_tokens"] for row in rows) == billed, by
    printed = usage(world.stack, "report", "--by", "payer", "--from", "2020-01", "--to", today, "--csv")
    rows = list(csv.DictReader(printed.splitlines()))
    paid: Counter[str] = Counter()
    for charge in charged:
        paid[charge.payer_id] += charge.billed.cost_nanos or 0
    assert {row["payer"]: int(row["billed_cost_nanos"]) for row in rows} == dict(paid)
    assert all(Decimal(row["billed_cost_usd"]) * 10**9 == int(row["billed_cost_nanos"]) for row in rows)
    shown = usage(world.stack, "report", "--by", "payer", "--payer", "acme")
    assert "globex" not in shown
    assert "total" in shown
    assert usage(world.stack, "report", "--to", "2020-01") == ""


def check_audit(world: World, books: audit.Books, residuals: audit.Residuals, folder: Path) -> None:
    invoice = folder / "invoice.csv"
    days = invoice_of(books)
    invoice.write_text("date,tokens\n" + "".join(f"{day},{tokens}\n" for day, tokens in days.items()))
    *found, summary = json_lines(usage(world.stack, "audit", "--invoice", str(invoice), "--json"))
    assert summary["clean"] is True
    assert (summary["store"], summary["usage"]["events"]) == ("agrees", len(books.usage))
    assert summary["totals"]["proven"] == summary["totals"]["buckets"] == len(books.totals)
    assert summary["ledger"]["billed"]["tokens"] == residuals.billed
    assert [line["inside"] for line in found if line["found"] == "invoice"] == [True] * (len(days) + 1)
    printed = usage(world.stack, "audit", "--invoice", str(invoice))
    assert "clean: everything is explained" in printed
    wrong = folder / "wrong.json"
    high = max(line["high_tokens"] for line in found if line["found"] == "invoice")
    wrong.write_text(json.dumps([{"date": min(days), "tokens": high + 1}]))
    printed = usage(world.stack, "audit", "--invoice", str(wrong), code=1)
    assert "OUTSIDE" in printed
    assert "NOT CLEAN" in printed


def check_explanations(world: World, books: audit.Books) -> None:
    charge = next(charge.usage for charge in books.charges() if charge.usage.parts)
    name, tenant = charge.request.correlation_id, charge.request.tenant_id
    told = json_lines(usage(world.stack, "explain", name, "--tenant", tenant, "--json"))
    (life,) = [life for life in told if life["request_id"] == charge.request_id]
    sent = [request for _, request in books.requests if request_id(request) == charge.request_id]
    assert (len(life["records"]), life["chunks"]) == (len(sent), len(sent[0].chunks))
    assert sum(outcome["chunks"] for outcome in life["outcomes"]) == life["chunks"]
    (charged,) = life["charges"]
    assert (charged["billed"]["tokens"], charged["in_totals"], charged["late"]) == (charge.billed.tokens, True, False)
    assert charged["price_version"] == charge.price_version
    parts = {part["attempt_id"]: part["tokens"] for part in charged["parts"]}
    assert {each["attempt_id"]: each["charged_tokens"] for each in life["attempts"] if each["charged_tokens"]} == parts
    assert all(each["outcome"] == "ok" for each in life["attempts"] if each["charged_tokens"])
    assert {life["tenant_id"] for life in told} == {tenant}
    printed = usage(world.stack, "explain", name)
    assert f"request {charge.request_id} of {tenant}" in printed
    assert "in the totals" in printed
    tomorrow = f"{datetime.fromtimestamp(datetime.now(UTC).timestamp() + DAY_S, UTC):%Y-%m-%d}"
    assert usage(world.stack, "explain", name, "--since", tomorrow, code=1) == ""
    assert usage(world.stack, "explain", "nobody-sent-this", code=1) == ""
    begun = datetime.fromtimestamp(min(record.source.append_ms for record, _ in books.requests) / 1000, UTC)
    assert usage(world.stack, "explain", name, "--since", f"{begun:%Y-%m-%d}") == printed


async def check_differences(world: World, books: audit.Books) -> None:
    """Somebody writes what nobody was billed into what is published: it is named, and the exit code says so."""
    total = next(total for total in books.totals.values() if total.key.dimension == "all")
    ((partition, (last_offset, sums)),) = total.partitions.items()
    more = replace(sums, billed_tokens=sums.billed_tokens + 1)
    forged = replace(total, partitions={partition: (last_offset + 10**6, more)})
    await append(world.stack.settings(), Destination("totals", forged))
    *found, summary = json_lines(usage(world.stack, "audit", "--json", code=1))
    assert summary["clean"] is False
    names = [line["name"] for line in found if line["found"] == "difference"]
    assert names == ["last_offset", "billed_tokens"]
    assert "DIFFERENCE" in usage(world.stack, "audit", code=1)
    settings, schema, now_ms = world.stack.settings(), current("UsageTotal"), forged.updated_at_ms
    fields = total_fields(forged) | {"totals": dict.fromkeys(UsageSums.__dataclass_fields__, 0)}
    stated = schema.single_object_header + encode(schema.parsed, fields)
    await append(settings, Destination("totals", forged), stated)
    progress = TaskProgress(tenant_id="acme", task_id="x", done=1, failed=0, total=None, updated_at_ms=now_ms)
    await append(settings, Destination("progress", progress))
    limit = Budget(max_tokens=1, max_cost_nanos=None, hard=True)
    state = state_of(BudgetKey("nobody", "2026-11"), limit, UsageSums(billed_tokens=1), now_ms)
    await append(settings, Destination("budgets", state))
    *found, summary = json_lines(usage(world.stack, "audit", "--json", code=1))
    assert (summary["budgets"]["compared"], summary["tasks"]["differences"]) == (True, 1)
    told = [(line["name"], line["published"], line["recomputed"]) for line in found if line["found"] != "residual"]
    assert ("billed_tokens", 0, more.billed_tokens) in told, "the total is not the sum of its partitions"
    assert ("done", 1, 0) in told
    assert {("billed_tokens", 1, 0), ("reached_percent", 100, 0)} <= set(told)
