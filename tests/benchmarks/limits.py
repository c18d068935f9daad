"""How much of a provider's limits is used, and how often they are met, on a backlog that is more than they allow.

600 requests and 1,000,000 tokens a minute, as the provider of these tests holds them: buckets of a minute's worth that
refill all the time, x-ratelimit headers, 429 with Retry-After. Time is scaled: a minute lasts `minute_s` seconds, and
what headers and settings call a minute's limit is that much larger. A call holds at most a twentieth of its worker's
part of the limit (50,000 tokens, 12,500 of four workers), one text in 200 is about 7,000 tokens long. Three scenarios:
one worker; one whose limit drops to a third in the middle; four workers of one account, with Redis. The figures of the
first stand under their names, those of the others with `_drop` and `_shared4`; `means` says what each is.
Left out: limits by requests, several lanes. Environment: BENCH_LIMITS_MINUTE_S, BENCH_LIMITS_MINUTES.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from processor.adapters.embedded import EmbeddedCache
from processor.domain import CallKind, ProviderCall, ReceivedResult
from processor.identity import request_id
from tests.support import audit
from tests.support.brokers import Broker
from tests.support.load import Course, Say, ingestion, some_texts, surroundings
from tests.support.provider_server import ProviderProcess
from tests.support.stack import until

REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE = 600, 1_000_000
CALL_TOKENS = TOKENS_PER_MINUTE // 20
MINUTE_S = float(os.environ.get("BENCH_LIMITS_MINUTE_S", "8"))
MINUTES = float(os.environ.get("BENCH_LIMITS_MINUTES", "4"))
SCALE = 60 / MINUTE_S
DROP_AT_MINUTES = 2.0
DROP_TO = 1 / 3
PARTITIONS = 8
DIMENSIONS = 8
TOKENS_A_TEXT = 105
LONG_EVERY = 200
LONG_TOKENS = 7_000
LONG_WORDS = "a long text has as many tokens as words and wants more of the limit than others do"

MEANS = {
    "limit_use": "tokens let in / tokens allowed, from the end of the warm-up (a minute after the last worker's first "
    "call) until 95% of the work is done; the drop lies within",
    "throttled": "calls refused by 429",
    "calls": "calls that the provider saw, refused or not",
    "lost": "chunks without a vector",
    "burst": "calls' worth (a twentieth of the limit) that was ever let in ahead of the rate, since the first "
    "worker began its first call",
    "long_early": "part of the long texts that was let in with the first half of all tokens: starving ones come last",
    "call_tokens": "mean tokens of a call that was let in",
    "measured_minutes": "length of what limit_use is of, in the provider's minutes",
    "tokens_by_worker": "let in, of each worker",
}

LIMIT_USE = 0.95
THROTTLED, THROTTLED_SHARE = 3, 0.01
BURST = 2.0
LONG_EARLY = 0.4

CATALOGUE = """
models:
  text-embedding-3-small: {{max_tokens_per_call: {tokens}, call_estimator: tokens}}
