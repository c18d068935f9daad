"""When calls are made, of what, and to whom: the worker's dispatcher on fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace

import pytest

from processor.agents import FILL_WAIT_S
from processor.domain import CallKind, CallOutcome, Lane, ModelSpec, Status
from processor.errors import CallTooLarge, InputRejected, ProviderPaused
from processor.ports import Destination, TokenCounts
from tests.support.builders import a_request
from tests.support.steps import Bench, BillingProvider, MemoryOutbox, WordCounter


async def test_a_call_waits_to_be_full_only_while_more_is_to_come() -> None:
    """Under backlog a call goes out when it is full; without, when its window is due."""
    async with Bench(window_max_wait_s=0.05) as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request([f"a{i}" for i in range(5)]), behind=100)
        await bench.step()  # its window closes
        assert bench.clock.now_s < FILL_WAIT_S
        assert bench.provider.asked == []
        await bench.publish(a_request([f"b{i}" for i in range(5)], correlation_id="b"), behind=50)
        await bench.step()
        assert [len(texts) for texts in bench.provider.asked] == [8]
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert [len(texts) for texts in bench.provider.asked] == [8, 2]
        assert bench.clock.now_s <= 2 * FILL_WAIT_S, "what never comes is waited for with an end"
        before_s = bench.clock.now_s
        await bench.handle(a_request(["alone"], correlation_id="c"))
        assert bench.clock.now_s - before_s < 0.06


async def test_the_end_of_a_transaction_is_not_waited_for() -> None:
    """The last offset of a log may hold no record: a call doesn't wait for what it takes to be one."""
    async with Bench(window_max_wait_s=0.0) as bench:
        await bench.publish(a_request(["last"]), behind=1)
        await bench.settle()
        assert bench.provider.asked == [["last"]]


async def test_the_interactive_lane_never_waits() -> None:
    """A query goes out at once, whatever else is known to come."""
    async with Bench(lane=Lane.INTERACTIVE, window_max_wait_s=0.0) as bench:
        await bench.publish(a_request(["query"], action="generate_query"), behind=100)
        await bench.settle()
        assert len(bench.provider.asked) == 1
        assert bench.clock.now_s == 0


async def test_what_comes_while_every_slot_is_taken_shares_the_next_call() -> None:
    """Texts of many requests go out together once a call can start: they make it fuller, not more of them."""
    async with Bench(max_concurrent_calls=1, window_max_wait_s=0.0) as bench:
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["first"]))
        await bench.settle()
        for i in range(8):
            await bench.publish(a_request([f"t{i}"], correlation_id=f"c{i}"))
            await bench.settle()
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert [len(texts) for texts in bench.provider.asked] == [1, 8]


async def test_a_call_that_hangs_holds_back_nobody_else() -> None:
    """Hits and other calls of the same window are delivered while one call gets no answer."""
    async with Bench(window_max_wait_s=0.0) as bench:
        await bench.handle(a_request(["known"], correlation_id="before"))
        hanging = asyncio.Event()
        answer = bench.provider.embed

        async def embed(texts, function, attempt_id):  # type: ignore[no-untyped-def]
            if "hangs" in texts:
                await hanging.wait()
            return await answer(texts, function, attempt_id)

        bench.provider.embed = embed  # type: ignore[method-assign]
        await bench.publish(a_request(["known", "hangs", *(f"t{i} w w w w" for i in range(8))], document_id=None))
        for _ in range(5):
            await bench.step()
        done = {result.chunk_index for result in bench.outbox.results if result.request.correlation_id != "before"}
        assert 0 in done
        assert 1 not in done
        assert len(done) > 1
        hanging.set()
        await bench.run_until_idle()


async def seconds_until_asked(bench: Bench, *, calls: int) -> float:
    began_s = bench.clock.now_s
    while len(bench.provider.asked) < calls:
        assert bench.clock.now_s - began_s < 10, "what never comes is waited for with an end"
        await bench.step()
    return bench.clock.now_s - began_s


