"""The SQL of docs/usage.md gives what the aggregator publishes, on histories with copies, late charges and gaps."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from processor.accounts import BucketKey, UsageSums
from processor.adapters.murmur2 import partition_of
from processor.domain import Amounts, Operation, Part, Record, TokenType, Usage
from processor.ports import Destination
from tests.support.aggregation import DAY_MS, HORIZON_MS, PARTITIONS, TOPICS, MemoryLog, a_bench
from tests.support.builders import NOW_MS, a_request, a_usage
from tests.support.sql_engines import ENGINES, EngineMissing, Run

PAGE = (Path(__file__).parents[2] / "docs" / "usage.md").read_text(encoding="utf-8")
EVENTS = 600
SEEDS = (1, 2, 3)
GAPS_MS = (0, 1_000, 60_000, DAY_MS, 20 * DAY_MS)
AGES_MS = (0, 5_000, DAY_MS, HORIZON_MS, HORIZON_MS + 1, HORIZON_MS + DAY_MS)
APART_MS = (1_000, DAY_MS, 2 * HORIZON_MS - DAY_MS, 2 * HORIZON_MS, 2 * HORIZON_MS + 1, 3 * HORIZON_MS)
"""How long after the copy before it a copy comes: both sides of each bound."""
TOKEN_TYPES = (*[TokenType.EMBEDDING] * 9, TokenType.OUTPUT)
"""Another service's event is passed over, and nobody's copy."""


@pytest.fixture(scope="module", params=ENGINES)
def dialect(request: pytest.FixtureRequest) -> Iterator[tuple[str, Run]]:
    """A dialect and what runs it; skips where its engine is missing."""
    try:
        with ENGINES[request.param]() as run:
            yield request.param, run
    except EngineMissing as missing:
        pytest.skip(f"NOT RUN, needs {missing}")


def statements_of(dialect: str) -> list[str]:
    """The blocks of SQL under its heading: table, view, totals."""
    _, _, rest = PAGE.partition(f"\n### {dialect}\n")
    return re.findall(r"```sql\n(.*?)```", rest.partition("\n### ")[0], re.DOTALL)


def a_history(dice: random.Random) -> MemoryLog:
    """A log of usage: copies come soon, just within and just beyond two horizons; clocks step back; some go astray."""
    log = MemoryLog()
    log.now_ms = NOW_MS
    coming: list[tuple[int, Usage]] = []
    for number in range(EVENTS // 2):
        log.now_ms += dice.choice(GAPS_MS)
        request = a_request(
            ["one", "two"][: dice.randrange(1, 3)],
            tenant_id=f"p{dice.randrange(9)}",
            correlation_id=f"r{number}",
            collection=dice.choice(["docs", 'wi"ki, x', "", None]),
            agent_id=dice.choice(["a1", "a2", None]),
        )
        append_ms = log.now_ms
        usage = a_usage(request, charged_at_ms=append_ms - dice.choice(AGES_MS), **some_amounts(dice, number))
        coming.append((append_ms, usage))
        for copy in range(dice.choice((0, 0, 0, 1, 2))):
            append_ms += dice.choice(APART_MS)
            amounts = some_amounts(dice, number * 10 + copy)
            coming.append((append_ms, replace(usage, **amounts, token_type=dice.choice(TOKEN_TYPES))))
    for append_ms, usage in sorted(coming, key=lambda event: event[0]):
        key, value, _ = log.codec.encode(Destination("usage", usage))
        astray = dice.random() < 0.1
        partition = dice.randrange(PARTITIONS) if astray else partition_of(key or b"", PARTITIONS)
        append_ms -= dice.choice((0, 0, 0, 2_000))
        log.append_bytes(TOPICS.usage, partition, value, key=key, append_ms=append_ms)
    log.now_ms = max(log.now_ms, *(append_ms for append_ms, _ in coming))
    return log


def some_amounts(dice: random.Random, number: int) -> dict[str, Any]:
    """What a copy may say otherwise than the one before it."""
    tokens, saved = dice.randrange(1, 90), dice.randrange(2)
    return {
        "billed": Amounts(1, tokens, 6, dice.choice([20 * tokens, None])),
        "saved": Amounts(saved, 7 * saved, 6 * saved, dice.choice([140 * saved, None])),
        "parts": (Part(f"attempt-{number}-{dice.random()}", tokens),),
        "failed_texts": dice.randrange(2),
        "cached_texts": saved,
        "model": dice.choice(["text-embedding-3-small", "text-embedding-3-large"]),
        "operation": dice.choice([Operation.DOCUMENT, Operation.QUERY]),
    }


def row_of(record: Record, usage: Usage) -> dict[str, Any]:
    """As a sink lands it."""
    return {
        "kafka_partition": record.source.partition,
        "kafka_offset": record.source.offset,
        "append_ms": record.source.append_ms,
        "idempotency_key": usage.idempotency_key,
        "token_type": str(usage.token_type),
        "payer_id": usage.payer_id,
        "charged_at_ms": usage.charged_at_ms,
        "model": usage.model,
        "operation": str(usage.operation),
        "agent_id": usage.request.agent_id,
        "collection": usage.request.collection,
        **{f"billed_{name}": amount for name, amount in asdict(usage.billed).items()},
        **{f"saved_{name}": amount for name, amount in asdict(usage.saved).items()},
        "failed_texts": usage.failed_texts,
        "cached_texts": usage.cached_texts,
    }


async def as_landed(log: MemoryLog, dice: random.Random) -> list[dict[str, Any]]:
    """In no order, and some records twice."""
    rows = [row_of(record, usage) for record, usage in await log.contents("usage", Usage)]
    landed = [*rows, *dice.sample(rows, len(rows) // 10)]
    dice.shuffle(landed)
    return landed


def totals_in(rows: Sequence[dict[str, str]]) -> dict[BucketKey, UsageSums]:
    """The answer of a totals query."""
    found = {}
    for row in rows:
        key = BucketKey(*(row.pop(name) for name in BucketKey._fields))
        assert key not in found
        found[key] = UsageSums(**{name: int(amount) for name, amount in row.items()})
    return found


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_sql_of_the_page_gives_the_totals_that_are_published(seed: int, dialect: tuple[str, Run]) -> None:
    """First copies within two horizons, late ones left out, in every bucket and dimension, to the nano-dollar."""
    name, run = dialect
    dice = random.Random(seed)
    log = a_history(dice)
    with a_bench(log) as bench:
        await bench.run(run_length=50)
    published = await log.totals()
    late = await log.contents("late", Usage)
    assert len(late) > 10
    landed = await as_landed(log, dice)
    assert totals_in(run(statements_of(name), landed)) == published

    table, view, _ = statements_of(name)
    by_lateness = run([table, view, "SELECT is_late, count(*) AS charges FROM usage_charges GROUP BY is_late;"], landed)
    counted = {row["is_late"].lower() in {"t", "true", "1"}: int(row["charges"]) for row in by_lateness}
    assert counted[True] == len(late)
    days = [sums.requests for key, sums in published.items() if key.dimension == "all" and len(key.bucket) == 10]
    assert counted[False] == sum(days)


def test_each_dialect_has_a_table_a_view_and_a_query() -> None:
    """What is run is what the page shows, and each names every sum of a total."""
    for name in ENGINES:
        table, view, query = statements_of(name)
        assert table.startswith("CREATE TABLE token_usage")
        assert view.startswith("CREATE VIEW usage_charges")
        for field in asdict(UsageSums()):
            assert f" AS {field}" in query, (name, field)
