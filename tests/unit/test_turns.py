"""How long admitting a run keeps the event loop from everybody else: in records and bytes, not by the clock."""

from __future__ import annotations

import asyncio

import pytest

from processor.agents import BYTES_A_TURN, RECORDS_A_TURN
from tests.support.builders import a_request
from tests.support.steps import Bench


@pytest.mark.parametrize(
    "records, text_characters, most_a_turn",
    [(10 * RECORDS_A_TURN, 10, RECORDS_A_TURN), (50, BYTES_A_TURN // 8, 8), (10, 2 * BYTES_A_TURN, 1)],
    ids=["small", "middling", "large"],
)
async def test_admitting_a_run_gives_everybody_else_a_turn(
    records: int, text_characters: int, most_a_turn: int
) -> None:
    """After so many small records, or so many bytes, whichever is first: heartbeats and deliveries go on."""
    admitted: list[int] = []

    async def watch() -> None:
        while True:
            admitted.append(len(bench.worker._tickets))
            await asyncio.sleep(0)

    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1 << 40
        bench.provider.gate = asyncio.Event()  # nothing is finished meanwhile
        watching = asyncio.create_task(watch())
        await bench.publish(*(a_request([f"{i} " + "x" * text_characters]) for i in range(records)))
        admitted.append(len(bench.worker._tickets))
        watching.cancel()
    assert admitted[-1] == records
    assert max(after - before for before, after in zip([0, *admitted], admitted, strict=False)) <= most_a_turn
