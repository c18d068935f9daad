"""The eight steps on fakes: order, folding, usage, ordering per document, revocation, provider faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from processor.adapters.memory_cache import MemoryCache as LocalCache
from processor.adapters.tiered_cache import TieredCache
from processor.domain import (
    CacheLevel,
    CallKind,
    Chunk,
    Result,
    Status,
    Tombstone,
)
from processor.errors import InputRejected, ProviderTransient
from processor.ports import Destination, Events, Run
from tests.support.builders import NOW_MS, a_request
from tests.support.steps import Bench, FakeLease, MemoryCache, vector_of


async def test_an_intent_precedes_the_call_and_usage_follows_the_results() -> None:
    """The order of what leaves the worker: intent, receipt, result, sink view, usage; the offset only after that."""
    async with Bench() as bench:
        await bench.handle(a_request(["one two"]))
        assert bench.outbox.names() == ["calls", "calls", "results", "sink", "usage"]
        assert [call.kind for call in bench.outbox.calls] == [CallKind.INTENT, CallKind.RECEIPT]
        assert bench.lease.finished == [0]


async def test_no_call_is_made_before_its_intent_is_acknowledged() -> None:
    """U1: a provider that is asked has an intent in the log, however slow the broker is."""
    acknowledged = asyncio.Event()

    async def slow(messages: Sequence[Destination]) -> None:
        if any(message.name == "calls" for message in messages):
            await acknowledged.wait()

    async with Bench() as bench:
        bench.outbox.on_send = slow
        await bench.publish(a_request(["text"]))
        await bench.step()
        assert bench.provider.asked == []
        acknowledged.set()
        await bench.run_until_idle()
        assert bench.provider.asked == [["text"]]


async def test_no_offset_is_finished_before_the_receipt_is_acknowledged() -> None:
    """Step 7: every acknowledgement is awaited, the receipts' too."""
    async with Bench() as bench:
        bench.outbox.posts_acknowledged = asyncio.Event()
        await bench.publish(a_request(["text"]))
        await bench.step()
        assert len(bench.outbox.results) == 1
        assert bench.lease.finished == []
        bench.outbox.posts_acknowledged.set()
        await bench.run_until_idle()
        assert bench.lease.finished == [0]


@pytest.mark.parametrize("status", [500, 400])
async def test_no_call_is_tried_again_before_its_receipt_is_acknowledged(status: int) -> None:
    """Else its offset could be committed while the ledger may still lose that attempt; nor are its errors sent."""
    async with Bench() as bench:
        bench.outbox.posts_acknowledged = asyncio.Event()
        failed = ProviderTransient if status == 500 else InputRejected
        bench.provider.script = [failed("failed", http_status=status)]
        await bench.publish(a_request(["text"]))
        for _ in range(5):
            await bench.step()
        assert len(bench.provider.asked) == 1
        assert bench.outbox.results == []
        bench.outbox.posts_acknowledged.set()
        await bench.run_until_idle()
        assert bench.lease.finished == [0]


async def test_a_vector_belongs_to_its_text() -> None:
    """Law 6: each chunk gets the vector of its own text, whatever the packing."""
    texts = [f"text number {i}" for i in range(40)]
    async with Bench() as bench:
        await bench.handle(a_request(texts))
        assert len(bench.provider.asked) == 5
        for result in bench.outbox.results:
            assert result.vector is not None
            assert np.array_equal(result.vector, vector_of(texts[result.chunk_index]))


async def test_equal_texts_of_a_tenant_are_embedded_once() -> None:
    """Single-flight: one leader is billed, the other items are saved the same share and say `coalesced`."""
    async with Bench() as bench:
        await bench.handle(a_request(["same text"]), a_request(["same text"], correlation_id="corr-2"))
        assert bench.provider.asked == [["same text"]]
        assert [r.cache for r in bench.outbox.results] == [CacheLevel.MISS, CacheLevel.COALESCED]
        assert [(u.billed.tokens, u.saved.tokens) for u in bench.outbox.usage] == [(2, 0), (0, 2)]


async def test_tenants_never_share_a_vector() -> None:
    """Law 6: equal texts of two tenants are two calls' worth of texts, each billed to its own payer."""
    async with Bench() as bench:
        await bench.handle(a_request(["same"]), a_request(["same"], tenant_id="globex"))
        assert sum(map(len, bench.provider.asked)) == 2
        assert {u.payer_id: u.billed.tokens for u in bench.outbox.usage} == {"acme": 1, "globex": 1}


async def test_use_cache_false_folds_with_nothing() -> None:
    """U2: an item that refuses the cache has an entry of its own."""
    async with Bench() as bench:
        await bench.handle(a_request(["same"]), a_request(["same"], use_cache=False, correlation_id="c2"))
        assert sum(map(len, bench.provider.asked)) == 2
        assert [u.billed.tokens for u in bench.outbox.usage] == [1, 1]


