"""What the engine's rate is compared with: a bare aiokafka loop, and Faust as its manual shows it.

Both decode each request and encode one result with the same codec, acks=all, and commit. Neither validates, looks
anything up, charges, or survives a rebalance without loss; the vector is always the same one. The bare loop fills
batches as large as the worker's, Faust has its defaults.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from processor.adapters.avro import Codec, Encoded, partition_of
from processor.adapters.faust_engine.engine import BATCH_BYTES
from processor.domain import Request, Result, Status, TokenSource
from processor.ports import Destination
from tests.support.builders import NOW_MS, a_source, a_vector

FETCHED_RECORDS = 500
TAKEN_RECORDS = 128


class Answers:
    """A request's bytes to its result's key, value and headers."""

    def __init__(self, dimensions: int) -> None:
        self._codec = Codec()
        self._vector = a_vector(dimensions)
        self._source = a_source()

    async def of(self, value: bytes) -> Encoded:
        request = await self._codec.read(Request, value)
        assert isinstance(request, Request)
        chunk = request.chunks[0]
        result = Result(
            request=request,
            source=self._source,
            request_id="00000000-0000-5000-8000-000000000000",
            chunk_index=0,
            first_chunk_index=0,
            length=1,
            chunk_id=chunk.chunk_id,
            chunk_metadata=chunk.metadata,
            status=Status.OK,
            vector=self._vector,
            dimensions=len(self._vector),
            provider="openai",
            model="text-embedding-3-small",
            vector_space="text-embedding-3-small",
            token_count=3,
            token_source=TokenSource.PROVIDER,
            completed_at_ms=NOW_MS,
        )
        return self._codec.encode(Destination("results", result))


async def run_aiokafka(arguments: argparse.Namespace) -> None:
    """Fetch, decode, encode, send, gather, commit; again and again until it is ended."""
    answers = Answers(arguments.dimensions)
    consumer = AIOKafkaConsumer(
        arguments.requests,
        bootstrap_servers=arguments.bootstrap_servers,
        group_id=arguments.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=arguments.bootstrap_servers, acks="all", linger_ms=5, max_batch_size=BATCH_BYTES
    )
    await producer.start()
    await consumer.start()
    while True:
        sends = []
        fetched = await consumer.getmany(timeout_ms=1000, max_records=FETCHED_RECORDS)
        for records in fetched.values():
            for record in records:
                key, value, headers = await answers.of(record.value)
                place = partition_of(key or b"", arguments.partitions)
                sends.append(
                    await producer.send(arguments.results, value, key=key, partition=place, headers=list(headers))
                )
        if sends:
            await asyncio.gather(*sends)
            await consumer.commit()


def faust_app(arguments: argparse.Namespace) -> faust.App:
    """An agent that takes records by the hundred and awaits `send` for each result."""
    answers = Answers(arguments.dimensions)
    app = faust.App(
        arguments.group,
        broker=f"kafka://{arguments.bootstrap_servers}",
        datadir=tempfile.mkdtemp(),
        web_enabled=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        producer_acks=-1,
    )
    requests = app.topic(
        arguments.requests, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"
    )
    results = app.topic(arguments.results, key_serializer="raw", value_serializer="raw")

    @app.agent(requests)
    async def answer(stream: Any) -> None:
        async for values in stream.take(TAKEN_RECORDS, within=0.05):
            for value in values:
                key, answered, headers = await answers.of(value)
                await results.send(key=key, value=answered, headers=dict(headers))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["aiokafka", "faust"])
    for name in ("bootstrap-servers", "requests", "results", "group"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("dimensions", "partitions"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "aiokafka":
        asyncio.run(run_aiokafka(arguments))
    else:
        faust.Worker(faust_app(arguments), loglevel="WARNING").execute_from_commandline()


if __name__ == "__main__":
    main()
