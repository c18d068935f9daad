"""`usage rebuild` on Apache Kafka: the usage topic is deleted and made again under an aggregator that knew it."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient

from processor.accounts import TaskKey, TaskProgress
from processor.adapters import topics
from processor.adapters.avro import Codec
from processor.adapters.reader import KafkaReader
from processor.cli.audit import read_progress
from processor.cli.totals import read_totals
from processor.settings import Settings
from tests.faults.test_aggregator_kills import PARTITIONS, history_of, produce, settled, some_traffic
from tests.support.aggregation import charges, recomputed
from tests.support.brokers import Broker
from tests.support.stack import Child, Stack, until


def rebuild(stack: Stack, *options: str) -> subprocess.CompletedProcess[str]:
    return stack.command("usage", "rebuild", *options)


async def once_the_group_is_empty(stack: Stack) -> subprocess.CompletedProcess[str]:
    """A rebuild that refuses no more for the sake of a member that crashed."""
    async with asyncio.timeout(60):
        while "stop the aggregator" in (done := rebuild(stack, "--yes")).stderr:
            await asyncio.sleep(0.5)
    return done


async def make_again(settings: Settings, topic: str = "token-usage") -> None:
    """Delete a topic and create it as it was."""
    name = settings.topic(topic)
    await delete(settings.bootstrap_servers, name)
    assert await topics.create(settings, partitions=PARTITIONS) == [name]


async def delete(bootstrap_servers: str, name: str) -> None:
    """Delete a topic; returns when the broker shows it no more."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([name])

        async def gone() -> bool:
            return name not in await admin.list_topics()

        await until(gone, within_s=30, what="the topic is gone")
    finally:
        await admin.close()


async def totals_are_those_of_the_log(settings: Settings) -> bool:
    return await read_totals(settings) == recomputed(charges(await history_of(settings)))


async def tasks_of(settings: Settings) -> dict[TaskKey, TaskProgress]:
    """What is published of each."""
    reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
    return await read_progress(settings.topic("task-progress"), reader, Codec())


async def folding(stack: Stack, dice: random.Random) -> Child:
    """An aggregator on new topics that has folded some usage."""
    settings = stack.settings()
    await topics.create(settings, partitions=PARTITIONS)
    child = stack.spawn("aggregator")
    await until(child.ready, within_s=60, what="the aggregator is ready")
    await produce(settings, some_traffic(100, dice), over_s=0)
    await settled(settings, child)
    return child


async def refuses(stack: Stack, child: Child) -> None:
    """It ends by itself and names the command that mends it.

    While there is no topic at all it may end for that reason; who supervises it starts it again.
    """
    await until(lambda: child.process.poll() is not None, within_s=60, what="the aggregator refuses")
    if "topics create" in child.tail():
        child = stack.spawn("aggregator")
        await until(lambda: child.process.poll() is not None, within_s=60, what="the next one refuses")
    assert child.process.returncode == 1, child.tail()
    assert "embedding-processor usage rebuild" in child.tail()


async def test_totals_begin_anew_when_the_usage_topic_was_made_again(
    kafka: Broker, unique: str, tmp_path: Path
) -> None:
    """The aggregator refuses and names the command, which refuses while one runs; then all is told by the log."""
    dice = random.Random(5)
    with Stack(tmp_path, unique, kafka.bootstrap_servers) as stack:
        settings = stack.settings()
        child = await folding(stack, dice)
        refused = rebuild(stack, "--yes")
        assert (refused.returncode, "stop the aggregator" in refused.stderr) == (1, True), refused.stderr
        assert child.stop() == 0, child.tail()
        assert await tasks_of(settings)

        await make_again(settings)
        await produce(settings, some_traffic(300, dice), over_s=0)
        await refuses(stack, stack.spawn("aggregator"))

        refused = await once_the_group_is_empty(stack)
        assert (refused.returncode, "--forget-totals" in refused.stderr) == (1, True), refused.stderr
        unanswered = rebuild(stack, "--forget-totals")
        assert (unanswered.returncode, settings.aggregator_store.exists()) == (1, True), unanswered.stderr
        done = rebuild(stack, "--forget-totals", "--yes")
        assert done.returncode == 0, done.stderr
        assert "NOT NEEDED" not in done.stdout
        assert "LOST" not in done.stdout
        assert (await read_totals(settings), await tasks_of(settings)) == ({}, {})
        reader = KafkaReader(settings, group_id=settings.aggregator_group_id)
        committed = await reader.committed(settings.topic("token-usage"))
        assert set(committed.values()) <= {0}
        assert "the former store is" in done.stdout
        assert not settings.aggregator_store.exists()

        child = stack.spawn("aggregator")
        await until(child.ready, within_s=60, what="the aggregator is ready again")
        await until(
            lambda: totals_are_those_of_the_log(settings), within_s=60, what="totals are those of the log", every_s=0.5
        )
        assert child.stop() == 0, child.tail()

        assert rebuild(stack, "--yes").returncode == 0
        child = stack.spawn("aggregator")
        await until(child.ready, within_s=60, what="the aggregator made its store again")
        await until(settings.aggregator_store.exists, within_s=60, what="the store is there")
        assert await totals_are_those_of_the_log(settings)
        assert child.stop() == 0, child.tail()