async def test_a_redelivered_request_is_charged_to_the_same_attempt() -> None:
    """U2, U3, law 4: the item that finds its own entry is billed that share again, byte for byte the same parts."""
    cache = MemoryCache()
    usages = []
    for _ in range(2):
        async with Bench(cache=cache) as bench:
            usages += (await bench.handle(a_request(["one two three"]))).usage
            calls = len(bench.provider.asked)
    assert calls == 0
    assert usages[0].idempotency_key == usages[1].idempotency_key
    assert usages[0].parts == usages[1].parts
    assert usages[1].billed.tokens == 3
    assert usages[1].saved.tokens == 0


async def test_another_item_that_hits_is_saved_not_billed() -> None:
    """U3: only the item named by the entry pays."""
    cache = MemoryCache()
    async with Bench(cache=cache) as bench:
        await bench.handle(a_request(["one two"]))
    async with Bench(cache=cache) as bench:
        usage = (await bench.handle(a_request(["one two"], correlation_id="later"))).usage[0]
        assert (usage.billed.tokens, usage.saved.tokens, usage.cached_texts, usage.parts) == (0, 2, 1, [])
        assert bench.outbox.results[0].cache is CacheLevel.L2


async def test_the_same_request_twice_in_flight_is_one_charge() -> None:
    """U2: an item with the leader's identity is the leader, also inside one fold."""
    async with Bench() as bench:
        await bench.handle(a_request(["a b"]), a_request(["a b"]))
        first, second = bench.outbox.usage
        assert first.request_id == second.request_id
        assert first.parts == second.parts
        assert sum(bench.attributed().values()) == sum(bench.provider.bills.values()) == 2


async def test_the_leader_is_the_first_item_in_the_log() -> None:
    """U2: the lower (topic, partition, offset, index) leads, whoever was queued first."""
    async with Bench() as bench:
        late, early = FakeLease(partition=1), FakeLease(partition=0)
        await bench.publish(a_request(["same"], correlation_id="p1"), lease=late)
        await bench.publish(a_request(["same"], correlation_id="p0"), lease=early)
        await bench.run_until_idle()
        billed = [u.request.correlation_id for u in bench.outbox.usage if u.billed.tokens]
        assert billed == ["p0"]


async def test_a_follower_leads_when_the_leader_misses_its_deadline() -> None:
    """U2: a leader that ends for a reason of its request hands over; its neighbour is embedded and billed."""
    async with Bench() as bench:
        expired = a_request(["same"], deadline_ms=NOW_MS - 1)
        await bench.handle(expired, a_request(["same"], correlation_id="c2"))
        by_correlation = {r.request.correlation_id: r for r in bench.outbox.results}
        assert by_correlation["corr-1"].error is not None
        assert by_correlation["corr-1"].error.code == "deadline_exceeded"
        assert by_correlation["c2"].status is Status.OK
        assert [(u.billed.tokens, u.failed_texts) for u in bench.outbox.usage] == [(0, 1), (1, 0)]


async def test_what_is_known_at_once_is_saved_delivered_and_counted_while_the_rest_is_embedded() -> None:
    """A text that L1 has waits for no window; its request is charged once, with its last text; every look-up counts."""
    looked_up: Counter[tuple[str, str]] = Counter()

    def count(name: str, value: float, labels: Mapping[str, str]) -> None:
        if name == "cache_lookups":
            looked_up[labels["level"], labels["result"]] += int(value)

    async with Bench() as bench:
        events = Events(count)
        cache = TieredCache(LocalCache(max_bytes=1_000_000, ttl_s=60), bench.cache, events)
        bench.worker.pipeline.ports = replace(bench.worker.pipeline.ports, cache=cache, events=events)
        await bench.handle(a_request(["one two"], document_id=None))
        bench.provider.gate = asyncio.Event()
        await bench.publish(a_request(["three", "one two"], correlation_id="mixed", document_id=None))
        await bench.step()
        assert [(r.request.correlation_id, r.chunk_index, r.cache) for r in bench.outbox.results[1:]] == [
            ("mixed", 1, CacheLevel.L1)
        ]
        assert len(bench.outbox.usage) == 1
        bench.provider.gate.set()
        await bench.run_until_idle()
        assert bench.lease.finished == [0, 1]
        usage = bench.outbox.usage[1]
        assert (usage.billed.tokens, usage.saved.tokens, usage.cached_texts, usage.failed_texts) == (1, 2, 1, 0)
        assert looked_up == {("l1", "miss"): 2, ("l1", "hit"): 1, ("l2", "miss"): 2}