async def test_a_full_read_ahead_waits_for_room_while_calls_are_in_flight() -> None:
    """Where the read-ahead can't hold another full call, calls in flight are waited for, and with an end."""
    async with Bench(max_concurrent_calls=4) as bench:
        await bench.handle(a_request(["warm"], correlation_id="warm"))
        bench.gate.call_seconds = 2.0
        bench.provider.gate = asyncio.Event()
        bench.worker._read_ahead_bytes = 1
        await bench.publish(a_request([f"a{i}" for i in range(8)], correlation_id="a"))
        blocked = asyncio.ensure_future(bench.publish(a_request([f"b{i}" for i in range(3)], correlation_id="b")))
        bench.worker._read_ahead_bytes = 1 << 30
        bench.worker._room.set()
        await bench.settle()
        bench.worker._read_ahead_bytes = 1
        more = asyncio.ensure_future(bench.publish(a_request(["c"], correlation_id="c")))
        assert await seconds_until_asked(bench, calls=3) >= 2.0
        assert len(bench.provider.asked[-1]) == 3
        bench.provider.gate.set()
        await bench.run_until_idle()
        await asyncio.gather(blocked, more)
        await bench.run_until_idle()


async def test_what_is_known_to_come_is_waited_for_while_calls_are_in_flight() -> None:
    """Room in the read-ahead that comes back a moment later is no reason for a call that is not full."""
    async with Bench(max_concurrent_calls=4) as bench:
        await bench.handle(a_request(["warm"], correlation_id="warm"))
        bench.gate.call_seconds = 2.0
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request([f"a{i}" for i in range(11)], correlation_id="a"), behind=100)
        assert await seconds_until_asked(bench, calls=3) >= 4.0
        assert [len(texts) for texts in bench.provider.asked] == [1, 8, 3]
        bench.provider.gate.set()
        await bench.run_until_idle()


@pytest.mark.parametrize("small", [0, 5])
async def test_a_small_tenant_waits_for_a_call_before_a_large_one_is_measured(small: int) -> None:
    """In a window of several tenants what is measured may go out; a tenant alone is measured as a whole."""
    waiting: list[int] = []

    class Counter(WordCounter):
        def count(self, texts: Sequence[str], model: ModelSpec) -> TokenCounts:
            waiting.append(len(bench.worker.pipeline.packer))
            return super().count(texts, model)

    async with Bench(max_concurrent_calls=1) as bench:
        bench.worker.pipeline.ports = replace(bench.worker.pipeline.ports, counter=Counter())
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["busy"], correlation_id="busy"))
        await bench.step()
        await bench.publish(
            a_request([f"l{i}" for i in range(200)], tenant_id="large"),
            *([a_request([f"s{i}" for i in range(small)], tenant_id="small")] if small else []),
        )
        await bench.step()
        assert len(bench.worker.pipeline.packer) == 200 + small
        assert (max(waiting) > small) == (small > 0)
        bench.provider.gate.set()
        await bench.run_until_idle()


async def test_a_paused_deployment_is_passed_over_for_the_next_of_its_space() -> None:
    """Failover: the work goes on elsewhere, the ledger says where, and the first is used again once a probe gets by."""
    spare = BillingProvider()
    async with Bench(spare=spare) as bench:
        bench.provider.refuses = lambda texts: ProviderPaused("quota_exhausted", http_status=429)
        await bench.handle(*(a_request([f"t{i}"], correlation_id=f"c{i}") for i in range(4)))
        assert [result.status for result in bench.outbox.results] == [Status.OK] * 4
        assert bench.route.paused is None
        assert not bench.worker.waiting()
        receipts = [call for call in bench.outbox.calls if call.kind is CallKind.RECEIPT]
        ends = [(receipt.provider, receipt.outcome) for receipt in receipts]
        assert ends[0] == (bench.provider.name, CallOutcome.FAILED)
        assert ends[-1] == ("spare", CallOutcome.OK)
        assert {result.provider for result in bench.outbox.results} == {bench.provider.name}
        bench.provider.refuses = lambda texts: None
        asked = len(spare.asked)
        for i in range(20):
            await bench.step()
            await bench.handle(a_request([f"later {i}"], correlation_id=f"later{i}"))
        assert bench.gate.paused is None
        assert len(spare.asked) - asked < 20


