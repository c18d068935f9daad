"""What the worker is compared with: a bare aiokafka loop, Faust as its manual shows it, and that with provider calls.

`aiokafka` and `faust` answer every text with the same vector; `sequential` is the `faust` one that asks a provider,
one awaited call for the texts of each batch, by the vendor's own client. All do what somebody who knows Kafka and Avro
would write for one chunk a request and nothing else: fastavro to a dict, the result as a dict whose vector is copied as
bytes, acks=all, no validation, cache, charge or header. None of them survives a rebalance without loss or copies. Their
results are of the same schema, keys and fields as the worker's, and of the same size within four bytes.

Tried on Apache Kafka, 60,000 requests, 2 or 3 interleaved rounds on a machine that others used too, so that only large
differences count. The bare loop gains by large fetches (500 or 1,000 records lost a quarter to 4,000 at d=8; 2,000 and
8,000 could not be told from 4,000) and at d=1536 by large batches (64 KB had half the rate of 128 KB; 512 KB was ahead
of that, 900 KB was not). uvloop, and a linger of 0, 5 or 20 ms, could not be told apart. Of Faust only the batch size
was varied, 128 and 512 KB, to no clear effect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from io import BytesIO
from typing import Any

import faust
import numpy as np
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from fastavro import parse_schema, schemaless_reader, schemaless_writer
from openai import AsyncOpenAI

from processor.adapters.schemas import SINGLE_OBJECT_HEADER_BYTES, current

FETCHED_RECORDS = 4_000
LINGER_MS = 0
BATCH_BYTES = 512 * 1024
TAKEN_RECORDS = 128

Answer = Callable[[Any, bytes], tuple[bytes, bytes]]


def read(value: bytes) -> Any:
    """A request as a dict."""
    stream = BytesIO(value)
    stream.seek(SINGLE_OBJECT_HEADER_BYTES)
    return schemaless_reader(stream, current("EmbeddingRequest").parsed, None)


def a_vector(dimensions: int) -> bytes:
    """Always the same one."""
    return np.linspace(0, 1, dimensions, dtype="<f4").tobytes()


def answer_to(dimensions: int) -> Answer:
    """A function from a request and the bytes of a vector to key and value of its result."""
    results = current("EmbeddingResult")
    frame, write_schema = results.single_object_header, with_vector_as_bytes(results.text, dimensions)
    always = {
        "request_id": "00000000-0000-5000-8000-000000000000",
        "vector_id": "00000000-0000-5000-8000-000000000001",
        "operation": "document",
        "source_version": "1790000000000-00000-0000000000000000000",
        "accepted_at_ms": 1_790_000_000_000,
        "length": 1,
        "status": "ok",
        "error": None,
        "provider": "openai",
        "model": "text-embedding-3-small",
        "vector_space": f"text-embedding-3-small@1/{dimensions}/normalised",
        "dimensions": dimensions,
        "token_count": 100,
        "token_source": "provider",
        "cache": "l1",
        "truncated": False,
        "cut_tokens": 0,
        "cost_nanos": 2_000,
        "time_taken_ms": 1,
        "completed_at_ms": 1_790_000_000_000,
        "reply_type": None,
    }

    def answer(request: Any, vector: bytes) -> tuple[bytes, bytes]:
        chunk, first = request["chunks"][0], request["first_chunk_index"]
        out = BytesIO()
        out.write(frame)
        schemaless_writer(
            out,
            write_schema,
            {
                **always,
                "tenant_id": request["tenant_id"],
                "correlation_id": request["correlation_id"],
                "action": request["action"],
                "collection": request["collection"],
                "document_id": request["document_id"],
                "task_id": request["task_id"],
                "task_total": request["task_total"],
                "agent_id": request["agent_id"],
                "agent_owner_id": request["agent_owner_id"],
                "conversation_id": request["conversation_id"],
                "run_id": request["run_id"],
                "source_service": request["source_service"],
                "requested_at_ms": request["requested_at_ms"],
                "metadata": request["metadata"],
                "input_type": request["input_type"],
                "chunk_count": request["chunk_count"] or len(request["chunks"]),
                "first_chunk_index": first,
                "chunk_index": first,
                "chunk_id": chunk["chunk_id"],
                "chunk_metadata": chunk["metadata"],
                "vector": {"count": dimensions, "items": vector, "end": 0},
            },
        )
        return request["correlation_id"].encode(), out.getvalue()

    return answer


def with_vector_as_bytes(schema_text: str, dimensions: int) -> Any:
    """The schema, parsed, with its `vector` spelled as an array's bytes: one block's count, the floats, a zero."""
    schema = json.loads(schema_text)
    layout = {
        "type": "record",
        "name": "VectorBytes",
        "fields": [
            {"name": "count", "type": "long"},
            {"name": "items", "type": {"type": "fixed", "name": "Floats", "size": 4 * dimensions}},
            {"name": "end", "type": "long"},
        ],
    }
    fields = [{"name": "vector", "type": layout} if each["name"] == "vector" else each for each in schema["fields"]]
    return parse_schema(schema | {"fields": fields})


async def run_aiokafka(arguments: argparse.Namespace) -> None:
    """Fetch, decode, encode, send, gather, commit; again and again until it is ended."""
    answer, vector = answer_to(arguments.dimensions), a_vector(arguments.dimensions)
    consumer = AIOKafkaConsumer(
        arguments.requests,
        bootstrap_servers=arguments.bootstrap_servers,
        group_id=arguments.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=arguments.bootstrap_servers,
        acks="all",
        enable_idempotence=arguments.idempotent,
        linger_ms=LINGER_MS,
        max_batch_size=BATCH_BYTES,
    )
    await producer.start()
    await consumer.start()
    while True:
        sends = []
        fetched = await consumer.getmany(timeout_ms=1000, max_records=FETCHED_RECORDS)
        for records in fetched.values():
            for record in records:
                key, value = answer(read(record.value), vector)
                sends.append(await producer.send(arguments.results, value, key=key))
        if sends:
            await asyncio.gather(*sends)
            await consumer.commit()


def faust_app(arguments: argparse.Namespace) -> faust.App:
    """An agent that takes records by the hundred and awaits `send` for each result. Plain Faust has no idempotence."""
    answer, vectors_of = answer_to(arguments.dimensions), vectors_for(arguments)
    app = faust.App(
        arguments.group,
        broker=f"kafka://{arguments.bootstrap_servers}",
        datadir=tempfile.mkdtemp(),
        web_enabled=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        producer_acks=-1,
        producer_linger=LINGER_MS / 1000,
        producer_max_batch_size=BATCH_BYTES,
    )
    requests = app.topic(
        arguments.requests, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"
    )
    results = app.topic(arguments.results, key_serializer="raw", value_serializer="raw")

    @app.agent(requests)
    async def answer_all(stream: Any) -> None:
        async for values in stream.take(TAKEN_RECORDS, within=0.05):
            taken = [read(value) for value in values]
            for request, vector in zip(taken, await vectors_of(taken), strict=True):
                key, value = answer(request, vector)
                await results.send(key=key, value=value)

    return app


def vectors_for(arguments: argparse.Namespace) -> Callable[[Sequence[Any]], Awaitable[Sequence[bytes]]]:
    """What makes the vectors of a batch of requests: one call of the provider, or nothing at all."""

    async def always_the_same(taken: Sequence[Any]) -> Sequence[bytes]:
        return [vector] * len(taken)

    async def ask(taken: Sequence[Any]) -> Sequence[bytes]:
        answer = await client.embeddings.create(
            input=[request["chunks"][0]["text"] for request in taken],
            model="text-embedding-3-small",
            dimensions=arguments.dimensions,
        )
        return [np.asarray(each.embedding, dtype="<f4").tobytes() for each in answer.data]

    if arguments.kind == "faust":
        vector = a_vector(arguments.dimensions)
        return always_the_same
    client = AsyncOpenAI(api_key="tests", base_url=arguments.base_url)
    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["aiokafka", "faust", "sequential"])
    for name in ("bootstrap-servers", "requests", "results", "group"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dimensions", type=int, required=True)
    parser.add_argument("--base-url", help="of the provider that sequential asks")
    parser.add_argument("--idempotent", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    if arguments.kind == "aiokafka":
        uvloop.run(run_aiokafka(arguments))
    else:
        faust.Worker(faust_app(arguments), loglevel="WARNING").execute_from_commandline()


if __name__ == "__main__":
    main()
