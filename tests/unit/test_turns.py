"""How long admitting a run keeps the event loop from everybody else: in bytes of work, not by the clock."""

from __future__ import annotations

import asyncio

import pytest

from processor.agents import BYTES_A_TURN
from processor.pipeline import BYTES_IN_WORK
from tests.support.builders import a_request
from tests.support.steps import Bench


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
