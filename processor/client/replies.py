"""Hears the replies to this client's requests on its partition of the reply topic, which others may share."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from processor.adapters.avro import Codec
from processor.adapters.kafka import connection, unavailable
from processor.adapters.murmur2 import partition_of
from processor.client.outcomes import Pending
from processor.domain import ReceivedResult, ReplyTo, Request
from processor.errors import BrokerUnavailable, ProcessorError
from processor.identity import request_id
from processor.ports import Undecodable
from processor.settings import Settings

log = structlog.get_logger(__name__)


class Replies:
    """One consumer of one partition, hash(random client id) mod n, begun at the end it had before we produced.

    Only records whose request id was computed here are kept, whatever else lies in the partition.
    """

    def __init__(self, settings: Settings, codec: Codec, topic: str) -> None:
        self._settings = settings
        self._codec = codec
        self._topic = topic
        self._client_id = uuid.uuid4().hex.encode()
        self._pending: dict[str, Pending] = {}
        self._waiters: Counter[str] = Counter()
        self._news = asyncio.Condition()
        self._starting = asyncio.Lock()
        self._consumer: AIOKafkaConsumer | None = None
        self._listener: asyncio.Task[None] | None = None
        self._listening = False
        self._partition = 0

    async def start(self, partitions: int) -> None:
        """Listen from the present end on; does nothing when it listens already. Raises BrokerUnavailable."""
        async with self._starting:
            if self._listening:
                return
            await self.stop()
            self._partition = partition_of(self._client_id, partitions)
            place = TopicPartition(self._topic, self._partition)
            self._consumer = consumer = AIOKafkaConsumer(
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                **connection(self._settings),
            )
            try:
                await consumer.start()
                consumer.assign([place])
                consumer.seek(place, (await consumer.end_offsets([place]))[place])
            except (KafkaError, OSError) as error:
                raise unavailable(self._settings, error) from None
            self._listening = True
            self._listener = asyncio.create_task(self._listen(consumer))

    async def stop(self) -> None:
        """Does nothing before a start."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None
        if self._consumer is not None:
            await self._consumer.stop()
            self._consumer = None

    def address(self, reply_type: str | None = None) -> ReplyTo:
        """Where a worker is to reply to. Valid once started."""
        return ReplyTo(self._topic, self._partition, reply_type)

    @contextmanager
    def expecting(self, requests: Sequence[Request]) -> Iterator[list[Pending]]:
        """Keep the replies to these requests while the context lasts; enter it before they are produced."""
        ids = [request_id(request) for request in requests]
        for name, request in zip(ids, requests, strict=True):
            self._pending.setdefault(name, Pending(request, name))
        self._waiters.update(ids)
        try:
            yield [self._pending[name] for name in ids]
        finally:
            # The same request may be awaited twice at once.
            for name in ids:
                self._waiters[name] -= 1
                if not self._waiters[name]:
                    del self._waiters[name], self._pending[name]

    async def wait(self, pending: Sequence[Pending]) -> None:
        """Until each is complete. Raises BrokerUnavailable when the partition can't be read any more."""
        async with self._news:
            await self._news.wait_for(lambda: not self._listening or all(one.complete for one in pending))
        if not all(one.complete for one in pending):
            raise BrokerUnavailable("the reply topic can't be read any more; ask again with the same correlation_id")

    async def _listen(self, consumer: AIOKafkaConsumer) -> None:
        try:
            async for record in consumer:
                name = next((value for header, value in record.headers if header == "request_id"), b"")
                pending = self._pending.get(name.decode(errors="replace"))
                if pending is None:
                    continue
                result = await self._codec.read(ReceivedResult, record.value)
                if isinstance(result, Undecodable):
                    log.warning("a reply can't be read", code=result.code, offset=record.offset)
                elif result.request_id == pending.request_id:
                    pending.take(result)
                    if pending.complete:
                        await self._tell()
        except (KafkaError, OSError, ProcessorError) as error:
            log.warning("replies can't be read", error=type(error).__name__)
        finally:
            self._listening = False
            await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
