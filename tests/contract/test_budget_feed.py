"""A worker's view of the budgets, over real brokers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from processor.accounts import EVERYBODY_ELSE, Budget, BudgetKey, BudgetState
from processor.adapters.avro import Codec
from processor.adapters.budget_feed import NO_VIEW, BudgetFeed
from processor.adapters.murmur2 import partition_of
from processor.errors import BrokerUnavailable, TopicsError
from processor.ports import Destination
from processor.settings import Settings
from tests.support.brokers import Broker, Servers, create_topic
from tests.support.builders import NOW_MS
from tests.support.kafka import ApacheKafka
from tests.support.stack import PATIENCE_S, until

PARTITIONS = 3
NOW = "2026-09"
DAY_MS = 86_400_000


def spent(payer_id: str, *, month: str = NOW, percent: int = 100, hard: bool = True) -> BudgetState:
    return BudgetState(
        key=BudgetKey(payer_id, month),
        budget=Budget(max_tokens=10, max_cost_nanos=None, hard=hard),
        billed_tokens=10,
        billed_cost_nanos=0,
        unpriced_tokens=0,
        reached_percent=percent,
        updated_at_ms=NOW_MS,
    )


class Topic:
    """A budgets topic of one test, and the settings that name it."""

    def __init__(self, bootstrap_servers: str, unique: str, **settings: Any) -> None:
        self.settings = Settings(bootstrap_servers=bootstrap_servers, topic_prefix=f"{unique}.", **settings)
        self.name = self.settings.topic("usage-budgets")
        self.codec = Codec()

    async def make(self) -> None:
        await create_topic(
            self.settings.bootstrap_servers, self.name, partitions=PARTITIONS, configs={"cleanup.policy": "compact"}
        )

    async def delete(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_topics([self.name])
            await until(lambda: self._is_gone(admin), within_s=PATIENCE_S, what="the topic is gone")
        finally:
            await admin.close()

    async def remake(self) -> None:
        await self.delete()
        await self.make()

    async def _is_gone(self, admin: AIOKafkaAdminClient) -> bool:
        return self.name not in await admin.list_topics()

    async def publish(self, *messages: BudgetState | BudgetKey) -> None:
        encoded = [self.codec.encode(Destination("budgets", message)) for message in messages]
        await self.write(*((each.key or b"", each.value) for each in encoded))

    async def write(self, *records: tuple[bytes, bytes | None], partition: int | None = None) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.settings.bootstrap_servers) as producer:
            for key, value in records:
                place = partition_of(key, PARTITIONS) if partition is None else partition
                await producer.send_and_wait(self.name, value, key=key, partition=place)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[BudgetFeed]:
        feed = BudgetFeed(self.settings, self.codec)
        await feed.start()
        task = asyncio.create_task(feed.run())
        try:
            yield feed
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await feed.close()


def refuses(feed: BudgetFeed, payer_id: str, at_ms: int = NOW_MS) -> bool:
    state = feed.state(payer_id, at_ms)
    return state is not None and state.refuses


async def comes(feed: BudgetFeed, payer_id: str, refused: bool) -> None:
    await until(
        lambda: refuses(feed, payer_id) is refused, within_s=PATIENCE_S, what=f"{payer_id} is refused: {refused}"
    )


async def refresh(followed: Any) -> None:
    """Its metadata. A follower that has noticed by itself has closed this consumer, which then answers nothing."""
    with suppress(TimeoutError):
        await asyncio.wait_for(followed._client.force_metadata_update(), 1)


@pytest.fixture(params=["kafka", "embedded"])
async def topic(request: pytest.FixtureRequest, servers: Servers, unique: str) -> Topic:
    broker: Broker = request.getfixturevalue("kafka" if request.param == "kafka" else "embedded_broker")
    topic = Topic(broker.bootstrap_servers, unique, producer_idempotent=broker.is_apache_kafka)
    await topic.make()
    return topic


async def test_all_of_the_topic_is_known_when_it_has_started(topic: Topic) -> None:
    """The newest record of each key counts: raised, taken back, soft and unreadable ones refuse nothing."""
    await topic.publish(
        *(spent(f"payer-{n}") for n in range(20)),
        spent("raised"),
        spent("removed"),
        spent("soft", hard=False),
        spent("nearly", percent=80),
        spent("before", month="2026-08"),
    )
    await topic.publish(spent("raised", percent=50), BudgetKey("removed", NOW))
    await topic.write((b"no key", b"no state"), (b'["unreadable","2026-09"]', b"no state"))
    async with topic.followed() as feed:
        assert all(refuses(feed, f"payer-{n}") for n in range(20))
        others = ["raised", "removed", "soft", "nearly", "before", "unreadable", "unknown"]
        assert [name for name in others if refuses(feed, name)] == []
        assert feed.refused == 21


async def test_the_month_is_that_of_the_request(topic: Topic) -> None:
    """A budget spent in September refuses what was appended in September, whenever it is read."""
    await topic.publish(spent("acme"))
    async with topic.followed() as feed:
        assert [refuses(feed, "acme", NOW_MS + days * DAY_MS) for days in (-25, -20, 9, 10)] == [
            False,
            True,
            True,
            False,
        ]


async def test_who_has_no_state_has_that_of_everybody_else(topic: Topic) -> None:
    """A default budget is known before its first charge; a state of one's own, spent or not, comes first."""
    await topic.publish(spent(EVERYBODY_ELSE), spent("acme", percent=50))
    async with topic.followed() as feed:
        assert [refuses(feed, "acme"), refuses(feed, "anybody")] == [False, True]


