"""The client and the command line against real processes on a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.client import Chunk, Client, Outcome, ReplyTo
from processor.domain import ReceivedResult
from processor.errors import BrokerUnavailable, DeliveryFailed, RequestRefused, TopicsError
from processor.settings import Settings
from tests.support.brokers import Broker
from tests.support.provider_server import ProviderProcess, expected_vector
from tests.support.stack import PATIENCE_S, Stack, until
from tests.support.world import PATIENT

DIMENSIONS = 8
NOWHERE = "127.0.0.1:1"
SPACE = f"text-embedding-3-small@1/{DIMENSIONS}/l2"


@dataclass(frozen=True)
class Service:
    """A running service as a caller sees it: an address, and the environment of the command line."""

    settings: Settings
    environment: dict[str, str]


@pytest.fixture(scope="module")
def service(kafka: Broker, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Workers of both lanes and the aggregator, ready; shared by this module, so a test has its own `tenant`."""

    async def prepare() -> None:
        await topics.create(stack.settings(), partitions=2, replication=1)
        children = [stack.spawn("worker"), stack.spawn("worker", "--lane", "interactive"), stack.spawn("aggregator")]
        for child in children:
            await until(child.ready, within_s=2 * PATIENCE_S, what=f"{child.name} is ready")

    with (
        ProviderProcess() as provider,
        Stack(
            tmp_path_factory.mktemp("service"),
            f"client-{uuid.uuid4().hex[:8]}",
            kafka.bootstrap_servers,
            EMBEDDING_PROVIDER="openai",
            EMBEDDING_OPENAI_BASE_URL=provider.base_url,
            EMBEDDING_OPENAI_API_KEY="tests",
            EMBEDDING_REDIS_URL=redis_url,
            EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL=f'{{"text-embedding-3-small": {DIMENSIONS}}}',
            **PATIENT,
        ) as stack,
    ):
        asyncio.run(prepare())
        yield Service(stack.settings(), stack.environment)


@pytest.fixture
def tenant(unique: str) -> str:
    """Whose records a test looks at."""
    return unique


def texts(count: int, name: str) -> list[str]:
    return [f"{name} {place}" for place in range(count)]


def assert_vectors(outcomes: list[Outcome], wanted: list[str]) -> None:
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(wanted)
    for outcome, text in zip(outcomes, wanted, strict=True):
        assert outcome.vector is not None
        assert np.allclose(outcome.vector, expected_vector(text, DIMENSIONS), atol=1e-5)


