"""`quote` against a real broker, cache, provider and worker: what it says beforehand is what is billed afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from redis.asyncio import Redis

from processor.adapters import topics
from processor.adapters.avro import encode_request, request_key
from processor.adapters.catalogue import load_catalogue
from processor.adapters.kafka import connection
from processor.adapters.murmur2 import partition_of
from processor.adapters.reader import KafkaReader
from processor.adapters.redis_cache import KEY_PREFIX, RedisCache
from processor.agents import FILL_WAIT_S
from processor.app import worker_policy
from processor.cache import CacheKeys
from processor.decode import Checker
from processor.domain import Entry, Item, Request, TokenSource, Usage
from processor.work import Plan
from tests.support.audit import read_topic
from tests.support.brokers import Broker
from tests.support.builders import a_request, a_vector
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Stack, until
from tests.support.world import PATIENT

CANARY = "canary-77d0"
PARTITIONS = 2


@pytest.fixture
def provider() -> Iterator[ProviderProcess]:
    with ProviderProcess() as running:
        yield running


@pytest.fixture
def stack(kafka: Broker, redis_url: str, unique: str, tmp_path: Path, provider: ProviderProcess) -> Iterator[Stack]:
    """Topics, a cache and a provider; no worker yet."""
    with Stack(
        tmp_path,
        unique,
        kafka.bootstrap_servers,
        EMBEDDING_PROVIDER="openai",
        EMBEDDING_OPENAI_BASE_URL=provider.base_url,
        EMBEDDING_OPENAI_API_KEY="tests",
        EMBEDDING_REDIS_URL=redis_url,
        EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL='{"text-embedding-3-small": 8}',
        **PATIENT,
    ) as prepared:
        asyncio.run(topics.create(prepared.settings(), partitions=PARTITIONS, replication=1))
        yield prepared


async def quote(stack: Stack, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON that the command prints; no text of ours is in it."""
    code, out, err = await run(stack, "quote", *arguments, "--json", **environment)
    assert code == 0, err
    assert CANARY not in out + err
    said: dict[str, Any] = json.loads(out.splitlines()[-1])
    return said


async def run(stack: Stack, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "processor", *arguments),
        env=os.environ | stack.environment | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def send(stack: Stack, requests: list[Request]) -> None:
    settings = stack.settings()
    name = settings.topic(topics.topics()["requests"].name)
    async with AIOKafkaProducer(**connection(settings)) as producer:
        for request in requests:
            key = request_key(request)
            partition = None if key is None else partition_of(key, PARTITIONS)
            await producer.send(name, encode_request(request), key=key, partition=partition)
        await producer.send(name, b"no request " + CANARY.encode(), partition=0)


@dataclass(frozen=True)
class Bill:
    """What the provider has in its ledger, what was charged, and how long the worker took."""

    calls: int
    tokens: int
    charges: list[Usage]
    seconds: float

    def has_calls_of(self, quoted: dict[str, Any]) -> bool:
        """As many, and one for each time at most that a busy machine let the worker's patience end before a call was
        full; in virtual time they are the same.
        """
        return bool(quoted["calls"] <= self.calls <= quoted["calls"] + self.seconds / FILL_WAIT_S)


async def bill(stack: Stack, provider: ProviderProcess, requests: int) -> Bill:
    """Run a worker until so many requests are charged and all that was sent is committed."""
    began = time.monotonic()
    worker = stack.spawn("worker")
    settings = stack.settings()
    topic = settings.topic(topics.topics()["requests"].name)
    reader = KafkaReader(settings, group_id=f"{settings.group_id}-{settings.lane}")
    charges: dict[str, Usage] = {}

    async def charged() -> bool:
        worker.check()
        async for _, usage in read_topic(settings, "usage", Usage):
            charges.setdefault(usage.request_id, usage)
        return len(charges) >= requests

    async def committed() -> bool:
        done = await reader.committed(topic)
        return all(done.get(place, 0) >= span.end for place, span in (await reader.spans(topic)).items())

    await until(charged, within_s=120, what="a charge for each request", every_s=0.5)
    seconds = time.monotonic() - began
    await until(committed, within_s=60, what="nothing is left", every_s=0.2)
    assert worker.stop() == 0, worker.tail()
    ledger = provider.admin("ledger")
    return Bill(len(ledger["requests"]), ledger["billed_tokens"], list(charges.values()), seconds)


def a_corpus() -> list[Request]:
    """More than two full calls, in documents of two tenants: texts that repeat, fail, do without the cache."""
    requests = [
        a_request(
            [f"{CANARY} {place} {number} " + "word " * (number % 50) for number in range(100)],
            tenant_id=("acme", "beta")[place % 2],
            correlation_id=f"r{place}",
            document_id=f"d{place}",
        )
        for place in range(45)
    ]
    again = a_request(["again", "again", "again"], correlation_id="again")
    return [
        *requests,
        again,
        again,
        a_request(["again"], correlation_id="alone", use_cache=False),
        a_request([" ", "word " * 9_000], correlation_id="bad"),
        a_request(["word " * 9_000], correlation_id="cut", truncate="truncate_end"),
        a_request(["x"], correlation_id="unknown", model="nobody-knows"),
        a_request(["x"], correlation_id="check", action="validate"),
    ]