"""


async def run(say: Say) -> dict[str, Any]:
    """The figures of each scenario under its name, and `bars` with whether each is met."""
    options = [
        *("--base-ms", str(1000 * MINUTE_S / 60), "--per-text-ms", "0.1", "--time-scale", str(SCALE)),
        *("--requests-per-minute", str(REQUESTS_PER_MINUTE), "--tokens-per-minute", str(TOKENS_PER_MINUTE)),
    ]
    figures: dict[str, Any] = {}
    with surroundings(say, *options) as (broker, provider, folder):
        figures |= {
            "broker": broker.kind,
            "minute_s": MINUTE_S,
            "requests_per_minute": REQUESTS_PER_MINUTE,
            "tokens_per_minute": TOKENS_PER_MINUTE,
            "call_tokens": CALL_TOKENS,
        }
        for scenario, workers, minutes in (
            ("", 1, MINUTES),
            ("_drop", 1, DROP_AT_MINUTES + (MINUTES - DROP_AT_MINUTES) * DROP_TO),
            ("_shared4", 4, MINUTES),
        ):
            measured = await measure(broker, provider, folder, minutes, workers=workers, drops=scenario == "_drop")
            say(f"{scenario.strip('_') or 'single'}: {measured}")
            figures |= {f"{name}{scenario}": value for name, value in measured.items()}
    return figures | {"means": MEANS, "bars": bars(figures)}


def limits(part: float) -> dict[str, float]:
    return {
        "requests_per_minute": REQUESTS_PER_MINUTE * part,
        "tokens_per_minute": TOKENS_PER_MINUTE * part,
        "time_scale": SCALE,
    }


async def measure(
    broker: Broker, provider: ProviderProcess, folder: Path, minutes: float, *, workers: int, drops: bool
) -> dict[str, Any]:
    """One scenario, on a backlog of so many minutes' tokens of the full limit."""
    per_text = TOKENS_A_TEXT + LONG_TOKENS / LONG_EVERY
    texts = some_texts(int(minutes * TOKENS_PER_MINUTE / per_text))
    for i in range(0, len(texts), LONG_EVERY):
        words = LONG_WORDS.split()
        texts[i] = f"{i} " + " ".join(words[j % len(words)] for j in range(LONG_TOKENS))
    requests = list(ingestion(texts, DIMENSIONS))
    missing = {(request_id(request), index) for request in requests for index in range(len(request.chunks))}
    catalogue = folder / "catalogue.yaml"
    catalogue.write_text(CATALOGUE.format(tokens=CALL_TOKENS // workers), encoding="utf-8")
    async with Course(
        broker, provider, folder, dimensions=DIMENSIONS, partitions=PARTITIONS, results_config={}
    ) as course:
        await course.append(requests)
        provider.admin("reset", {})
        provider.admin("limits", limits(1.0))
        with EmbeddedCache() if workers > 1 else nullcontext() as redis:
            environment = {
                "EMBEDDING_CATALOGUE_FILE": str(catalogue),
                "EMBEDDING_REQUESTS_PER_MINUTE": str(round(REQUESTS_PER_MINUTE * SCALE)),
                "EMBEDDING_TOKENS_PER_MINUTE": str(round(TOKENS_PER_MINUTE * SCALE)),
                "EMBEDDING_INTERACTIVE_SHARE_PERCENT": "0",
                "EMBEDDING_LIMIT_SHARERS": str(workers),
                **({"EMBEDDING_REDIS_URL": redis.url} if redis is not None else {}),
            }
            with course.stack(**environment) as stack:
                children = [stack.spawn("worker") for _ in range(workers)]

                async def done() -> bool:
                    for child in children:
                        child.check()
                    if await course.end(course.results) < len(texts):
                        return False
                    async for _, result in audit.read_topic(course.settings, "results", ReceivedResult):
                        if result.vector is not None:
                            missing.discard((result.request_id, result.chunk_index))
                    return not missing

                dropped_ms = await drop(provider) if drops else None
                await until(done, within_s=60 + 3 * minutes * MINUTE_S, what="every result is there", every_s=0.2)
                for child in children:
                    assert child.stop() == 0, child.tail()
        bills = provider.admin("ledger")["requests"]
        calls = [call async for _, call in audit.read_topic(course.settings, "calls", ProviderCall)]
    return use(bills, calls, dropped_ms) | {"lost": len(missing)}


async def drop(provider: ProviderProcess) -> float:
    """A third of the limits, some minutes after the first call. When that was, UTC milliseconds since 1970."""

    async def begun() -> bool:
        return bool(provider.admin("ledger")["requests"])

    await until(begun, within_s=60, what="the first call")
    began_ms: float = provider.admin("ledger")["requests"][0]["at_ms"]
    await asyncio.sleep(began_ms / 1000 + DROP_AT_MINUTES * MINUTE_S - time.time())
    provider.admin("limits", limits(DROP_TO))
    return time.time() * 1000


def use(bills: Sequence[Mapping[str, Any]], calls: Sequence[ProviderCall], dropped_ms: float | None) -> dict[str, Any]:
    """What the provider's books show."""
    per_ms = TOKENS_PER_MINUTE / MINUTE_S / 1000
    bills = sorted(bills, key=lambda bill: bill["at_ms"])
    let_in = [bill for bill in bills if bill["status"] != 429]
    intents = {call.attempt_id: call for call in calls if call.kind is CallKind.INTENT}
    began_ms = min(call.at_ms for call in intents.values())

    def allowed(since_ms: float, until_ms: float) -> float:
        full_ms = max(0.0, min(until_ms, dropped_ms or until_ms) - since_ms)
        return (full_ms + (until_ms - since_ms - full_ms) * DROP_TO) * per_ms

    total, so_far, ahead, end_ms = sum(bill["tokens"] for bill in let_in), 0, 0.0, began_ms
    first_ms: dict[str, float] = {}
    of_worker: Counter[str] = Counter()
    long, long_early = 0, 0
    for bill in let_in:
        intent = intents[bill["attempt_id"]]
        first_ms.setdefault(intent.worker_id, bill["at_ms"])
        of_worker[intent.worker_id] += bill["tokens"]
        long_in_call = sum(item.local_tokens > LONG_TOKENS / 2 for item in intent.items)
        long += long_in_call
        long_early += long_in_call if so_far < total / 2 else 0
        so_far += bill["tokens"]
        ahead = max(ahead, so_far - allowed(began_ms, bill["at_ms"]))
        if so_far <= 0.95 * total:
            end_ms = bill["at_ms"]
    warm_ms = max(first_ms.values()) + MINUTE_S * 1000
    window = [bill for bill in let_in if bill["at_ms"] >= warm_ms]
    since_ms = window[0]["at_ms"]
    used = sum(bill["tokens"] for bill in window if bill["at_ms"] < end_ms)
    return {
        "limit_use": round(used / allowed(since_ms, end_ms), 3),
        "throttled": sum(bill["status"] == 429 for bill in bills),
        "calls": len(bills),
        "long_early": round(long_early / long, 2),
        "call_tokens": round(total / len(let_in)),
        "burst": round(ahead / CALL_TOKENS, 2),
        "measured_minutes": round((end_ms - since_ms) / 1000 / MINUTE_S, 2),
        "tokens_by_worker": sorted(of_worker.values()),
    }


def bars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar with what was measured and whether it is met."""
    judged: dict[str, Any] = {}
    for scenario in ("", "_drop", "_shared4"):
        throttled = max(THROTTLED, THROTTLED_SHARE * figures[f"calls{scenario}"])
        for name, least, most in (
            ("limit_use", LIMIT_USE, None),
            ("throttled", None, throttled),
            ("lost", None, 0),
            ("burst", None, BURST),
            ("long_early", LONG_EARLY, None),
        ):
            value = figures[f"{name}{scenario}"]
            met = value >= least if least is not None else value <= (most or 0)
            bar = f">= {least}" if least is not None else f"<= {most:g}"
            judged[f"{name}{scenario}"] = {"measured": value, "bar": bar, "met": "yes" if met else "no"}
    return judged