async def cli(service: Service, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    return await python(service, "-m", "processor", *arguments)


async def python(service: Service, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=os.environ | service.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 2 * PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_caller_gets_the_outcome_of_each_text_in_order(service: Service, tenant: str) -> None:
    """Several calls at once, from clients that share the reply partitions: each gets its own, failures as values."""
    wanted = [texts(5, f"call {call}") for call in range(8)]
    async with Client(service.settings) as one, Client(service.settings) as two:
        calls = [(one, two)[place % 2].embed(batch, tenant_id=tenant) for place, batch in enumerate(wanted)]
        for batch, outcomes in zip(wanted, await asyncio.gather(*calls), strict=True):
            assert_vectors(outcomes, batch)
        mixed = await one.embed(["good", " ", "also good"], tenant_id=tenant)
        assert [outcome.status for outcome in mixed] == ["ok", "error", "ok"]
        assert mixed[1].error is not None
        assert (mixed[1].error.code, mixed[1].error.field) == ("empty_text", "chunks.text")
        unknown = await one.embed(["a", "b"], tenant_id=tenant, model="nobody-knows")
        assert [outcome.error and outcome.error.code for outcome in unknown] == ["unknown_model"] * 2
        checked = await one.embed(["fine", ""], tenant_id=tenant, action="validate")
        assert [outcome.status for outcome in checked] == ["valid", "invalid"]
        query = await one.embed_query("what is asked", tenant_id=tenant, timeout_s=PATIENCE_S)
        assert_vectors([query], ["what is asked"])
        assert query.result is not None
        assert query.result.operation == "query"


async def test_what_is_too_large_is_split_and_comes_back_whole(service: Service, tenant: str) -> None:
    """2,049 chunks are two requests, and one list of outcomes with the indices of the whole."""
    async with Client(service.settings) as client:
        wanted = texts(2_049, "many")
        outcomes = await client.embed(wanted, tenant_id=tenant, timeout_s=120)
        assert_vectors(outcomes, wanted)
        assert [outcome.index for outcome in outcomes] == list(range(2_049))
        assert len({outcome.request_id for outcome in outcomes}) == 2


async def test_the_same_call_again_is_one_charge(service: Service, tenant: str) -> None:
    """With its correlation id repeated a request has one usage event that counts, and results pass once."""
    async with Client(service.settings) as client:
        calls = (client.embed(["pay once"], tenant_id=tenant, correlation_id="again") for _ in range(2))
        first, second = await asyncio.gather(*calls)
        third = await client.embed(["pay once"], tenant_id=tenant, correlation_id="again")
        assert first[0].ok
        assert second[0].ok
        assert third[0].request_id == first[0].request_id
        (name,) = await client.submit(["another"], tenant_id=tenant, reply_to=None, correlation_id="submitted")
        assert first[0].request_id == second[0].request_id != name
        charged: list[str] = []

        async def both_charged() -> bool:
            async with aclosing(client.usage(follow=False)) as usage:
                charged[:] = [event.request_id async for event in usage if event.payer_id == tenant]
            return len(charged) >= 2

        await until(both_charged, within_s=PATIENCE_S, what="both requests are charged", every_s=0.2)
        assert sorted(charged) == sorted([first[0].request_id, name])
        seen: list[tuple[str, int]] = []

        async def both_seen() -> bool:
            async with aclosing(client.results(follow=False)) as results:
                mine = [result async for result in results if result.tenant_id == tenant]
            seen[:] = [(result.request_id, result.chunk_index) for result in mine]
            return len(seen) >= 2

        await until(both_seen, within_s=PATIENCE_S, what="the results of both", every_s=0.2)
        assert sorted(seen) == sorted([(first[0].request_id, 0), (name, 0)])


async def test_results_can_be_followed_from_now_on(service: Service, tenant: str) -> None:
    """A reader that begins at the present end sees what comes after, and nothing before."""
    async with Client(service.settings) as client:
        await client.embed(["before"], tenant_id=tenant, correlation_id="old")

        async def first_of_mine(*, follow: bool) -> str | None:
            async with aclosing(client.results(from_beginning=not follow, follow=follow)) as results:
                async for result in results:
                    if result.tenant_id == tenant:
                        return result.correlation_id
            return None

        async def old_is_there() -> bool:
            """Its copy may be heard before it is in the log of the results."""
            return await first_of_mine(follow=False) == "old"

        await until(old_is_there, within_s=PATIENCE_S, what="the result of before")
        coming = asyncio.ensure_future(first_of_mine(follow=True))
        for place in range(100):
            await client.embed(["after"], tenant_id=tenant, correlation_id=f"new {place}")
            if coming.done():
                break
        assert (await asyncio.wait_for(coming, PATIENCE_S) or "").startswith("new")


async def test_a_reply_goes_where_the_caller_says(service: Service, tenant: str) -> None:
    """A submitted request's copy arrives on the partition named, and echoes the reply type."""
    topic = service.settings.topic("embedding-replies")
    async with Client(service.settings) as client:
        (name,) = await client.submit(["call back"], tenant_id=tenant, reply_to=ReplyTo(topic, 1, "callback"))
    reader, codec = KafkaReader(service.settings, group_id="none"), Codec()
    replies: list[tuple[str, str | None, int]] = []

    async def arrived() -> bool:
        replies.clear()
        async for records in reader.read(topic):
            for record in records:
                reply = await codec.read(ReceivedResult, record.value)
                assert isinstance(reply, ReceivedResult)
                if reply.tenant_id == tenant:
                    replies.append((reply.request_id, reply.reply_type, record.source.partition))
        return bool(replies)

    await until(arrived, within_s=PATIENCE_S, what="the reply", every_s=0.2)
    assert replies == [(name, "callback", 1)]


async def test_a_replaced_document_leaves_no_stale_chunk(service: Service, tenant: str) -> None:
    """What the new version lacks gets a tombstone, single chunks can be deleted, and no chunks delete it all."""
    reader, codec = KafkaReader(service.settings, group_id="none"), Codec()
    where: dict[str, Any] = {"tenant_id": tenant, "collection": "docs", "document_id": "doc"}

    async def live() -> int:
        newest: dict[bytes | None, bytes | None] = {}
        async for records in reader.read(service.settings.topic("embedding-vectors")):
            newest |= {record.key: record.value for record in records}
        vectors = [await codec.read(ReceivedResult, value) for value in newest.values() if value is not None]
        return sum(isinstance(vector, ReceivedResult) and vector.tenant_id == tenant for vector in vectors)

    async def holds(count: int) -> None:
        async def held() -> bool:
            return await live() == count

        await until(held, within_s=PATIENCE_S, what=f"{count} live vectors", every_s=0.2)

    async with Client(service.settings) as client:
        assert (await client.replace_document(texts(4, "v1"), **where)).ok
        await holds(4)
        done = await client.replace_document([Chunk("0", "v2 0"), Chunk("1", "v2 1")], **where)
        assert done.ok
        assert done.chunks[0].result is not None
        assert done.chunks[0].result.vector_space == SPACE
        await holds(2)
        assert [outcome.ok for outcome in await client.delete(["1"], **where)] == [True]
        await holds(1)
        assert (await client.replace_document([], **where)).manifest.ok
        await holds(0)


async def test_no_answer_in_time_is_a_value(kafka: Broker, unique: str) -> None:
    """Without a worker each text is timed out, within the time, and the request is safely on its topic."""
    settings = Settings(bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.")
    await topics.create(settings, partitions=2, replication=1)
    async with Client(settings) as client:
        outcomes = await client.embed(["a", "b"], tenant_id="acme", timeout_s=6)  # time enough to send it
        assert [(outcome.status, outcome.vector) for outcome in outcomes] == [("timed_out", None)] * 2
    requests = KafkaReader(settings, group_id="none").read(settings.topic("embedding-requests"))
    assert sum([len(records) async for records in requests]) == 1


async def test_bad_input_sends_nothing(kafka: Broker, unique: str) -> None:
    """A refused call, even one whose second request is at fault, leaves no record."""
    settings = Settings(bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.")
    await topics.create(settings, partitions=2, replication=1)
    async with Client(settings) as client:
        with pytest.raises(RequestRefused, match="tenant_id"):
            await client.submit(["a"], tenant_id="")
        with pytest.raises(RequestRefused, match=r"chunks\[1\]"):
            await client.embed([Chunk("a", "x"), Chunk("a", "y")], tenant_id="acme")
        too_many = [Chunk(f"{place:0500d}", "x") for place in range(2_000)]
        with pytest.raises(RequestRefused, match="a manifest is at most"):
            await client.replace_document(too_many, tenant_id="acme", collection=None, document_id="d")
    requests = KafkaReader(settings, group_id="none").read(settings.topic("embedding-requests"))
    assert [records async for records in requests] == []


async def test_a_missing_topic_and_a_missing_broker_are_named(kafka: Broker, unique: str) -> None:
    """The caller reads what to do: make the topics, or look at the address."""
    async with Client(Settings(bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.")) as client:
        with pytest.raises(TopicsError, match="topics create"):
            await client.submit(["a"], tenant_id="acme")
    with pytest.raises(BrokerUnavailable, match="EMBEDDING_BOOTSTRAP_SERVERS"):
        async with Client(bootstrap_servers=NOWHERE):
            pass


async def test_after_a_failed_delivery_the_client_goes_on(kafka: Broker, unique: str) -> None:
    """A record that the broker refuses is a DeliveryFailed, and the next call has a producer that works."""
    settings = Settings(bootstrap_servers=kafka.bootstrap_servers, topic_prefix=f"{unique}.")
    await make_requests_topic(settings, {"max.message.bytes": "2000"})
    async with Client(settings) as client:
        with pytest.raises(DeliveryFailed, match="same correlation_id"):
            await client.submit(["x" * 5_000], tenant_id="acme")
        assert len(await client.submit(["small"], tenant_id="acme")) == 1


async def make_requests_topic(settings: Settings, config: dict[str, str]) -> None:
    """All topics, the request topic with these settings."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(settings.topic("embedding-requests"), 1, 1, None, config)])
    finally:
        await admin.close()
    await topics.create(settings, partitions=1, replication=1)


async def test_the_command_line_from_files_to_a_bill(service: Service, tenant: str, tmp_path: Path) -> None:
    """Topics are checked, files produced and awaited, results and totals printed as JSON, the doctor content."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("First paragraph.\n\n" + "A sentence. " * 20)
    (folder / "b.txt").write_text("Another document.")
    (folder / "c.txt").write_text(" \n")
    code, out, err = await cli(service, "topics", "check", "--json")
    assert (code, out, err) == (0, "", "")
    code, out, err = await cli(
        service, "produce", str(folder), "--tenant", tenant, "--max-characters", "100", "--wait", "--json"
    )
    assert (code, err) == (0, f"{folder}/c.txt: holds no text, nothing sent\n")
    summary = json.loads(out)
    assert summary == {
        "documents": 2,
        "chunks": summary["ok"],
        "waited": True,
        "ok": summary["ok"],
        "failed": 0,
        "timed_out": 0,
    }
    assert summary["ok"] >= 4
    results: list[dict[str, Any]] = []

    async def printed() -> bool:
        code, out, _ = await cli(service, "results", "--tenant", tenant, "--json", "--vectors")
        results[:] = [json.loads(line) for line in out.splitlines()]
        return code == 0 and len(results) >= summary["ok"]

    await until(printed, within_s=PATIENCE_S, what="the results of all chunks")
    assert len(results) == summary["ok"]
    assert all(len(result["vector"]) == DIMENSIONS for result in results)
    code, out, _ = await cli(service, "results", "--tenant", tenant, "--json")
    assert "vector" not in json.loads(out.splitlines()[0])

    async def billed() -> bool:
        code, out, _ = await cli(service, "usage", "report", "--payer", tenant, "--json")
        *_, total = [json.loads(line) for line in out.splitlines()]
        return code == 0 and total["billed_texts"] == summary["ok"]

    await until(billed, within_s=PATIENCE_S, what="the totals account for the texts")
    code, out, _ = await cli(service, "usage", "report", "--payer", tenant, "--by", "operation")
    assert (code, "document" in out) == (0, True)
    code, out, _ = await cli(service, "doctor", "--json")
    assert code == 0, out
    assert {check["state"] for check in map(json.loads, out.splitlines())} == {"ok"}


async def test_the_readmes_example_does_what_it_says(service: Service, tmp_path: Path) -> None:
    """Run as it stands there, it prints a nearest chunk and the outcomes shown below it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    _, example, below = re.split(r"```python\n|```\n", readme, maxsplit=2)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    (tmp_path / "example.py").write_text(example)
    code, out, err = await python(service, str(tmp_path / "example.py"))
    assert (code, err) == (0, "")
    shown = [line.strip() for line in below.splitlines()[1:4]]
    assert shown[0] == "nearest: diet"  # by a model that knows words; the tests' provider knows none
    assert out.splitlines()[0] in {"nearest: intro", "nearest: diet"}
    assert out.splitlines()[1:] == shown[1:]


async def test_a_failed_chunk_is_printed_and_ends_with_1(service: Service, tmp_path: Path) -> None:
    """`produce --wait` says which chunk of which file failed and why."""
    (tmp_path / "a.txt").write_text("Some text.")
    command = ["produce", str(tmp_path / "a.txt"), "--tenant", "acme", "--model", "nobody-knows", "--wait"]
    code, out, err = await cli(service, *command)
    assert code == 1
    assert "0 ok, 1 failed" in out
    assert "a.txt 0: error: model: not in the catalogue" in err


async def test_topics_are_made_once(kafka: Broker, unique: str, redis_url: str) -> None:
    """`topics check` ends with 1 before and 0 after `topics create`, which makes nothing the second time."""
    environment = {"EMBEDDING_BOOTSTRAP_SERVERS": kafka.bootstrap_servers, "EMBEDDING_TOPIC_PREFIX": f"{unique}."}
    service = Service(Settings(), environment)
    assert (await cli(service, "topics", "check"))[0] == 1
    code, out, _ = await cli(service, "topics", "create", "--partitions", "1", "--json")
    assert code == 0
    assert len(json.loads(out)["made"]) == len(topics.topics())
    assert (await cli(service, "topics", "check"))[:2] == (0, "every topic is as described\n")
    assert json.loads((await cli(service, "topics", "create", "--json"))[1]) == {"made": []}


@pytest.mark.parametrize(
    "command", ["topics check", "usage report --json", "results", "produce README.md --tenant acme"]
)
async def test_brokers_out_of_reach_end_with_3(command: str) -> None:
    """Scripts can tell an outage from a fault of what they asked for."""
    nowhere = Service(Settings(), {"EMBEDDING_BOOTSTRAP_SERVERS": NOWHERE})
    code, out, err = await cli(nowhere, *command.split())
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err


async def test_the_doctor_names_cause_and_fix_of_each_fault() -> None:
    """No broker, no Redis, no registry, no key: all in one run, exit code 1."""
    environment = {
        "EMBEDDING_BOOTSTRAP_SERVERS": NOWHERE,
        "EMBEDDING_REDIS_URL": f"redis://{NOWHERE}",
        "EMBEDDING_SCHEMA_REGISTRY_URL": f"http://{NOWHERE}",
        "EMBEDDING_PROVIDER": "openai",
        "EMBEDDING_OPENAI_API_KEY": "",
        "OPENAI_API_KEY": "",
    }
    code, out, _ = await cli(Service(Settings(), environment), "doctor", "--json")
    assert code == 1
    checks = {check["name"]: check for check in map(json.loads, out.splitlines())}
    assert {name: check["state"] for name, check in checks.items()} == {
        "settings": "ok",
        "budgets": "ok",
        "broker": "error",
        "cache": "error",
        "registry": "error",
        "provider": "error",
    }
    assert NOWHERE in checks["broker"]["what"]
    assert all(check["fix"] for check in checks.values() if check["state"] == "error")