async def test_a_hit_is_delivered_late_or_not() -> None:
    """Step 4: deadlines are decided on misses only."""
    cache = MemoryCache()
    async with Bench(cache=cache) as bench:
        await bench.handle(a_request(["text"]))
    async with Bench(cache=cache) as bench:
        await bench.handle(a_request(["text"], deadline_ms=NOW_MS - 1, correlation_id="late"))
        assert bench.outbox.results[0].status is Status.OK


async def test_an_over_long_text_fails_alone() -> None:
    """A fault of one text is its chunk's error result; its neighbours succeed."""
    async with Bench() as bench:
        await bench.handle(a_request(["short", "w " * 11, " "]))
        codes = {r.chunk_index: r.error.code if r.error else "ok" for r in bench.outbox.results}
        assert codes == {0: "ok", 1: "text_too_long", 2: "empty_text"}
        assert bench.outbox.usage[0].failed_texts == 2


@pytest.mark.parametrize("policy, kept", [("truncate_end", "w0 w1"), ("truncate_start", "w10 w11")])
async def test_truncation_is_said_and_remembered(policy: str, kept: str) -> None:
    """A cut text is embedded as cut; the result and a later hit both say so."""
    text = " ".join(f"w{i}" for i in range(12))
    async with Bench() as bench:
        await bench.handle(a_request([text], truncate=policy))
        await bench.handle(a_request([text], truncate=policy, correlation_id="again"))
        assert all(r.cut_tokens > 0 for r in bench.outbox.results)
        sent = bench.provider.asked[0][0]
        assert sent.startswith(kept) or sent.endswith(kept)
        assert len(sent.split()) == 10


async def test_a_refused_request_is_one_record_for_all_its_chunks_and_one_zero_charge() -> None:
    """A request that fails as a whole: index -1, its range, and usage with every text failed."""
    async with Bench() as bench:
        await bench.handle(a_request(["a", "b"], model="nobody-knows"))
        (result,) = bench.outbox.results
        assert (result.chunk_index, result.length, result.status) == (-1, 2, Status.ERROR)
        assert result.error is not None
        assert (result.error.code, result.error.field) == ("unknown_model", "model")
        (usage,) = bench.outbox.usage
        assert (usage.billed.tokens, usage.failed_texts, usage.model) == (0, 2, "")
        assert bench.lease.finished == [0]


async def test_undecodable_bytes_go_to_the_dead_letters_and_nothing_stops() -> None:
    """Bad bytes reach the DLQ untouched; the records around them get their results."""
    async with Bench() as bench:
        await bench.handle(a_request(["a"]), b"\x00garbage", None, a_request(["b"], correlation_id="c2"))
        assert [letter.record.value for letter in bench.outbox.letters] == [b"\x00garbage", None]
        assert len(bench.outbox.results) == 2
        assert sorted(bench.lease.finished) == [0, 1, 2, 3]


async def test_a_lethal_record_is_buried_unread_and_uncharged() -> None:
    """A record that ends processes goes to the DLQ by reference; it is not decoded, embedded or charged."""
    async with Bench() as bench:
        await bench.worker.on_run(Run(bench.lease, bench.records(a_request(["text"])), lethal=True))
        await bench.run_until_idle()
        (letter,) = bench.outbox.letters
        assert (letter.reason, letter.by_reference) == ("lethal", True)
        assert bench.outbox.names() == ["dlq"]
        assert bench.lease.finished == [0]


async def test_validate_says_what_would_happen_and_embeds_nothing() -> None:
    """`validate` gives valid or invalid per chunk with tokens and cost, no call, no usage."""
    async with Bench() as bench:
        await bench.handle(a_request(["three short words", "w " * 11, ""], action="validate"))
        assert [(r.status, r.token_count) for r in bench.outbox.results] == [
            (Status.VALID, 3),
            (Status.INVALID, 10),
            (Status.INVALID, 0),
        ]
        assert bench.outbox.results[0].cost_nanos == 3
        assert bench.provider.asked == []
        assert bench.outbox.usage == []


async def test_a_delete_is_acknowledged_after_its_tombstones() -> None:
    """One tombstone per chunk id and space, then one `ok` without vector per chunk id."""
    async with Bench() as bench:
        await bench.handle(a_request(action="delete", chunks=(), chunk_ids=("a", "b"), vector_spaces=("s1", "s2")))
        assert bench.outbox.names() == ["sink"] * 4 + ["results"] * 2
        assert all(isinstance(stone, Tombstone) for stone in bench.outbox.sink)
        assert all(r.status is Status.OK and r.vector is None for r in bench.outbox.results)
        assert bench.outbox.usage == []


