"""A worker's view of the budgets: all of `usage-budgets`, read before work is taken and followed from then on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import KafkaError

from processor.accounts import EVERYBODY_ELSE, BudgetKey, BudgetState, budget_key_of, month_of
from processor.adapters import topics
from processor.adapters.kafka import answered, connection, unavailable
from processor.errors import BrokerUnavailable, RegistryUnavailable, TopicsError
from processor.ports import RecordReader, Undecodable
from processor.settings import Settings

POLL_MS = 1_000
IDLE_POLLS = 60
"""Empty polls in a row, short of the end, after which the broker is held to be gone."""
AGAIN_AFTER_S = 1.0

NO_VIEW = -1.0

log = structlog.get_logger(__name__)

States = dict[BudgetKey, BudgetState]


class BudgetFeed:
    """Implements `ports.Budgets` outside of any group. `start` it, let `run` follow, `close` it.

    While the broker or the schema registry is away the last view stands; `age_s` says since when. A follower that is
    in trouble begins anew with the whole topic, and its view is replaced once that is read.
    """

    def __init__(self, settings: Settings, decoder: RecordReader) -> None:
        self._settings = settings
        self._decoder = decoder
        self._topic = settings.topic(topics.topics()["budgets"].name)
        self._consumer: Any = None
        self._partitions: set[int] = set()
        self._changed = False
        self._states: States = {}

    def state(self, payer_id: str, charged_at_ms: int) -> BudgetState | None:
        if not self._states:
            return None
        month = month_of(charged_at_ms)
        state = self._states.get(BudgetKey(payer_id, month))
        return self._states.get(BudgetKey(EVERYBODY_ELSE, month)) if state is None else state

    @property
    def age_s(self) -> float:
        """Seconds since the brokers last said of every partition what it holds; -1 when there is no such answer."""
        consumer = self._consumer
        polled = [] if consumer is None else [consumer.last_poll_timestamp(place) for place in consumer.assignment()]
        return NO_VIEW if not polled or None in polled else max(0.0, time.time() - min(polled) / 1000)

    @property
    def refused(self) -> int:
        """How many payers' months are refused."""
        return sum(state.refuses for state in self._states.values())

    async def start(self) -> None:
        """Read all of the topic. Brokers that don't answer are waited for; raises BrokerUnavailable, TopicsError."""
        await answered(self._settings, self._begin)

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        while True:
            try:
                if self._consumer is None:
                    await self._begin()
                while not self._changed:
                    await self._take(self._consumer, self._states)
                log.warning("the last view of the budgets stands", why="the topic was deleted, or has grown")
                await self.close()
            except (KafkaError, OSError, BrokerUnavailable, RegistryUnavailable, TopicsError) as error:
                log.warning("the last view of the budgets stands", why=type(error).__name__)
                await self.close()
            await asyncio.sleep(AGAIN_AFTER_S)

    async def close(self) -> None:
        """Let go of the brokers, once `run` has ended."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()

    async def _begin(self) -> None:
        """A consumer that stands at the end of the topic, and the view of all before it."""
        count = (await topics.partition_counts(self._settings, [self._topic])).get(self._topic)
        if not count:
            raise TopicsError(f"{self._topic}: is missing; run `{topics.CREATE_COMMAND}`")
        places = [TopicPartition(self._topic, partition) for partition in range(count)]
        # No reset: positions that are not in the log are those of a topic that was made again with fewer records.
        consumer = AIOKafkaConsumer(
            group_id=None, enable_auto_commit=False, auto_offset_reset="none", **connection(self._settings)
        )
        states: States = {}
        self._changed, self._partitions = False, set(range(count))
        try:
            await consumer.start()
            consumer.assign(places)
            consumer._client.cluster.add_listener(self._note_changed)  # noqa: SLF001 - nothing public tells it
            for place, offset in (await consumer.beginning_offsets(places)).items():
                consumer.seek(place, offset)
            ends = await consumer.end_offsets(places)
            idle = 0
            # The position, not the last record's offset: the end of a compacted log may hold no record.
            while any([await consumer.position(place) < ends[place] for place in places]):
                idle = 0 if await self._take(consumer, states) else idle + 1
                if idle == IDLE_POLLS:
                    raise BrokerUnavailable("the broker sends nothing more of the budgets", may_pass=True)
        except (KafkaError, OSError) as error:
            await consumer.stop()
            raise unavailable(self._settings, error) from error
        except BaseException:
            await consumer.stop()
            raise
        self._consumer, self._states = consumer, states
        log.info("budgets read", states=len(states), refused=self.refused)

    def _note_changed(self, cluster: ClusterMetadata) -> None:
        """Of one made again with as many records, the positions would be in its log and the records passed over."""
        self._changed |= cluster.partitions_for_topic(self._topic) != self._partitions

    async def _take(self, consumer: Any, states: States) -> bool:
        """Take what has come into the view; whether anything has."""
        fetched: Mapping[TopicPartition, Any] = await consumer.getmany(timeout_ms=POLL_MS)
        for records in fetched.values():
            for record in records:
                key = budget_key_of(record.key)
                if key is None:
                    continue
                state = None if record.value is None else await self._decoder.read(BudgetState, record.value)
                if isinstance(state, Undecodable):
                    log.error(
                        "a budget can't be read", partition=record.partition, offset=record.offset, why=state.code
                    )
                elif state is not None:
                    states[key] = state
                else:
                    states.pop(key, None)
        return bool(fetched)
