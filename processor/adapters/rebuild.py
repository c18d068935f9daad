"""What `usage rebuild` asks of the broker and changes there: the aggregator's group, its offsets, null values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError, GroupIdNotFound, KafkaError, for_code
from aiokafka.structs import OffsetAndMetadata

from processor.adapters.kafka import connection, unavailable
from processor.errors import StoreError
from processor.settings import Settings

MEMBERS = 5
"""Position of the members in a described group, in every version of the answer."""


async def refuse_while_active(settings: Settings) -> None:
    """Raises StoreError when the aggregator's group has members, BrokerUnavailable when nobody can tell."""
    group_id = settings.aggregator_group_id
    with _translated(settings):
        admin = AIOKafkaAdminClient(**connection(settings))
        try:
            await admin.start()
            members = members_of(await admin.describe_consumer_groups([group_id]))
        finally:
            await admin.close()
    if members:
        raise _active(settings, f"has members ({members})")


def members_of(answers: Iterable[Any]) -> int:
    """How many members the described groups have. KafkaError when a broker did not say: it names none then."""
    groups = [group for answer in answers for group in answer.groups]
    for code, *_ in groups:
        if code not in (0, GroupIdNotFound.errno):
            raise for_code(code)
    return sum(len(group[MEMBERS]) for group in groups)


async def commit_offsets(settings: Settings, offsets: Mapping[tuple[str, int], int]) -> None:
    """Commit these offsets, by (topic, partition), for the aggregator's group. StoreError when it has members."""
    if not offsets:
        return
    places = {TopicPartition(*place): OffsetAndMetadata(offset, "") for place, offset in offsets.items()}
    with _translated(settings):
        consumer = AIOKafkaConsumer(
            group_id=settings.aggregator_group_id, enable_auto_commit=False, **connection(settings)
        )
        try:
            await consumer.start()
            consumer.assign(list(places))
            await consumer.commit(places)
        except CommitFailedError:
            raise _active(settings, "has members again") from None
        finally:
            await consumer.stop()


async def delete_keys(settings: Settings, topic: str, keys: Mapping[bytes, int]) -> None:
    """Write a null value for each key into its partition; returns once every one is acknowledged."""
    if not keys:
        return
    with _translated(settings):
        async with AIOKafkaProducer(
            **connection(settings), acks="all", enable_idempotence=settings.producer_idempotent, linger_ms=20
        ) as producer:
            sent = [await producer.send(topic, None, key=key, partition=partition) for key, partition in keys.items()]
            await asyncio.gather(*sent)


def _active(settings: Settings, what: str) -> StoreError:
    return StoreError(
        f"group {settings.aggregator_group_id} {what}: stop the aggregator and every standby; one that was killed "
        f"is counted for another {settings.session_timeout_s:g} s"
    )


@contextmanager
def _translated(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (KafkaError, OSError) as error:
        raise unavailable(settings, error) from error
