"""A provider that fails now and then, is away for long, refuses one text, or locks a key: nothing is lost or doubled.

Ten minutes without a provider are scaled down by `SCALE`, and with them the times that decide when it is asked again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from processor.domain import CallKind
from processor.identity import request_id
from tests.support.builders import a_request
from tests.support.provider_server import ProviderProcess
from tests.support.stack import until
from tests.support.traffic import hard_requests
from tests.support.world import PATIENT, Begin, faults_met

CHUNKS = 5
FAULTS = ["500", "429", "503", "reset", "reset_billed", "hang", "hang_billed", "truncated_body", "broken_json"]
FAULTS += ["200_error", "wrong_count", "nan", "zero_vector", "wrong_dimension", "wrong_model", "duplicate_index"]
FAULTS += ["shuffled"]
QUICK = {"EMBEDDING_RETRY_INITIAL_S": "0.05", "EMBEDDING_RETRY_MAX_S": "0.5"}

SCALE = 30
OUTAGE_S = 600 / SCALE
SESSION_S = 12
"""Over long before the outage is, if it were not for the heartbeats."""
RETRY_INITIAL_S, RETRY_MAX_S = 0.5 / SCALE, 30 / SCALE
POISON_ATTEMPTS = 5
POISON_RETRY_S = 1.0
NEIGHBOURS_EVERY_S = POISON_RETRY_S / 10
"""So that the provider succeeds for others between two failures of the text that is looked for."""

Tell = Callable[[str], None]


@pytest.mark.faults
async def test_a_fifth_of_the_calls_fails_and_every_chunk_has_one_right_result(begin: Begin, tell: Tell) -> None:
    """Laws 1 to 6 and section 5 per attempt, while calls fail in every way a provider can, at random."""
    requests = hard_requests(4000, chunks=CHUNKS, seed=3)
    started = time.monotonic()
    async with begin(
        "--base-ms", "5", "--per-text-ms", "0.1", EMBEDDING_PROVIDER_TIMEOUT_S="2", **QUICK, **PATIENT
    ) as world:
        probabilities = dict.fromkeys(FAULTS, 0.2 / len(FAULTS))
        world.provider.admin("faults", {"probabilities": probabilities, "retry_after": "0.1", "seed": 7})
        await world.a_worker()
        await world.traffic.send(requests)
        books, residuals, _ = await world.finish_and_audit()
    met = faults_met(books)
    seconds = round(time.monotonic() - started)
    tell(f"a provider that fails: {len(met)} of {len(books.bills)} calls, {asdict(residuals)}, {seconds} s")
    assert len(met) > 0.05 * len(books.bills), "the provider did not fail enough to prove anything"
    assert len(set(met)) > len(FAULTS) / 2, "too few kinds of failure were met"
    assert residuals.rework == residuals.unclaimed == 0


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["503", "reset"])
async def test_ten_minutes_without_a_provider_end_with_one_probe(fault: str, begin: Begin, tell: Tell) -> None:
    """It is asked seldom while it is away; the first call after that succeeds and all flows; the group is kept."""
    scaled = {"EMBEDDING_RETRY_INITIAL_S": str(RETRY_INITIAL_S), "EMBEDDING_RETRY_MAX_S": str(RETRY_MAX_S)}
    async with begin("--base-ms", "20", EMBEDDING_SESSION_TIMEOUT_S=str(SESSION_S), **scaled) as world:
        worker = await world.a_worker()
        await world.traffic.send(hard_requests(500, chunks=CHUNKS))

        async def flows() -> bool:
            return await world.traffic.results() >= CHUNKS * 50

        await until(flows, within_s=60, what="results flow")
        generation = (await worker.report("/health/detailed"))["kafka"]["generation"]
        away_ms = _now_ms()
        world.provider.admin("faults", {"probabilities": {fault: 1.0}})
        await world.traffic.send(hard_requests(500, chunks=CHUNKS, seed=2))
        waits_s = []
        while _now_ms() < away_ms + OUTAGE_S * 1000:
            await asyncio.sleep(0.2)
            health = await worker.report("/health/detailed")
            waits_s += [each["waits_s"] for each in health["provider"]["deployments"].values()]
        world.provider.admin("faults", {})
        back_ms = _now_ms()
        await until(world.traffic.all_committed, within_s=60, what="every request is committed")
        assert (await worker.report("/health/detailed"))["kafka"]["generation"] == generation
        books, _, _ = await world.finish_and_audit()
    asked = [bill for bill in books.bills if bill["at_ms"] >= away_ms and bill["fault"]]
    late = [bill for bill in asked if bill["at_ms"] >= back_ms - OUTAGE_S / 2 * 1000]
    since = [bill for bill in books.bills if bill["at_ms"] > back_ms]
    resumed_s = (since[0]["at_ms"] - back_ms) / 1000
    tell(f"outage ({fault}): asked {len(asked)} times, {len(late)} in its second half; again after {resumed_s:.2f} s")
    assert health["provider"]["paused"] is not None
    assert health["kafka"]["leases_held"]
    assert 0 < max(waits_s) <= RETRY_MAX_S
    assert resumed_s < OUTAGE_S / 2
    # In the mean a probe waits for half of the longest backoff.
    assert len(late) < 2 * (OUTAGE_S / 2) / (RETRY_MAX_S / 2)


@pytest.mark.faults
async def test_a_text_that_always_fails_is_found_among_its_neighbours(begin: Begin, tell: Tell) -> None:
    """It ends as `provider_rejects` after few calls, all other texts get their vectors, and nobody waits for it."""
    poison = a_request(["first", "the poisoned text", "last"], correlation_id="poison", document_id="poison")
    quick = {
        "EMBEDDING_POISON_ATTEMPTS": str(POISON_ATTEMPTS),
        "EMBEDDING_RETRY_INITIAL_S": str(POISON_RETRY_S / 4),
        "EMBEDDING_RETRY_MAX_S": str(POISON_RETRY_S),
    }
    async with begin("--base-ms", "20", call_texts=512, **quick, **PATIENT) as world:
        world.provider.admin("faults", {"poison": {"the poisoned text": "500"}})
        worker = await world.a_worker()
        await world.traffic.send([*hard_requests(500, chunks=CHUNKS, seed=4), poison])
        seeds = itertools.count(5)

        async def found() -> bool:
            await world.traffic.send(hard_requests(4, chunks=CHUNKS, seed=next(seeds)))
            return bool(worker.metric('embedding_texts_total{cache="miss",outcome="provider_rejects"}'))

        await until(found, within_s=120, what="the text is found", every_s=NEIGHBOURS_EVERY_S)
        books, _, _ = await world.finish_and_audit(refused={"the poisoned text": "provider_rejects"})
    tries = [
        [item[:2] for item in call.items]
        for _, call in sorted(books.calls, key=lambda pair: pair[1].at_ms)
        if call.kind is CallKind.INTENT
    ]
    tries = [items for items in tries if (request_id(poison), 1) in items]
    # As often as it may fail with others, by halves until it is alone, and as often alone.
    most = POISON_ATTEMPTS + math.ceil(math.log2(max(map(len, tries)))) + POISON_ATTEMPTS
    tell(f"poison: {len(tries)} calls with it, of {[*map(len, tries)]} texts, at most {most} expected")
    assert len(tries[-1]) == 1
    assert len(tries) <= most
    assert len(faults_met(books)) == len(tries), "a call without the text failed"


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["401", "quota"])
async def test_a_locked_key_is_answered_by_the_second_deployment(
    fault: str, begin: Begin, tmp_path: Path, tell: Tell
) -> None:
    """The same vector space from the next deployment: all results are right, the locked one is only probed."""
    with ProviderProcess("--jitter", "0.01", "--base-ms", "20") as second:
        deployments = tmp_path / "deployments.yaml"
        async with begin("--base-ms", "20", EMBEDDING_DEPLOYMENTS_FILE=str(deployments), **QUICK, **PATIENT) as world:
            deployments.write_text(deployments_of(world.provider, second), encoding="utf-8")
            world.others.append(second)
            await world.a_worker()
            await world.traffic.send(hard_requests(300, chunks=CHUNKS))

            async def flows() -> bool:
                return await world.traffic.results() >= CHUNKS * 50

            await until(flows, within_s=60, what="results flow")
            used_first = len(second.admin("ledger")["requests"])
            locked_ms = _now_ms()
            world.provider.admin("faults", {"probabilities": {fault: 1.0}})
            await world.traffic.send(hard_requests(500, chunks=CHUNKS, seed=5))
            books, residuals, _ = await world.finish_and_audit()
        answered = [bill for bill in second.admin("ledger")["requests"] if bill["billed"]]
    probes = [bill for bill in books.bills if bill["fault"] == fault]
    tell(f"{fault}: {len(probes)} calls of the locked deployment, {len(answered)} of the second ({used_first} before)")
    assert residuals.total == 0
    assert answered
    assert probes
    assert all(bill["at_ms"] >= locked_ms for bill in probes)


def deployments_of(*providers: ProviderProcess) -> str:
    """A deployments file of these servers, the first preferred."""
    return json.dumps(
        [
            {"name": f"server-{number}", "provider": "openai", "base_url": provider.base_url}
            for number, provider in enumerate(providers)
        ]
    )


def _now_ms() -> int:
    return int(time.time() * 1000)
