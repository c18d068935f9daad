"""The eight steps on fakes: partitions taken away, leases, read-ahead, a broker or registry that is away."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest

from processor.domain import (
    Record,
    Request,
)
from processor.errors import (
    ProviderTransient,
    RegistryUnavailable,
)
from processor.ports import Destination, Undecodable
from processor.work import Job
from tests.support.builders import NOW_MS, a_request, some_chunks
from tests.support.steps import Bench, FakeLease


async def test_a_revoked_partition_sends_nothing_more() -> None:
    """Law 8: after `on_revoke` returns, work that was in flight is dropped and its offset never finished."""
    async with Bench() as bench:
        bench.provider.gate = asyncio.Event()
        other = FakeLease(partition=1)
        await bench.publish(a_request(["mine"]))
        await bench.publish(a_request(["kept"], correlation_id="c2"), lease=other)
        await bench.step()
        revoking = asyncio.ensure_future(bench.worker.on_revoke([bench.lease], budget_s=5.0))
        while not revoking.done():
            await bench.step()
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert [r.request.correlation_id for r in bench.outbox.results] == ["c2"]
        assert bench.lease.finished == []
        assert other.finished == [0]
        assert bench.worker.held_bytes == 0


async def test_revocation_lets_a_call_in_flight_end_within_its_budget() -> None:
    """What is paid for and nearly done is delivered before the partition is given up."""
    async with Bench() as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["mine"]))
        await bench.step()
        revoking = asyncio.ensure_future(bench.worker.on_revoke([bench.lease], budget_s=5.0))
        await bench.settle()
        bench.provider.gate.set()
        await bench.settle()
        await bench.step()
        await revoking
        assert bench.lease.finished == [0]


@pytest.mark.parametrize("action", ["document_manifest", "delete"])
async def test_revocation_does_not_wait_for_what_it_has_dropped(action: str) -> None:
    """A manifest or delete behind a queued chunk of its document is dropped with it, not waited for."""
    async with Bench(max_concurrent_calls=1, window_max_texts=1) as bench:
        bench.provider.gate = asyncio.Event()
        for i in range(4):
            await bench.publish(a_request([f"text {i}"], correlation_id=f"c{i}", document_id="before"))
            await bench.step()
        await bench.publish(
            a_request(["queued"], correlation_id="queued"),
            a_request(action=action, chunk_ids=("c0",), vector_spaces=("s",), correlation_id="behind"),
        )
        await bench.step()
        bench.provider.gate.set()
        began_s = bench.clock.now_s
        revoking = asyncio.ensure_future(bench.worker.on_revoke([bench.lease], budget_s=10.0))
        while not revoking.done():
            await bench.step()
        assert bench.clock.now_s - began_s < 1
        assert 0 in bench.lease.finished
        assert bench.outbox.manifests == []


async def test_a_revocation_that_is_cut_short_lets_go_all_the_same() -> None:
    """An engine that cancels `on_revoke` for its time finds the read-ahead free again."""
    async with Bench() as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["mine"]))
        await bench.step()
        revoking = asyncio.ensure_future(bench.worker.on_revoke([bench.lease], budget_s=5.0))
        await bench.settle()
        revoking.cancel()
        await bench.settle()
        assert bench.worker.held_bytes == 0


async def test_nothing_of_a_revoked_partition_stays_in_memory() -> None:
    """However often partitions come and go while the provider is out, and though no circle is ever looked for."""

    async def come_and_go(generation: int) -> int:
        lease = FakeLease(partition=1, generation=generation)
        texts = ["stuck", "queued", "also wanted"]
        await bench.publish(*(a_request([text], correlation_id=text) for text in texts), lease=lease)
        revoking = asyncio.ensure_future(bench.worker.on_revoke([lease], budget_s=1.0))
        while not revoking.done():
            await bench.step()
        return sum(isinstance(each, Job) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        async with Bench(max_concurrent_calls=1) as bench:
            bench.provider.gate = asyncio.Event()
            for text in ("stuck", "stuck too"):
                await bench.publish(a_request([text], correlation_id=f"mine {text}"))
                await bench.step()
            await bench.publish(a_request(["also wanted"], correlation_id="mine"))
            jobs = [await come_and_go(generation) for generation in range(3)]
            assert jobs == [jobs[0]] * 3
            assert bench.worker.queued_texts == 2, "what waits for a window, and for a call"
            bench.provider.gate.set()
            await bench.run_until_idle()
            assert bench.lease.finished == [0, 1, 2]
            assert sorted(map(sorted, bench.provider.asked)) == [["also wanted", "stuck too"], ["stuck"]]
    finally:
        gc.enable()


async def test_a_run_that_arrives_while_its_partition_is_revoked_is_left_alone() -> None:
    """Nothing is admitted for a lease that is being given up: it will be delivered again."""
    async with Bench() as bench:
        await bench.worker.on_revoke([bench.lease], budget_s=1.0)
        await bench.publish(a_request(["text"]))
        await bench.run_until_idle()
        assert bench.outbox.sent == []
        assert bench.worker.held_bytes == 0


class Registry:
    """A decoder that can't reach its registry until it is told to; the schemas of the offsets it `knows` it has."""

    def __init__(self, bench: Bench) -> None:
        self.decoder = bench.codec
        self.reachable = asyncio.Event()
        self.knows: set[int] = set()

    def decode_now(self, record: Record) -> Request | Undecodable | None:
        return self.decoder.decode_now(record) if record.source.offset in self.knows else None

    async def decode(self, record: Record) -> Request | Undecodable:
        if not self.reachable.is_set():
            raise RegistryUnavailable("no answer")
        return await self.decoder.decode(record)


