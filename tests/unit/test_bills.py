"""The benchmark of money judges by a recount: it agrees with the aggregator, and finds what is counted twice or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any, cast

from fastavro import schemaless_reader

from processor.accounts import BucketKey, UsageSums
from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current
from tests.support.aggregation import TOPIC_OF, TOPICS, MemoryLog, a_bench
from tests.support.bills import COPIED, LATE, Comparison, Recount, some_bills

EVENTS = 1_500


def fields_of(value: bytes | None) -> Mapping[str, Any]:
    stream = BytesIO(value or b"")
    stream.seek(SINGLE_OBJECT_HEADER_BYTES)
    return cast(Mapping[str, Any], schemaless_reader(stream, current("TokenUsage").parsed, None))


def a_log() -> tuple[MemoryLog, Recount]:
    """Some bills in a log in memory, and their recount."""
    log, recount = MemoryLog(), Recount()
    for topic, partition, key, value in some_bills(EVENTS, partitions=2, now_ms=log.now_ms):
        log.append_bytes(TOPIC_OF[topic], partition, value, key=key)
    for record in log.all_of(TOPICS.usage):
        recount.take(record.source.partition, record.source.append_ms, fields_of(record.value))
    return log, recount


async def test_a_recount_agrees_with_the_aggregator() -> None:
    """Two programs that share nothing but the rule make the same totals of the same log; nothing is over-attributed."""
    log, recount = a_log()
    with a_bench(log) as bench:
        ledger = await bench.run(run_length=700)
        assert recount.compare(await log.totals()) == Comparison(0, 0, 0)
        assert len(log.all_of(TOPIC_OF["late"])) == recount.late
        assert bench.counts["usage_events", "duplicate"] > 0.8 * COPIED * EVENTS
    assert recount.late > 0.5 * LATE * EVENTS
    assert ledger is not None
    assert (ledger.sums.over_attributed_tokens, ledger.sums.unmatched_tokens) == (0, 0)
    assert ledger.sums.uncharged_tokens > 0


def test_a_recount_finds_what_was_counted_twice_or_not_at_all() -> None:
    """A request too many and one too few in months of all, and a token too many anywhere, are each told."""
    _, recount = a_log()
    totals: dict[BucketKey, UsageSums] = {key: UsageSums(**sums) for key, sums in recount.totals.items()}
    months = [key for key in totals if key.dimension == "all" and len(key.bucket) == len("2026-11")]
    (more, less), another = months[:2], next(key for key in totals if key.dimension == "model")
    assert recount.compare(totals) == Comparison(0, 0, 0)
    totals[more] = replace(totals[more], requests=totals[more].requests + 2)
    totals[less] = replace(totals[less], requests=totals[less].requests - 1)
    totals[another] = replace(totals[another], billed_tokens=totals[another].billed_tokens + 1)
    assert recount.compare(totals) == Comparison(2, 1, 3)
    gone = totals.pop(months[2]).requests
    assert recount.compare(totals) == Comparison(2, 1 + gone, 4)