async def test_every_deployment_paused_pauses_the_route() -> None:
    """Nothing turns into an error while all of them are out; health says the first one's reason."""
    spare = BillingProvider()
    async with Bench(spare=spare) as bench:
        bench.provider.refuses = lambda texts: ProviderPaused("key_refused", http_status=401)
        spare.refuses = lambda texts: ProviderPaused("quota_exhausted", http_status=429)
        await bench.publish(a_request(["text"]))
        for _ in range(20):
            await bench.step()
        assert bench.route.paused == "key_refused"
        assert bench.outbox.results == []
        spare.refuses = lambda texts: None
        await bench.run_until_idle()
        assert bench.outbox.results[0].status is Status.OK


class SlowLedger(MemoryOutbox):
    """Takes several turns to take a receipt."""

    async def post(self, message: Destination) -> Awaitable[None]:
        for _ in range(5):
            await asyncio.sleep(0)
        return await super().post(message)


async def test_a_search_goes_on_while_its_outcomes_wait_for_it() -> None:
    """What half of a search has found may have to follow, in its document, a text of the other half."""
    async with Bench(outbox=SlowLedger()) as bench:
        bench.provider.refuses = lambda texts: InputRejected("refused", http_status=400) if "bad" in texts else None
        await bench.handle(
            a_request(["first", "more"], correlation_id="1", document_id="one"),
            a_request(["before"], correlation_id="2", document_id="two"),
            a_request(["bad"], correlation_id="3", document_id="three"),
            a_request(["first"], correlation_id="4", document_id="two"),
        )
        assert sorted(bench.lease.finished) == [0, 1, 2, 3]


class BrokenLedger(MemoryOutbox):
    """Takes intents, and no receipt ever; or breaks at one."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    async def post(self, message: Destination) -> Awaitable[None]:
        if self.error is not None:
            raise self.error
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [OSError("the broker"), None])
async def test_a_worker_ends_for_the_reason_it_has(error: Exception | None) -> None:
    """A receipt that can't be sent is what ends the process, and one that is stopped before ends without any error."""
    bench = Bench(outbox=BrokenLedger(error))
    bench.worker.start()
    await bench.publish(a_request(["a"]))
    await bench.run_until_idle()
    await bench.worker.stop()
    assert bench.failures == ([] if error is None else [error])
    assert bench.gate.in_flight == 0


async def test_calls_stay_full_though_one_in_fifty_hangs() -> None:
    """A hang by chance says nothing of a size that has passed before: calls don't shrink with every one, for good."""
    calls = 0

    def refuse(texts: Sequence[str]) -> Exception | None:
        nonlocal calls
        calls += 1
        return CallTooLarge("timeout") if calls % 50 == 0 and len(texts) > 1 else None

    async with Bench(window_max_wait_s=0.0) as bench:
        bench.provider.refuses = refuse
        for i in range(600):
            await bench.handle(a_request([f"{i}-{j}" for j in range(8)], correlation_id=f"c{i}"))
        late = [len(texts) for texts in bench.provider.asked[-100:]]
        assert sum(late) / len(late) > 7.5


async def test_what_is_embedded_while_its_window_is_measured_is_delivered_once() -> None:
    """A call may end before the rest of its window has been counted: its texts are no longer the window's."""
    async with Bench(window_max_wait_s=0.05) as bench:
        requests = [
            a_request([f"{tenant}{i}".ljust(2_000, "x") for i in range(96)], tenant_id=tenant, document_id=None)
            for tenant in ("large", "small")
        ]
        await bench.publish(*requests)
        await bench.settle()
        bench.clock.wake_next()
        for _ in range(1_000):  # calls of somebody else that end all the time
            bench.gate.changed()
            await asyncio.sleep(0)
        await bench.run_until_idle()
        done = [(result.request.tenant_id, result.chunk_index) for result in bench.outbox.results]
        assert sorted(done) == sorted({(request.tenant_id, i) for request in requests for i in range(96)})
        assert len(bench.outbox.usage) == 2
        assert sum(bench.attributed().values()) == sum(bench.provider.bills.values())