async def test_a_registry_out_of_reach_is_waited_for() -> None:
    """An outage while a record is decoded ends no process, says that work waits, and loses nothing."""
    async with Bench() as bench:
        registry = Registry(bench)
        bench.worker.pipeline.ports = replace(bench.worker.pipeline.ports, decoder=registry)
        taking = asyncio.ensure_future(bench.publish(a_request(["text"])))
        for _ in range(10):
            await bench.step()
        assert not taking.done()
        assert bench.worker.waiting()
        registry.reachable.set()
        while not taking.done():
            await bench.step()
        await bench.run_until_idle()
        assert bench.lease.finished == [0]
        assert not bench.worker.waiting()


async def test_what_was_admitted_does_not_wait_for_the_registry() -> None:
    """A record whose schema can't be fetched holds up what comes after it, not what came before it."""
    async with Bench() as bench:
        registry = Registry(bench)
        registry.knows = {0, 1}
        bench.worker.pipeline.ports = replace(bench.worker.pipeline.ports, decoder=registry)
        taking = asyncio.ensure_future(
            bench.publish(a_request(["text"]), b"\1", a_request(["text"], correlation_id="later"))
        )
        for _ in range(10):
            await bench.step()
        assert sorted(bench.lease.finished) == [0, 1]
        registry.reachable.set()
        while not taking.done():
            await bench.step()
        await bench.run_until_idle()
        assert sorted(bench.lease.finished) == [0, 1, 2]


async def test_a_broker_that_takes_nothing_is_waited_for() -> None:
    """An end of the process while a result waits for the broker counts against no record."""
    async with Bench() as bench:
        acknowledged = asyncio.Event()
        bench.outbox.on_send = lambda messages: _until(acknowledged)
        await bench.publish(a_request(["text"]))
        await bench.step()
        assert bench.worker.waiting()
        acknowledged.set()
        await bench.run_until_idle()
        assert not bench.worker.waiting()


async def test_what_is_decoded_after_its_revocation_takes_no_room() -> None:
    """A record whose partition goes while it is decoded is neither sent nor held: the read-ahead is free again."""
    async with Bench() as bench:
        registry = Registry(bench)
        bench.worker.pipeline.ports = replace(bench.worker.pipeline.ports, decoder=registry)
        taking = asyncio.ensure_future(bench.publish(a_request(["text"]), a_request(["more"], correlation_id="c2")))
        await bench.settle()
        await bench.worker.on_revoke([bench.lease], budget_s=1.0)
        registry.reachable.set()
        while not taking.done():
            await bench.step()
        await bench.run_until_idle()
        assert bench.worker.held_bytes == 0
        assert bench.outbox.sent == []