async def test_whatever_enters_the_sink_view_can_be_deleted_from_it() -> None:
    """An empty document id is an id like any other: null alone means no document."""
    async with Bench() as bench:
        await bench.handle(a_request(["x"], document_id=""))
        (entry,) = bench.outbox.sink
        assert isinstance(entry, Result)
        await bench.handle(
            a_request(
                action="delete", chunks=(), chunk_ids=("c0",), document_id="", vector_spaces=(entry.vector_space,)
            )
        )
        stone = bench.outbox.sink[-1]
        assert isinstance(stone, Tombstone)
        assert stone.vector_id == entry.vector_id


async def test_a_chunk_sent_twice_reaches_the_sink_in_offset_order() -> None:
    """Law 8: though the first version needs two attempts and the second none, the newer one is the last in the view."""
    cache = MemoryCache()
    async with Bench(cache=cache) as bench:
        await bench.handle(a_request(["new"], document_id="other"))
    async with Bench(cache=cache, window_max_texts=1) as bench:
        bench.provider.script = [ProviderTransient("hiccup")]
        await bench.handle(a_request(["old"]), a_request(["new"], correlation_id="c2"))
        sink = [entry for entry in bench.outbox.sink if isinstance(entry, Result)]
        assert [entry.source.offset for entry in sink] == [0, 1]
        assert len({entry.vector_id for entry in sink}) == 1


async def test_documents_that_wait_for_each_other_crosswise_do_not_block() -> None:
    """Law 8 without deadlock: windows of two functions that hold each other's earlier chunks both get through."""
    async with Bench(window_max_texts=2) as bench:
        await bench.handle(
            a_request(chunks=(Chunk("x", "x1"),), dimensions=4),
            a_request(chunks=(Chunk("x", "x2"),), dimensions=3, correlation_id="c2"),
            a_request(chunks=(Chunk("y", "y1"),), dimensions=3, correlation_id="c3"),
            a_request(chunks=(Chunk("y", "y2"),), dimensions=4, correlation_id="c4"),
        )
        assert sorted(bench.lease.finished) == [0, 1, 2, 3]


async def test_a_manifest_is_stored_after_the_chunks_before_it() -> None:
    """Stale chunks: the manifest waits for all earlier offsets of its document, and answers once, index -1."""
    async with Bench() as bench:
        bench.provider.gate = asyncio.Event()
        manifest = a_request(
            action="document_manifest", chunks=(), chunk_ids=("c0",), vector_spaces=("s",), correlation_id="m"
        )
        await bench.publish(a_request(["chunk"]), manifest)
        await bench.step()
        assert bench.outbox.manifests == []
        bench.provider.gate.set()
        await bench.run_until_idle()
        (stored,) = bench.outbox.manifests
        assert stored.source_version.endswith(f"{1:019d}")
        assert bench.outbox.names()[-2:] == ["documents", "results"]
        assert bench.outbox.results[-1].chunk_index == -1


async def test_a_reply_is_a_copy_to_the_partition_that_was_asked_for() -> None:
    """`reply_to` adds a copy with explicit topic and partition; outside the allow-list it is an error result."""
    from processor.domain import ReplyTo

    async with Bench() as bench:
        await bench.handle(a_request(["x"], reply_to=ReplyTo("embedding-replies", 3, "cb")))
        (reply,) = [m for m in bench.outbox.sent if m.name == "replies"]
        assert (reply.topic, reply.partition) == ("embedding-replies", 3)
        for bad in (ReplyTo("embedding-usage", 0), ReplyTo("embedding-replies", 4)):
            outbox = await bench.handle(a_request(["x"], reply_to=bad, correlation_id="bad"))
            error = outbox.results[-1].error
            assert error is not None
            assert error.code == "reply_not_allowed"


async def test_a_run_of_mixed_requests_attributes_every_billed_token() -> None:
    """U7: with the cache kept and no zombies the provider's bill equals what is attributed, per attempt."""
    async with Bench() as bench:
        requests = [
            a_request(
                [f"word {j % 7} of {i % 5}" for j in range(6)],
                correlation_id=f"c{i}",
                tenant_id=("acme", "globex")[i % 2],
                use_cache=i % 4 != 0,
            )
            for i in range(30)
        ]
        await bench.handle(*requests, *requests[:10])
        assert bench.attributed() == bench.provider.bills
        outcomes = {(r.request_id, r.chunk_index) for r in bench.outbox.results}
        assert len(outcomes) == 30 * 6


async def test_parts_of_a_split_document_keep_the_index_of_the_whole() -> None:
    """A part's chunks are numbered from first_chunk_index, and it is a request of its own."""
    async with Bench() as bench:
        first = a_request(["a", "b"], chunk_count=4)
        await bench.handle(first, replace(first, first_chunk_index=2))
        assert [r.chunk_index for r in bench.outbox.results] == [0, 1, 2, 3]
        assert len(bench.outbox.usage) == 2