async def test_what_is_published_later_is_followed(topic: Topic) -> None:
    """Spent, raised, spent again, taken back; and the view is never old while the broker answers."""
    async with topic.followed() as feed:
        assert not refuses(feed, "acme")
        steps: list[tuple[BudgetState | BudgetKey, bool]] = [
            (spent("acme"), True),
            (spent("acme", percent=80), False),
            (spent("acme"), True),
            (BudgetKey("acme", NOW), False),
        ]
        for message, refused in steps:
            await topic.publish(message)
            await comes(feed, "acme", refused)
        await until(lambda: 0 <= feed.age_s < 5, within_s=PATIENCE_S, what="the brokers have confirmed the view")
    assert feed.age_s == NO_VIEW


async def test_without_the_topic_or_its_broker_it_does_not_start(kafka: Broker, unique: str) -> None:
    """The message says what to run or to check."""
    with pytest.raises(TopicsError, match="topics create"):
        await BudgetFeed(Topic(kafka.bootstrap_servers, unique).settings, Codec()).start()
    nowhere = Topic("127.0.0.1:1", unique, broker_wait_s=0)
    with pytest.raises(BrokerUnavailable):
        await BudgetFeed(nowhere.settings, Codec()).start()


async def test_a_topic_made_again_is_read_anew(kafka: Broker, unique: str) -> None:
    """What stood in the old one refuses nobody any more."""
    topic = Topic(kafka.bootstrap_servers, unique)
    await topic.make()
    await topic.publish(*[spent("old")] * 5)
    async with topic.followed() as feed:
        assert refuses(feed, "old")
        await topic.remake()
        await topic.publish(spent("new"))
        await comes(feed, "new", True)
        await comes(feed, "old", False)


async def test_one_made_again_with_as_many_records_is_read_anew(kafka: Broker, unique: str) -> None:
    """Where a follower stood is in the new log too: it reads it from the beginning all the same."""
    topic = Topic(kafka.bootstrap_servers, unique)
    await topic.make()
    await topic.publish(spent("old"))
    async with topic.followed() as feed:
        followed = feed._consumer
        places = followed.assignment()
        followed.pause(*places)
        await topic.delete()

        async def knows_it_gone() -> bool:
            await refresh(followed)
            return feed._consumer is not followed or not followed._client.cluster.partitions_for_topic(topic.name)

        await until(knows_it_gone, within_s=PATIENCE_S, what="the follower knows that the topic is gone")
        await topic.make()
        await topic.publish(spent("new"))
        followed.resume(*places)
        await comes(feed, "new", True)
        await comes(feed, "old", False)


async def test_a_topic_that_has_grown_is_read_whole(kafka: Broker, unique: str) -> None:
    """States in its new partitions bind as well, as soon as a worker's metadata tells of them."""
    topic = Topic(kafka.bootstrap_servers, unique)
    await topic.make()
    async with topic.followed() as feed:
        followed = feed._consumer
        admin = AIOKafkaAdminClient(bootstrap_servers=topic.settings.bootstrap_servers)
        await admin.start()
        try:
            await admin.create_partitions({topic.name: NewPartitions(PARTITIONS + 1)})

            async def has_grown() -> bool:
                [told] = await admin.describe_topics([topic.name])
                return len(told["partitions"]) == PARTITIONS + 1

            await until(has_grown, within_s=PATIENCE_S, what="the broker tells of the new partition")
        finally:
            await admin.close()
        await topic.write(
            (b'["acme","2026-09"]', topic.codec.encode(Destination("budgets", spent("acme"))).value),
            partition=PARTITIONS,
        )
        await refresh(followed)
        await comes(feed, "acme", True)


async def test_the_last_view_stands_while_the_broker_is_away(kafka: Broker, unique: str) -> None:
    """Its age says so; once the broker is back, what is published then is seen."""
    with ApacheKafka() as own:
        topic = Topic(own.bootstrap_servers, unique)
        await topic.make()
        await topic.publish(spent("acme"))
        async with topic.followed() as feed:
            await until(lambda: 0 <= feed.age_s < 2, within_s=PATIENCE_S, what="the brokers have confirmed the view")
            await asyncio.to_thread(own.kill)
            await until(lambda: feed.age_s > 3, within_s=PATIENCE_S, what="the view grows old")
            assert refuses(feed, "acme")
            await asyncio.to_thread(own.start)
            await topic.publish(spent("other"), BudgetKey("acme", NOW))
            await comes(feed, "other", True)
            await comes(feed, "acme", False)