async def test_a_late_heartbeat_delays_sending_and_loses_nothing() -> None:
    """A lease that is not held for a while is waited for; dropping its work would leave a hole in the watermark."""
    async with Bench() as bench:
        bench.lease.late = True
        await bench.publish(a_request(["text"]))
        for _ in range(20):
            await bench.step()
        assert bench.outbox.results == []
        bench.lease.late = False
        await bench.run_until_idle()
        assert bench.lease.finished == [0]


async def test_read_ahead_is_bounded_in_bytes() -> None:
    """A full read-ahead holds the next run back until work is finished."""
    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 1
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["first"]))
        second = asyncio.ensure_future(bench.publish(a_request(["second"], correlation_id="c2")))
        await bench.step()
        assert not second.done()
        bench.provider.gate.set()
        await bench.run_until_idle()
        await second
        await bench.run_until_idle()
        assert sorted(bench.lease.finished) == [0, 1]


@pytest.mark.parametrize(
    "tiny",
    [
        a_request(["x"] * 1000),
        a_request(action="validate", chunks=some_chunks(["x"] * 1000)),
        a_request(action="delete", chunks=(), chunk_ids=tuple("abcdefghij"), vector_spaces=tuple(map(str, range(32)))),
    ],
    ids=["texts", "validations", "tombstones"],
)
async def test_many_tiny_chunks_fill_the_read_ahead_too(tiny: Request) -> None:
    """What a record becomes while it is worked on counts, not its bytes alone; within a run as well."""
    async with Bench() as bench:
        bench.worker._read_ahead_bytes = 300_000
        bench.provider.gate = asyncio.Event()
        waiting = asyncio.Event()
        bench.outbox.on_send = lambda messages: _until(waiting)
        requests = [replace(tiny, correlation_id=f"c{i}") for i in range(5)]
        taking = asyncio.ensure_future(bench.publish(*requests))
        await bench.settle()
        assert not taking.done()
        assert len(bench.worker._tickets) == 1
        bench.provider.gate.set()
        waiting.set()
        while not taking.done():
            await bench.step()
        await bench.run_until_idle()
        assert sorted(bench.lease.finished) == [0, 1, 2, 3, 4]
        assert bench.worker.held_bytes == 0


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def test_a_broken_broker_ends_the_process_and_finishes_nothing() -> None:
    """Broken infrastructure is an exception that reaches `fail`; the offset stays uncommitted."""

    async def refuse(messages: Sequence[Destination]) -> None:
        if any(message.name == "results" for message in messages):
            raise ConnectionError("gone")

    bench = Bench()
    bench.outbox.on_send = refuse
    bench.worker.start()
    await bench.publish(a_request(["text"]))
    for _ in range(5):
        await bench.step()
    await bench.worker.stop()
    assert [type(failure) for failure in bench.failures] == [ConnectionError]
    assert bench.lease.finished == []


async def test_a_text_past_its_deadline_is_answered_though_its_fellow_is_revoked() -> None:
    """A fold ends for the work whose deadline has passed even when the one that it was called for goes elsewhere."""
    async with Bench(max_concurrent_calls=1, window_max_wait_s=0.0) as bench:
        other = FakeLease(partition=1)
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["busy"], correlation_id="busy"))
        await bench.settle()
        await bench.publish(a_request(["x"], correlation_id="late", deadline_ms=NOW_MS + 500))
        bench.clock.now_s = 1.0
        await bench.publish(a_request(["x"], correlation_id="other"), lease=other)
        bench.provider.script = [lambda answer: answer, ProviderTransient("server_error", http_status=500)]
        await bench.settle()
        bench.provider.gate.set()
        await bench.settle()
        await bench.worker.on_revoke([other], budget_s=0.0)
        await bench.run_until_idle()
        assert bench.provider.asked == [["busy"], ["x"]]
        assert [r.error.code for r in bench.outbox.results if r.error] == ["deadline_exceeded"]
        assert bench.lease.finished == [0, 1]
        assert other.finished == []


async def test_a_run_of_a_revoked_partition_announces_nothing() -> None:
    """What its log still holds comes to somebody else: no call waits for it."""
    async with Bench(window_max_wait_s=0.0) as bench:
        bench.lease.revoked = True
        await bench.publish(a_request(["gone"]), behind=100)
        await bench.publish(a_request(["here"]), lease=FakeLease(partition=1))
        await bench.settle()
        assert bench.provider.asked == [["here"]]
