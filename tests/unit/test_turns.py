"""How long admitting a run keeps the event loop from everybody else: in bytes of work, not by the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from processor.agents import BYTES_A_TURN, LARGE_RECORD_BYTES
from processor.domain import ModelSpec
from processor.emit import PARCELS_A_TURN
from processor.pipeline import BYTES_IN_WORK, TEXTS_A_TURN
from processor.ports import TokenCounts
from tests.support.builders import a_request
from tests.support.steps import Bench, WordCounter


@pytest.mark.parametrize(
    "records, texts, text_characters",
    [(1_000, 1, 10), (50, 1, BYTES_A_TURN // 8), (10, 1, 800_000), (40, 100, 10)],
    ids=["small", "middling", "large", "of many texts"],
)
async def test_admitting_a_run_gives_everybody_else_a_turn(records: int, texts: int, text_characters: int) -> None:
    """After a few hundred texts or as much of larger ones: heartbeats and deliveries go on."""
    most_a_turn = -(-BYTES_A_TURN // (texts * (BYTES_IN_WORK + text_characters)))
    admitted: list[int] = []

    async def watch() -> None:
        while True:
            admitted.append(len(bench.worker._tickets))
            await asyncio.sleep(0)

    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1 << 40
        bench.provider.gate = asyncio.Event()  # nothing is finished meanwhile
        watching = asyncio.create_task(watch())
        await bench.publish(
            *(a_request([f"{i} {j} " + "x" * text_characters for j in range(texts)]) for i in range(records))
        )
        admitted.append(len(bench.worker._tickets))
        watching.cancel()
    assert admitted[-1] == records
    assert max(after - before for before, after in zip([0, *admitted], admitted, strict=False)) <= most_a_turn


async def most_a_turn(work: asyncio.Task[None], count: Callable[[], int]) -> int:
    """By how much a count rises at most between two turns, until the work is done."""
    looks = [count()]
    while not work.done():
        await asyncio.sleep(0)
        looks.append(count())
    await work
    return max(after - before for before, after in pairwise(looks))


async def test_the_texts_of_one_large_request_are_queued_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn in the midst of it; all of them are embedded all the same."""
    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1 << 40
        looked_up: list[bytes] = []
        monkeypatch.setattr(bench.cache, "peek", lambda key, _: looked_up.append(key))
        work = asyncio.create_task(bench.publish(a_request([f"text {i}" for i in range(2048)])))
        assert await most_a_turn(work, lambda: len(looked_up)) <= TEXTS_A_TURN
        assert len(looked_up) == 2048
        async with asyncio.timeout(60):
            while bench.worker._tickets:
                await bench.step()
        assert len(bench.outbox.results) == 2048
        assert bench.lease.finished == [0]


async def test_a_partition_that_is_revoked_while_its_request_is_queued_leaves_nothing() -> None:
    """What is dropped is not queued any further: nobody would ever let go of it."""
    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1 << 40
        bench.provider.gate = asyncio.Event()
        work = asyncio.create_task(bench.publish(a_request([f"text {i}" for i in range(2048)])))
        while not bench.worker.queued_texts:
            await asyncio.sleep(0)
        assert not work.done()
        revoking = asyncio.create_task(bench.worker.on_revoke([bench.lease], budget_s=5.0))
        await work
        while not revoking.done():
            await bench.step()
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert (bench.worker.queued_texts, bench.worker.held_bytes) == (0, 0)
        assert (bench.outbox.results, bench.outbox.usage, bench.lease.finished) == ([], [], [])


async def test_others_have_a_turn_between_decoding_a_large_record_and_admitting_it() -> None:
    """If its partition is revoked just then it is not admitted: it will be delivered again."""
    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1 << 40
        run = asyncio.create_task(bench.publish(a_request(["x" * LARGE_RECORD_BYTES])))
        await asyncio.sleep(0)
        await bench.worker.on_revoke([bench.lease], budget_s=1.0)
        await run
        assert bench.worker._tickets == set()


async def test_a_large_validation_is_counted_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of 900 KB are not counted in one piece."""
    counted: list[str] = []

    class Counting(WordCounter):
        def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
            counted.extend(texts)
            return super().count(texts, model)

    async with Bench() as bench:
        monkeypatch.setattr(bench.worker.pipeline.ports.counter, "count", Counting().count)
        bench.worker._read_ahead_bytes = 1 << 40

        async def validate() -> None:
            await bench.publish(a_request([f"text {i}" for i in range(2048)], action="validate"))
            await bench.run_until_idle()

        assert await most_a_turn(asyncio.create_task(validate()), lambda: len(counted)) <= PARCELS_A_TURN
        assert len(counted) == len(bench.outbox.results) == 2048
