"""The whole worker and aggregator as processes: each action, lane and kind of message, on a real broker."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer

from processor.adapters import topics
from processor.adapters.avro import Codec, encode_request
from processor.adapters.kafka import connection
from processor.adapters.reader import KafkaReader
from processor.domain import Chunk, DocumentManifest, ReceivedResult, Record, ReplyTo, Request
from processor.identity import request_id, vector_id
from processor.ports import Undecodable
from tests.support.brokers import Broker
from tests.support.builders import a_request, some_chunks
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import Child, Stack, until
from tests.support.world import PATIENT

T = TypeVar("T")

CANARY = "canary-4f1c9a"
DIMENSIONS = 8
SPACE = f"text-embedding-3-small@1/{DIMENSIONS}/l2"


class Running:
    """A worker, an interactive worker and an aggregator with their topics, and what they wrote."""

    def __init__(self, stack: Stack, children: list[Child]) -> None:
        self.stack = stack
        self.children = children
        self.settings = stack.settings()
        self.codec = Codec()
        self.reader = KafkaReader(self.settings, group_id=self.settings.aggregator_group_id)

    async def send(self, *values: bytes | None, topic: str = "requests") -> None:
        producer = AIOKafkaProducer(**connection(self.settings))
        await producer.start()
        try:
            for value in values:
                name = self.settings.topic(topics.topics()[topic].name)
                await producer.send_and_wait(name, value, key=b"one-partition")
        finally:
            await producer.stop()

    async def request(self, *requests: Request, topic: str = "requests") -> list[ReceivedResult]:
        """Send, wait for the first copies of all outcomes."""
        await self.send(*map(encode_request, requests), topic=topic)
        wanted = {request_id(request): request for request in requests}
        found: dict[tuple[str, int], ReceivedResult] = {}

        async def all_there() -> bool:
            for _, result in await self.read("results", ReceivedResult):
                if result.request_id in wanted:
                    found.setdefault((result.request_id, result.chunk_index), result)
            return all(
                (name, -1) in found or all((name, i) in found for i in range(request.length))
                for name, request in wanted.items()
            )

        for child in self.children:
            child.check()
        await until(all_there, within_s=300, what="every outcome", every_s=0.2)
        return sorted(found.values(), key=lambda result: (result.correlation_id, result.chunk_index))

    async def finished(self, topic: str = "requests") -> None:
        """Wait until every record of it is committed: all that they lead to stands in its topics by then."""
        lane = "bulk" if topic == "requests" else "interactive"
        reader = KafkaReader(self.settings, group_id=f"{self.settings.group_id}-{lane}")
        name = self.settings.topic(topics.topics()[topic].name)

        async def committed() -> bool:
            offsets = await reader.committed(name)
            return all(offsets.get(place, 0) >= span.end for place, span in (await reader.spans(name)).items())

        await until(committed, within_s=300, what=f"every record of {name} is committed", every_s=0.2)

    async def read(self, name: str, kind: type[T]) -> list[tuple[Record, T]]:
        messages = []
        for record in await self.records(name):
            if record.value is not None:
                message = await self.codec.read(kind, record.value)
                assert not isinstance(message, Undecodable)
                messages.append((record, message))
        return messages

    async def records(self, name: str) -> list[Record]:
        topic = self.settings.topic(topics.topics()[name].name)
        return [record async for records in self.reader.read(topic) for record in records]


@pytest.fixture
async def running(kafka: Broker, redis_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Running]:
    """Everything up and ready; stopped cleanly afterwards, and no text of ours in any log or metric (law 7)."""
    with (
        ProviderProcess() as provider,
        Stack(
            tmp_path,
            unique,
            kafka.bootstrap_servers,
            EMBEDDING_PROVIDER="openai",
            EMBEDDING_OPENAI_BASE_URL=provider.base_url,
            EMBEDDING_OPENAI_API_KEY=f"secret-{CANARY}",
            EMBEDDING_REDIS_URL=redis_url,
            EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL=f'{{"text-embedding-3-small": {DIMENSIONS}}}',
            EMBEDDING_LOG_LEVEL="DEBUG",
            **PATIENT,
        ) as stack,
    ):
        await topics.create(stack.settings(), partitions=2, replication=1)
        children = [stack.spawn("worker"), stack.spawn("worker", "--lane", "interactive"), stack.spawn("aggregator")]
        for child in children:
            await until(child.ready, within_s=300, what=f"{child.name} is ready")
        yield Running(stack, children)
        for child in children:
            page = await asyncio.to_thread(_metrics, child)
            assert "embedding_" in page
            assert ('embedding_deployment_paused{deployment="openai"} 0.0' in page) is child.name.startswith("worker")
            assert CANARY not in page
            assert child.stop() == 0, child.tail()
            assert CANARY not in child.log.read_text(errors="replace"), "a text or a secret in a log"


def _metrics(child: Child) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{child.port}/metrics", timeout=30) as answer:
        page: bytes = answer.read()
        return page.decode()


async def test_every_action_has_its_outcome(running: Running) -> None:
    """Generate, batch, query, validate, delete, reply and dead letters in one partition, none disturbing another."""
    texts = [f"{CANARY} one", f"{CANARY} two", ""]
    reply_to = ReplyTo(running.settings.topic("embedding-replies"), 1, "callback")
    bad = encode_request(a_request([CANARY], tenant_id=""))
    await running.send(b"no avro " + CANARY.encode(), bad, None)
    outcomes = await running.request(
        a_request(texts, correlation_id="1-generate", metadata={"k": "v"}),
        a_request([CANARY], correlation_id="2-batch", action="embedding.batch_process", document_id=None),
        a_request([CANARY], correlation_id="3-validate", action="validate"),
        a_request([CANARY], correlation_id="4-model", model="nobody-knows"),
        a_request([CANARY], correlation_id="5-reply", reply_to=reply_to),
        a_request(chunks=(), chunk_ids=("c0",), correlation_id="6-delete", action="delete", vector_spaces=(SPACE,)),
    )
    by_correlation: dict[str, list[ReceivedResult]] = {}
    for outcome in outcomes:
        by_correlation.setdefault(outcome.correlation_id, []).append(outcome)
    generated = by_correlation["1-generate"]
    assert [outcome.status for outcome in generated] == ["ok", "ok", "error"]
    for outcome, text in zip(generated[:2], texts, strict=False):
        assert outcome.vector is not None
        assert np.allclose(outcome.vector, expected_vector(text, DIMENSIONS), atol=1e-5)
        assert outcome.vector_space == SPACE
        assert outcome.vector_id == vector_id("acme", "docs", "doc-1", outcome.chunk_id, SPACE)
    assert generated[2].error is not None
    assert generated[2].error.code == "empty_text"
    assert by_correlation["2-batch"][0].status == "ok"
    assert by_correlation["3-validate"][0].status == "valid"
    refused = by_correlation["4-model"][0]
    assert refused.error is not None
    assert (refused.chunk_index, refused.error.code) == (-1, "unknown_model")
    assert by_correlation["6-delete"][0].status == "ok"
    await running.finished()
    replies = await running.read("replies", ReceivedResult)
    assert [(r.source.partition, reply.reply_type) for r, reply in replies] == [(1, "callback")]
    letters = await running.records("dlq")
    assert {dict(letter.headers)["error_class"] for letter in letters} == {b"undecodable", b"no_identity"}
    assert {letter.value for letter in letters} == {b"no avro " + CANARY.encode(), bad, None}
    assert all(letter.key == b"one-partition" for letter in letters)
    sink = await running.records("sink")
    newest = {record.key: record.value for record in sink}
    assert newest[vector_id("acme", "docs", "doc-1", "c0", SPACE).encode()] is None


async def test_the_query_lane_answers_queries(running: Running) -> None:
    """`generate_query` on the query topic; a delete there is `wrong_lane`."""
    outcomes = await running.request(
        a_request([CANARY], correlation_id="a", action="generate_query", document_id=None),
        a_request(chunks=(), chunk_ids=("c0",), correlation_id="b", action="delete", vector_spaces=(SPACE,)),
        topic="queries",
    )
    assert outcomes[0].status == "ok"
    assert outcomes[0].operation == "query"
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "wrong_lane"


async def test_a_newer_manifest_deletes_what_vanished(running: Running) -> None:
    """No sink keeps stale chunks: what the second manifest leaves out gets a tombstone, what it names stays."""
    first = a_request(chunks=some_chunks([f"{CANARY} {i}" for i in range(3)]), correlation_id="v1")
    await running.request(
        first,
        _manifest("m1", "c0", "c1", "c2"),
        a_request(chunks=(Chunk("c0", f"{CANARY} new"),), correlation_id="v2"),
        _manifest("m2", "c0"),
    )
    stale = {vector_id("acme", "docs", "doc-1", name, SPACE).encode() for name in ("c1", "c2")}
    kept = vector_id("acme", "docs", "doc-1", "c0", SPACE).encode()

    async def tombstoned() -> bool:
        newest = {record.key: record.value for record in await running.records("sink")}
        assert newest[kept] is not None
        return all(newest[name] is None for name in stale)

    await running.finished()
    await until(tombstoned, within_s=300, what="tombstones of the stale chunks", every_s=0.3)
    assert len(await running.read("documents", DocumentManifest)) == 2


def _manifest(correlation_id: str, *chunk_ids: str) -> Request:
    return a_request(
        action="document_manifest",
        chunks=(),
        chunk_ids=chunk_ids,
        vector_spaces=(SPACE,),
        correlation_id=correlation_id,
    )
