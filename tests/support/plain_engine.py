"""The engine without Faust, on one loop: an experiment that shows what leaving Faust takes.

`PlainEngine` keeps of `Engine` what has nothing to do with Faust (hooks, signals, watchdog, crash, the options of the
clients) and puts a `Member` where the Faust app stands. The engine's integration suite runs on both. What it lacks is
the thread: heartbeats go on while a handler awaits, but not while it computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from processor.adapters.faust_engine import Engine
from processor.adapters.faust_engine.consumer import COMMIT_TIMEOUT_S, IDLE_S, REQUESTS_TIMEOUT_S, RETRY_S
from processor.adapters.faust_engine.lease import (
    NO_GENERATION,
    PartitionLease,
    Session,
    due,
    give_up,
    starts_of,
    uncommitted,
)
from processor.adapters.faust_engine.thread import FETCH_WAIT_MS, RECORDS_PER_FETCH, at_end, end_of, offsets_of, watch
from processor.adapters.faust_engine.tolerant import read_any_header_name
from processor.suspicion import Suspicion

Leases = Mapping[TopicPartition, PartitionLease]

log = structlog.stdlib.get_logger(__name__)


class PlainEngine(Engine):
    """`Engine` on aiokafka alone."""

    _app: Member | None  # in place of the Faust app

    def _new_app(self) -> Member:
        return Member(self, self._topics)

    @property
    def producer(self) -> AIOKafkaProducer:
        assert self._app is not None, "the engine is not started"
        return self._app.producer

    @property
    def _consumer(self) -> Member | None:
        return self._app


class Member(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is not typed
    """One member of the group, with its leases and its producer. Laws and their reasons: `faust_engine.consumer`."""

    def __init__(self, engine: PlainEngine, topics: Sequence[str]) -> None:
        self.engine = engine
        self.producer = engine.new_producer()
        self.consumer = engine.new_consumer()
        self.session = Session(timeout_s=engine.settings.session_timeout_s, margin_s=engine.settings.lease_margin_s)
        self.leases: Leases | None = None
        self.thread_loop = asyncio.get_running_loop()
        self._topics = topics
        self._generation: int | None = None
        self._revocations = 0
        self._closing = self._closed = False
        self._release_lock, self._commit_lock = asyncio.Lock(), asyncio.Lock()
        self._wakeup, self._assigned = asyncio.Event(), asyncio.Event()
        self._in_hand: tuple[PartitionLease, asyncio.Task[None]] | None = None
        self._abandoned: Leases = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.producer.start()
        await self.consumer.start()
        watch(self.session, self.consumer, replaced=self.engine.replaced)
        self.consumer.subscribe(self._topics, listener=self)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._commit_by_time())]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        await self._assigned.wait()

    async def stop(self) -> None:
        """After `shut`: leave the group, close both clients."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.consumer.stop()
        await self.producer.stop()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.engine.crash(error)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._generation = None
        if not self._closed:
            settings = self.engine.settings
            self.session.revoking(settings.revoke_budget_s + settings.lease_margin_s)
            await self.release()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self.session.joined()
        self._generation = self.session.generation()
        self._assigned.set()
        self._wakeup.set()

    async def _read(self) -> None:
        """The one task that seeks and fetches, and hands runs on one after the other."""
        while not self._closing:
            leases, generation = self.leases, self._generation
            if generation is None or leases == {}:
                await self._idle(IDLE_S)
            elif leases is None:
                if not await self._take_over(generation):
                    await self._idle(RETRY_S)
            elif (suspect := next((each for each in leases.items() if each[1].suspicion.isolated), None)) is not None:
                await self._run_alone(*suspect, leases)
            else:
                if uncommitted(leases) >= self.engine.settings.commit_records:
                    await self._commit_leases(leases)
                fetched = await self._fetched(leases, self.engine.records_per_fetch)
                for partition, records in fetched.items():
                    # What is left of a fetch after a rebalance is dropped: the next generation seeks before it reads.
                    if self.leases is leases and self._continues(leases[partition], partition, records[0].offset):
                        await self._hand_on(leases[partition], records)

    async def _idle(self, at_most_s: float) -> None:
        self._wakeup.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._wakeup.wait()

    async def _take_over(self, generation: int) -> bool:
        """Seek every partition to where it stands and make its leases, in one step. False: try again."""
        revocations, partitions = self._revocations, sorted(self.consumer.assignment())
        try:
            places = [(each.topic, each.partition) for each in partitions]
            own = await self.engine.handler.positions(places) if places else {}
            async with asyncio.timeout(REQUESTS_TIMEOUT_S):
                known = await offsets_of(self.consumer, partitions)
        except (KafkaError, TimeoutError) as error:
            if isinstance(error, KafkaError) and not (error.retriable or isinstance(error, IllegalStateError)):
                raise
            log.warning("partitions not taken over yet", generation=generation, reason=type(error).__name__)
            return False
        over = self.session.generation() != generation or self.consumer._subscription.reassignment_in_progress
        if over or revocations != self._revocations or self._closing:
            return False
        starts = starts_of(partitions, own, *known, trusts_ends=self.engine.settings.producer_idempotent)
        for partition, start in starts.items():
            self.consumer.seek(partition, start.offset)
        self.leases = leases = {
            partition: PartitionLease(partition.topic, partition.partition, generation, self.session, *start)
            for partition, start in starts.items()
        }
        log.info("partitions taken over", generation=generation, partitions=len(leases))
        await self._commit_leases(leases)
        return True

    async def _fetched(
        self, partitions: Collection[TopicPartition], max_records: int = RECORDS_PER_FETCH
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        try:
            return await self.consumer.getmany(*partitions, timeout_ms=FETCH_WAIT_MS, max_records=max_records)  # type: ignore[no-any-return]
        except KafkaError as error:
            if not error.retriable:
                raise
            log.warning("fetch failed, trying again", reason=type(error).__name__)
            await self._idle(RETRY_S)
            return {}
        except UnicodeDecodeError:
            log.error("the name of a record's header is not UTF-8: reading goes on with a slower parser")
            read_any_header_name()
            for partition, lease in (self.leases or {}).items():
                self.consumer.seek(partition, lease.watermark.next_offset)
            return {}

    def _continues(self, lease: PartitionLease, partition: TopicPartition, offset: int) -> bool:
        """A jump is sought back from once and believed the second time; a step back means a new log."""
        expected, sought_to = lease.watermark.next_offset, lease.sought_to
        lease.sought_to = None
        if offset == expected:
            return True
        if sought_to != expected:
            lease.sought_to = expected
            self.consumer.seek(partition, expected)
            return False
        if offset < expected:
            log.error("log became shorter: taking the partitions over again", partition=str(partition))
            self.consumer._coordinator.request_rejoin()
        return offset > expected

    async def _run_alone(self, partition: TopicPartition, lease: PartitionLease, leases: Leases) -> None:
        """One record of a suspect partition; that it runs alone is committed before it is handed on."""
        records = (await self._fetched([partition], 1)).get(partition)
        if not records and self.leases is leases and at_end(self.consumer, partition):
            lease.suspicion = Suspicion()  # nothing is there that could be suspected
        if not records or self.leases is not leases or not self._continues(lease, partition, records[0].offset):
            return
        lethal = lease.suspicion.lethal
        lease.suspicion = lease.suspicion.running_alone(waiting=self.engine.handler.waiting())
        if not await self._commit_leases(leases) and lease.noted != str(lease.suspicion):
            self.consumer.seek(partition, records[0].offset)
            return
        await self._hand_on(lease, records, lethal=lethal)
        while self.leases is leases and lease.watermark.first_unfinished <= records[0].offset:
            lease.suspicion = lease.suspicion.running_alone(waiting=self.engine.handler.waiting())
            await self._commit_leases(leases)
            await self._idle(RETRY_S)
        if self.leases is leases:
            lease.alone_left -= 1
            lease.suspicion = lease.suspicion.passed() if lease.alone_left else Suspicion()

    async def _hand_on(self, lease: PartitionLease, fetched: Sequence[Any], *, lethal: bool = False) -> None:
        end = end_of(self.consumer, TopicPartition(lease.topic, lease.partition))
        task = asyncio.create_task(self.engine.handler.on_run(lease.hand_out(fetched, end=end, lethal=lethal)))
        self._in_hand = (lease, task)
        try:
            await asyncio.wait({task})
        finally:
            self._in_hand = None
            task.cancel()
        if not task.cancelled():
            task.result()

    async def release(self) -> None:
        """Let the handler finish what it can, revoke the leases, commit what is finished. Again: nothing to do."""
        self._revocations += 1
        async with self._release_lock:
            leases, self.leases = self.leases, None
            if not leases:
                return
            try:
                await give_up(leases, self.engine.handler, self.engine.settings, self.engine.crash)
            finally:
                if self._in_hand is not None and self._in_hand[0].revoked:
                    self._in_hand[1].cancel()
            await self._commit_leases(leases, clean=True)

    async def shut(self) -> None:
        """Give everything up, for good. A rebalance that comes meanwhile waits for it like any other."""
        self._closing = True
        self._wakeup.set()
        await self.release()
        self._closed = True

    def abandon(self) -> None:
        """A crash: nothing more is sent or finished, and no offset rises."""
        self._revocations += 1
        self._closing = self._closed = True
        self._abandoned, self.leases = self.leases or {}, None
        for lease in self._abandoned.values():
            lease.revoke()

    async def excuse(self) -> None:
        """After a crash that is no record's fault: say so in the metadata, where the committed offsets stand."""
        waiting = {each: lease.suspicion.running_alone(waiting=True) for each, lease in self._abandoned.items()}
        marks = {each: (self._abandoned[each].committed, str(mark)) for each, mark in waiting.items()}
        async with asyncio.timeout(COMMIT_TIMEOUT_S), self._commit_lock:
            if marks:
                await self.consumer.commit(marks)

    async def _commit_by_time(self) -> None:
        """Also raises what aiokafka's tasks died of: nobody else asks while the handler waits."""
        while True:
            await asyncio.sleep(self.engine.settings.commit_interval_s)
            self.consumer._coordinator.check_errors()
            await self._commit_leases(self.leases or {})

    async def _commit_leases(self, leases: Leases, *, clean: bool = False) -> bool:
        """Commit the watermarks that rose, and what is suspected where they stand; a clean end clears that."""
        async with self._commit_lock:
            moved = due(leases, isolates=self.engine.isolates, clean=clean)
            if not moved or next(iter(leases.values())).generation != self.session.generation():
                return False
            try:
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    await self.consumer.commit(moved)
            except (CommitFailedError, IllegalStateError, TimeoutError):
                log.warning("not committed: delivered again if not tried again")
                return False
            for partition, (offset, note) in moved.items():
                leases[partition].committed, leases[partition].noted = offset, note
            return True

    def status(self) -> dict[str, object]:
        leases, generation = self.leases, self.session.generation()
        return {
            "state": "rebalancing" if leases is None else "consuming" if leases else "standby",
            "generation": None if generation == NO_GENERATION else generation,
            "partitions": sorted(f"{each.topic}/{each.partition}" for each in leases or {}),
        }