async def test_a_quote_of_a_topic_is_the_bill_of_a_fresh_corpus(stack: Stack, provider: ProviderProcess) -> None:
    """Calls, tokens and cost are those of the provider's ledger and of the usage events; afterwards nothing is left."""
    corpus = a_corpus()
    await send(stack, corpus)
    quoted = await quote(stack, "embedding-requests")
    assert provider.admin("ledger")["requests"] == []
    assert (quoted["copies"], quoted["others"], quoted["unreadable"]) == (1, 1, {"undecodable": 1})
    assert quoted["refused"] == {"unknown_model": 1}
    assert quoted["failed_texts"] == {"empty_text": 1, "text_too_long": 1}
    assert (quoted["repeated_texts"], quoted["cached_texts"], quoted["truncated_texts"]) == (2, 0, 1)
    assert quoted["token_source"] == "tokenizer"

    billed = await bill(stack, provider, requests=quoted["requests"] + quoted["refused"]["unknown_model"])
    assert quoted["calls"] == 4, "three of 4,503 texts, and one of a text that may be cut"
    assert billed.has_calls_of(quoted), billed.calls
    assert quoted["tokens"] == billed.tokens
    assert quoted["tokens"] == sum(usage.billed.tokens for usage in billed.charges)
    assert quoted["texts_to_embed"] == sum(usage.billed.texts for usage in billed.charges)
    assert quoted["cost_nanos"] == sum(usage.billed.cost_nanos or 0 for usage in billed.charges) > 0

    left = await quote(stack, "embedding-requests")
    assert (left["requests"], left["texts"], left["tokens"]) == (0, 0, 0)
    whole = await quote(stack, "embedding-requests", "--from", "beginning")
    assert whole["texts"] == quoted["texts"]
    assert (whole["texts_to_embed"], whole["calls"], whole["cost_nanos"]) == (0, 0, 0)
    assert whole["cached_texts"] == whole["texts"] - sum(whole["failed_texts"].values())
    of_one = await quote(stack, "embedding-requests", "--from", "beginning", "--tenant", "beta")
    assert of_one["texts"] == 2200
    other = await quote(stack, "embedding-requests", "--from", "beginning", "--model", "text-embedding-3-large")
    assert other["texts_to_embed"] == quoted["texts_to_embed"] + 1, "what named a model that nobody knows is served now"
    assert list(other["spaces"]) == ["text-embedding-3-large@1/3072/l2"]


async def test_a_quote_of_files_is_the_bill_of_producing_them(
    stack: Stack, provider: ProviderProcess, tmp_path: Path
) -> None:
    """Before `produce` it is what the provider bills then; after it all is in that tenant's cache."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in range(3):
        paragraphs = [f"{CANARY} of {name}: " + f"line {line}. " * 40 for line in range(30)]
        (folder / f"{name}.txt").write_text("\n\n".join([*paragraphs, paragraphs[0]]), encoding="utf-8")
    arguments = str(folder), "--tenant", "acme", "--max-characters", "500"
    quoted = await quote(stack, *arguments)
    assert quoted["requests"] == 3
    assert quoted["repeated_texts"] > 0
    code, _, err = await run(stack, "produce", *arguments)
    assert code == 0, err
    billed = await bill(stack, provider, requests=3)
    assert quoted["tokens"] == billed.tokens
    assert billed.has_calls_of(quoted), billed.calls
    assert quoted["cost_nanos"] == sum(usage.billed.cost_nanos or 0 for usage in billed.charges)
    known = await quote(stack, *arguments)
    assert (known["texts_to_embed"], known["cached_texts"]) == (0, quoted["texts"])
    assert (await quote(stack, str(folder), "--max-characters", "500"))["texts_to_embed"] == quoted["texts_to_embed"]


async def test_a_quote_leaves_the_cache_as_it_is(stack: Stack, tmp_path: Path) -> None:
    """A broken entry is no hit, and is left for a worker to delete."""
    files = [tmp_path / "good.txt", tmp_path / "bad.txt"]
    for file in files:
        file.write_text(file.stem, encoding="utf-8")
    settings = stack.settings()
    plan = Checker(worker_policy(settings, {}), load_catalogue(settings)).check(a_request(), 0)
    assert isinstance(plan, Plan)
    assert plan.function is not None
    keys = CacheKeys(settings.cache_secret.get_secret_value().encode())
    good, bad = (keys.present("acme", plan.function, text, None) for text in ("good", "bad"))
    entry = Entry(a_vector(8), 1, Item("somebody", 0), "attempt", TokenSource.PROVIDER)
    cache, raw = RedisCache.from_settings(settings), Redis.from_url(settings.redis_url or "")
    try:
        await cache.put_many({good: entry, bad: entry})
        await raw.setrange(KEY_PREFIX + bad, 30, b"broken")
        spoilt = await raw.get(KEY_PREFIX + bad)
        quoted = await quote(stack, *map(str, files), "--tenant", "acme")
        assert (quoted["texts_to_embed"], quoted["cached_texts"]) == (1, 1)
        assert await raw.get(KEY_PREFIX + bad) == spoilt
    finally:
        await cache.close()
        await raw.aclose()


async def test_a_cache_that_is_away_is_said_so(stack: Stack, tmp_path: Path) -> None:
    """The quote is made without it."""
    (tmp_path / "one.txt").write_text("one text", encoding="utf-8")
    quoted = await quote(
        stack, str(tmp_path / "one.txt"), "--tenant", "acme", EMBEDDING_REDIS_URL="redis://127.0.0.1:1/0"
    )
    assert quoted["texts_to_embed"] == 1
    assert quoted["cache_unavailable"]
    assert any("did not answer" in sentence for sentence in quoted["assumed"])


async def test_what_is_neither_file_nor_topic_is_said_so(stack: Stack) -> None:
    """With the names of the topics that there are."""
    code, out, err = await run(stack, "quote", "embedding-request")
    assert (code, out) == (1, "")
    assert "embedding-request: no such file, directory or topic" in err
    assert stack.settings().topic("embedding-requests") in err
