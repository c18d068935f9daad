"""The aggregator killed while usage flows: its store kept, its store lost, a standby with a store of its own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

from aiokafka import AIOKafkaProducer

from processor.accounts import BucketKey
from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.kafka import connection
from processor.adapters.murmur2 import partition_of
from processor.adapters.reader import KafkaReader
from processor.cli.totals import read_totals
from processor.domain import Amounts, CallKind, CallOutcome, Part, Source, Usage
from processor.ports import Destination
from processor.settings import Settings
from tests.support.aggregation import charges, recomputed
from tests.support.brokers import Broker
from tests.support.builders import a_call, a_request, a_usage
from tests.support.stack import Child, Stack, until

PARTITIONS = 4
TOKENS = 3


def some_traffic(count: int, dice: random.Random) -> list[Destination]:
    """Charges of a dozen tasks, each after the bill of its attempt; every fourth is a copy of an earlier one."""
    now_ms = int(time.time() * 1000)
    messages: list[Destination] = []
    sent: list[Destination] = []
    for number in range(count):
        if sent and dice.random() < 0.25:
            messages.append(dice.choice(sent))
            continue
        attempt = f"attempt-{number}-{dice.random()}"
        receipt = a_call(CallKind.RECEIPT, attempt_id=attempt, outcome=CallOutcome.OK, billed_tokens=TOKENS)
        messages += [Destination("calls", a_call(attempt_id=attempt)), Destination("calls", receipt)]
        request = a_request(tenant_id=f"p{dice.randrange(12)}", correlation_id=attempt, task_id="task")
        usage = a_usage(request, charged_at_ms=now_ms, parts=(Part(attempt, TOKENS),), billed=Amounts(1, TOKENS, 5, 60))
        messages.append(Destination("usage", usage))
        sent.append(messages[-1])
    return messages


async def produce(settings: Settings, messages: Sequence[Destination], *, over_s: float) -> None:
    """Send in order, spread over the time."""
    codec = Codec()
    async with AIOKafkaProducer(**connection(settings), linger_ms=5) as producer:
        pieces = 50
        for piece in range(pieces):
            futures = []
            for message in messages[piece * len(messages) // pieces : (piece + 1) * len(messages) // pieces]:
                key, value, _ = codec.encode(message)
                topic = settings.topic(topics.topics()[message.name].name)
                partition = partition_of(key or b"", PARTITIONS)
                futures.append(await producer.send(topic, value, key=key, partition=partition))
            await asyncio.gather(*futures, asyncio.sleep(over_s / pieces))


def remove_store(path: Path) -> None:
    """The file and what SQLite keeps beside it."""
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()


async def history_of(settings: Settings) -> list[tuple[Source, Usage]]:
    codec = Codec()
    found = []
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    async for records in reader.read(settings.topic("token-usage")):
        for record in records:
            usage = await codec.read(Usage, record.value)
            assert isinstance(usage, Usage)
            found.append((record.source, usage))
    return found


def is_day_of_all(key: BucketKey) -> bool:
    """Every charge counts in one such bucket."""
    return key.dimension == "all" and len(key.bucket) == len("2026-11-21")


def attempts(child: Child) -> int:
    """How many provider calls it has folded."""
    child.check()
    return int((child.get("/ledger") or {}).get("attempts", 0))


async def killed_mid_stream(child: Child) -> None:
    """SIGKILL once it has folded some more."""
    before = int((await child.report("/ledger"))["attempts"])
    await until(lambda: attempts(child) > before + 50, within_s=60, what="some are folded")
    child.kill()


async def settled(settings: Settings, child: Child) -> None:
    """Wait until the totals are those of all that was produced, and the ledger has no residual."""
    expected = recomputed(charges(await history_of(settings)))

    async def equal() -> bool:
        child.check()
        ledger = child.get("/ledger") or {}
        charged = sum(sums.billed_tokens for key, sums in expected.items() if is_day_of_all(key))
        return await read_totals(settings) == expected and ledger.get("billed_tokens") == charged

    async def attributed() -> bool:
        ledger = await child.report("/ledger")
        return bool(ledger["billed_tokens"] == ledger["attributed_tokens"])

    await until(equal, within_s=60, what=f"totals equal the recomputation\n{child.tail()}", every_s=0.5)
    await until(attributed, within_s=60, what="every charge is attributed")
    ledger = await child.report("/ledger")
    assert ledger["billed_tokens"] == ledger["attributed_tokens"] > 0
    assert (ledger["residual_tokens"], ledger["over_attributed_tokens"], ledger["unmatched_tokens"]) == (0, 0, 0)


async def test_totals_equal_the_recomputation_whoever_is_killed(kafka: Broker, unique: str, tmp_path: Path) -> None:
    """Law 5 on Apache Kafka: kill -9 mid-stream, the store kept, then lost, then a standby with its own store."""
    dice = random.Random(4)
    store, other = tmp_path / "aggregator.sqlite", tmp_path / "standby.sqlite"
    with Stack(tmp_path, unique, kafka.bootstrap_servers) as stack:
        settings = stack.settings()
        await topics.create(settings, partitions=PARTITIONS)
        for lose in (False, False, True):
            child = stack.spawn("aggregator")
            await until(child.ready, within_s=60, what="the aggregator is ready")
            producing = asyncio.create_task(produce(settings, some_traffic(700, dice), over_s=3))
            await killed_mid_stream(child)
            await producing
            if lose:
                remove_store(store)
        child = stack.spawn("aggregator")
        await settled(settings, child)

        standby = stack.spawn("aggregator", EMBEDDING_AGGREGATOR_STORE=str(other))
        await until(standby.ready, within_s=60, what="the standby is ready")
        producing = asyncio.create_task(produce(settings, some_traffic(700, dice), over_s=3))
        await killed_mid_stream(child)
        await producing
        await settled(settings, standby)
        assert standby.stop() == 0, standby.tail()
