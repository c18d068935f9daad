"""Faust's Kafka transport with its own reading loop: runs instead of records, leases, watermarks, no lost record.

What Faust does itself is not used: its acknowledgements (the watermark is ours), its positions (we seek to where a
lease begins), its record by record loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import ConsumerStoppedError, IllegalStateError, KafkaError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode.types import ServiceT

from processor.adapters.faust_engine.lease import (
    NO_GENERATION,
    PartitionLease,
    Session,
    due,
    give_up,
    starts_of,
    uncommitted,
)
from processor.adapters.faust_engine.thread import FETCH_BYTES, RECORDS_PER_FETCH, ConsumerThread, Listener
from processor.adapters.faust_engine.tolerant import read_any_header_name
from processor.ports import Run
from processor.suspicion import Suspicion

if TYPE_CHECKING:
    from processor.adapters.faust_engine.engine import App, Engine


IDLE_S = 1.0
RETRY_S = 0.1
ALONE_POLL_S = 0.05
REQUESTS_TIMEOUT_S = 10.0
COMMIT_TIMEOUT_S = 5.0

log = structlog.stdlib.get_logger(__name__)


class Consumer(driver.Consumer):
    """Fetches runs, hands them to the agent, keeps the leases. All of it on the main loop."""

    RebalanceListener = Listener
    app: App
    _thread: ConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = self.app.engine
        settings = engine.settings
        self.engine: Engine = engine
        self.session = Session(timeout_s=settings.session_timeout_s, margin_s=settings.lease_margin_s)
        self.leases: Mapping[TopicPartition, PartitionLease] | None = None
        """Replaced as a whole by each generation; None between two of them, empty while standing by."""
        self.closing = False
        """No generation is taken over any more."""
        self.closed = False
        """All is given up, and the main loop no longer answers a rebalance."""
        self._assigned_generation: int | None = None
        self._revocations = 0
        self._release_lock = asyncio.Lock()
        self._commit_lock = asyncio.Lock()
        self._wakeup = asyncio.Event()
        self._queued: set[int] = set()
        self._in_hand: tuple[PartitionLease, asyncio.Task[None]] | None = None
        self._abandoned: Mapping[TopicPartition, PartitionLease] = {}
        self._records_a_fetch = self._fitting(settings.max_record_bytes)
        """So many as the largest of the last fetch fit into FETCH_BYTES: what a record takes unpacked is not known
        before."""

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # --- reading ---------------------------------------------------------------------------------------

    async def _drain_messages(self, fetcher: ServiceT) -> None:
        """The one task that seeks and fetches, so that no position moves behind its back."""
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active or self._assigned_generation is None or self.closing:
                    await self._idle(IDLE_S)
                elif self.leases is None:
                    if not await self._take_over(self._assigned_generation):
                        await self._idle(RETRY_S)
                elif not self.leases or self._queued:
                    await self._idle(IDLE_S)  # standing by, or no room: the agent has not taken the last runs
                elif (suspect := next(filter(_isolated, self.leases.items()), None)) is not None:
                    await self._run_alone(*suspect, self.leases)
                else:
                    if uncommitted(self.leases) >= self.engine.settings.commit_records:
                        await self._commit_leases(self.leases)
                    await self._fetch(self.leases)
        except (asyncio.CancelledError, ConsumerStoppedError):
            if not (self.should_stop or self.app.should_stop or fetcher.should_stop):
                raise

    async def _idle(self, at_most_s: float) -> None:
        self._wakeup.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._wakeup.wait()

    async def _take_over(self, generation: int) -> bool:
        """Begin a generation: seek every partition to where it stands and make its leases. False: try again.

        The positions that aiokafka found by itself are not relied on, nor is whatever a fetch that was under way
        during the rebalance has consumed: each position is set here, before the lease that expects it exists.
        """
        revocations = self._revocations
        try:
            async with asyncio.timeout(REQUESTS_TIMEOUT_S):
                partitions = await self._thread.run(self._thread.assigned(generation))
            if partitions is None:
                return False
            # No time limit: a handler that makes its store again may read a long topic, and would begin anew each time.
            own = await self._own_positions(partitions)
            async with asyncio.timeout(REQUESTS_TIMEOUT_S):
                known = await self._thread.run(self._thread.offsets(partitions))
                starts = starts_of(partitions, own, *known, trusts_ends=self.engine.settings.producer_idempotent)
                offsets = {partition: start.offset for partition, start in starts.items()}
                if not await self._thread.run(self._thread.begin(generation, offsets)):
                    return False
        except (IllegalStateError, TimeoutError) as error:
            log.warning("partitions not taken over yet", generation=generation, reason=type(error).__name__)
            return False
        except KafkaError as error:
            if not error.retriable:
                raise
            log.warning("partitions not taken over yet", generation=generation, reason=type(error).__name__)
            return False
        if revocations != self._revocations or self.closing:
            return False
        self._queued.clear()
        self.leases = {
            partition: PartitionLease(partition.topic, partition.partition, generation, self.session, *start)
            for partition, start in starts.items()
        }
        log.info("partitions taken over", generation=generation, starts=_offsets(offsets))
        await self._commit_leases(self.leases)  # the marks stand before anything is handed out
        return True

    async def _own_positions(self, partitions: Sequence[TopicPartition]) -> Mapping[tuple[str, int], int]:
        if not partitions:
            return {}
        return await self.engine.handler.positions([(each.topic, each.partition) for each in partitions])

    async def _fetch(self, leases: Mapping[TopicPartition, PartitionLease]) -> None:
        fetched = await self._fetched(leases, self._records_a_fetch)
        if fetched:
            largest_bytes = max(
                each.serialized_key_size + each.serialized_value_size for run in fetched.values() for each in run
            )
            self._records_a_fetch = self._fitting(largest_bytes)
        for partition, records in fetched.items():
            # After a rebalance what is left of the fetch is dropped: the next generation seeks before it reads.
            if self.leases is not leases or not self.flow_active:
                return
            lease = leases[partition]
            if await self._continues(lease, partition, records[0].offset):
                await self._queue(lease, records)

    def _fitting(self, record_bytes: int) -> int:
        """How many records of this size one fetch may bring."""
        return max(1, min(self.engine.records_per_fetch, FETCH_BYTES // max(1, record_bytes)))

    async def _run_alone(
        self, partition: TopicPartition, lease: PartitionLease, leases: Mapping[TopicPartition, PartitionLease]
    ) -> None:
        """Read one record of a suspect partition and wait for its end, while nothing else is handed out.

        That it runs alone is committed first: a process that it ends can't say so afterwards.
        """
        records = (await self._fetched([partition], 1)).get(partition)
        if self.leases is not leases:
            return
        if not records:
            if await self._thread.run(self._thread.at_end(partition)):
                lease.suspicion = Suspicion()  # nothing is there that could be suspected
            return
        offset = records[0].offset
        if not await self._continues(lease, partition, offset):
            return
        numbers = {"partition": f"{partition.topic}/{partition.partition}", "offset": offset}
        lethal = lease.suspicion.lethal
        log.warning("record is given up as lethal" if lethal else "record runs alone", **numbers)
        while self.leases is leases:
            waiting = self.engine.handler.waiting()
            lease.suspicion = lease.suspicion.running_alone(waiting=waiting)
            if lease.watermark.next_offset <= offset:
                if not await self._commit_leases(leases) and lease.noted != str(lease.suspicion):
                    await self._thread.run(self._thread.seek_all(lease.generation, {partition: offset}))
                    return
                await self._queue(lease, records, lethal=lethal)
            await self._commit_leases(leases)
            if lease.watermark.first_unfinished > offset:
                lease.alone_left -= 1
                lease.suspicion = lease.suspicion.passed() if lease.alone_left else Suspicion()
                return
            await self._idle(ALONE_POLL_S)

    async def _fetched(
        self, partitions: Collection[TopicPartition], max_records: int = RECORDS_PER_FETCH
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        """The next records; none when the broker is in trouble that may pass."""
        try:
            return await self._thread.run(self._thread.fetch(partitions, max_records))
        except KafkaError as error:
            if not error.retriable:
                raise
            log.warning("fetch failed, trying again", reason=type(error).__name__)
            await self._idle(RETRY_S)
            return {}
        except UnicodeDecodeError:
            log.error("the name of a record's header is not UTF-8: reading goes on with a slower parser")
            read_any_header_name()
            for partition, lease in (self.leases or {}).items():  # what the parser had begun is begun again
                await self._thread.run(
                    self._thread.seek_all(lease.generation, {partition: lease.watermark.next_offset})
                )
            return {}

    async def _continues(self, lease: PartitionLease, partition: TopicPartition, offset: int) -> bool:
        """Whether the run continues what was read before; if not, seek back once, and believe it the second time.

        A jump forward may be ours (something was fetched and dropped): reading on would commit past a hole. If it
        comes again after seeking back, the offsets between are not in the log (control records, compaction,
        retention). Which of them it is must be known: while the broker does not say, it is read and asked again.
        """
        expected = lease.watermark.next_offset
        numbers = {"partition": f"{partition.topic}/{partition.partition}", "expected": expected, "found": offset}
        if offset == expected:
            if lease.sought_to == expected:
                log.error("a jump was ours and is healed: please report it", **numbers)
                lease.sought_to = None
            return True
        if lease.sought_to != expected:
            return await self._read_again(lease, partition, expected)
        if offset < expected:
            lease.sought_to = None
            log.error("log became shorter: taking the partitions over again", **numbers)
            await self._thread.run(self._thread.rejoin())
            await self._idle(IDLE_S)
            return False
        first = await self._thread.run(self._thread.first_offset(partition))
        if first is None:
            log.warning("the broker does not say where the log begins: asking again", **numbers)
            await self._idle(RETRY_S)
            return await self._read_again(lease, partition, expected)
        lease.sought_to = None
        if first > expected:
            log.error("records were deleted unread: retention is too short", **numbers)
        else:
            log.info("offsets are not in the log: passed over", **numbers)
        return self.leases is not None and self.leases.get(partition) is lease

    async def _read_again(self, lease: PartitionLease, partition: TopicPartition, expected: int) -> bool:
        """Seek back to where the run should have begun: this one does not continue what was read."""
        lease.sought_to = expected
        await self._thread.run(self._thread.seek_all(lease.generation, {partition: expected}))
        return False

    async def _queue(self, lease: PartitionLease, fetched: Sequence[Any], *, lethal: bool = False) -> None:
        """Hand a run to the agent through Faust's stream, as one message. The watermark knows it first."""
        first = fetched[0]
        end = self._thread.end_of(TopicPartition(first.topic, first.partition))
        run = lease.hand_out(fetched, end=end, lethal=lethal)
        self._queued.add(id(run))
        message = ConsumerMessage(
            first.topic,
            first.partition,
            first.offset,
            first.timestamp / 1000,
            first.timestamp_type,
            None,
            None,
            run,  # type: ignore[arg-type]  # passed through by our schema
            None,
            tp=TP(first.topic, first.partition),
            generation_id=lease.generation,
        )
        await self.wait_first(self.callback(message), self.suspend_flow.wait())

    async def take(self, run: Run) -> None:
        """Called by the agent for each run. A handler that raises is broken: the process ends, nothing is finished."""
        self._queued.discard(id(run))
        self._wakeup.set()
        lease = run.lease
        assert isinstance(lease, PartitionLease)
        if lease.revoked:
            return
        task = asyncio.create_task(self.engine.handler.on_run(run))
        self._in_hand = (lease, task)
        try:
            await asyncio.wait({task})
        finally:
            self._in_hand = None
            task.cancel()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.engine.crash(error)

    # --- giving up -------------------------------------------------------------------------------------

    async def release(self) -> None:
        """Let the handler finish what it can, revoke the leases, commit what is finished. Again: nothing to do."""
        self._revocations += 1
        async with self._release_lock:
            leases, self.leases = self.leases, None
            self._queued.clear()
            if not leases:
                return
            try:
                await give_up(leases, self.engine.handler, self.engine.settings, self.engine.crash)
            finally:
                if self._in_hand is not None and self._in_hand[0].revoked:
                    self._in_hand[1].cancel()
            await self._commit_leases(leases, clean=True)

    def abandon(self) -> None:
        """A crash: nothing more is sent or finished, and no offset rises."""
        self._revocations += 1
        self.closing = self.closed = True
        leases, self.leases = self.leases, None
        for lease in (leases or {}).values():
            lease.revoke()
        self._abandoned = leases or {}

    async def excuse(self) -> None:
        """After a crash that is no record's fault: say so in the metadata, where the committed offsets stand."""
        async with asyncio.timeout(COMMIT_TIMEOUT_S), self._commit_lock:
            if self._abandoned:
                generation = next(iter(self._abandoned.values())).generation
                marks = {
                    partition: (lease.committed, str(lease.suspicion.running_alone(waiting=True)))
                    for partition, lease in self._abandoned.items()
                }
                await self._thread.run(self._thread.commit_offsets(generation, marks))

    async def shut(self) -> None:
        """Give everything up, for good. A rebalance that comes meanwhile waits for it like any other."""
        self.closing = True
        self.stop_flow()
        self.app.flow_control.suspend()
        self.app.flow_control.clear()
        await self.release()
        self.closed = True

    async def wait_empty(self) -> None:
        await self.release()

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        self._assigned_generation = None
        try:
            await super().on_partitions_revoked(revoked)
        finally:
            # Faust asks us to only if it sees an assignment and is not about to stop.
            await self.release()

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        await super().on_partitions_assigned(assigned, generation_id)
        # Now Faust's routes are made. Its flow may have been resumed before that: a recovery of the generation
        # before does so in the midst of the next rebalance.
        self._assigned_generation = generation_id
        self._wakeup.set()

    def resume_flow(self) -> None:
        super().resume_flow()
        self._wakeup.set()

    async def perform_seek(self) -> None:
        """Faust calls this before it resumes the flow; `_take_over` seeks after that, when nothing else moves."""

    def close(self) -> None:
        """Faust calls this when a rebalance meets a stopping app, in the wrong thread; its own stop leaves."""

    async def verify_all_partitions_active(self) -> None:
        """Faust's livelock detector knows neither runs nor our watermark, and reports nonsense."""

    # --- committing ------------------------------------------------------------------------------------

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:  # noqa: ARG002
        """Called every commit interval. Raises what aiokafka's tasks died of."""
        await self._thread.run(self._thread.check())
        return await self._commit_leases(self.leases or {})

    async def _commit_leases(self, leases: Mapping[TopicPartition, PartitionLease], *, clean: bool = False) -> bool:
        """Commit the watermarks that rose, and what is suspected where they stand; a clean end clears that.

        Every delivery behind a watermark was awaited, so no producer is flushed.
        """
        async with self._commit_lock:
            moved = due(leases, isolates=self.engine.isolates, clean=clean)
            if not moved:
                return False
            generation = next(iter(leases.values())).generation
            try:
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    done = await self._thread.run(self._thread.commit_offsets(generation, moved))
            except TimeoutError:
                done = False
            if not done:
                log.warning("not committed: delivered again if not tried again", generation=generation)
                return False
            for partition, (offset, metadata) in moved.items():
                leases[partition].committed = offset
                leases[partition].noted = metadata
            return True

    # --- looking ---------------------------------------------------------------------------------------

    @property
    def thread_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the consumer's thread."""
        return self._thread.thread_loop

    def status(self) -> dict[str, object]:
        """For health: who holds what, and how far it is."""
        leases = self.leases
        partitions = []
        for partition, lease in sorted((leases or {}).items()):
            end = self._thread.end_of(partition)
            partitions.append(
                {
                    "partition": f"{partition.topic}/{partition.partition}",
                    "next_offset": lease.watermark.next_offset,
                    "first_unfinished": lease.watermark.first_unfinished,
                    "unfinished": len(lease.watermark),
                    "lag": None if end is None else max(0, end - lease.watermark.first_unfinished),
                }
            )
        generation = self.session.generation()
        return {
            "state": "rebalancing" if leases is None else "consuming" if leases else "standby",
            "generation": None if generation == NO_GENERATION else generation,
            "heartbeat_age_s": self.session.heartbeat_age_s,
            "leases_held": all(lease.held() for lease in (leases or {}).values()),
            "partitions": partitions,
        }


class Producer(driver.Producer):
    """An aiokafka producer of our making. Messages go through it directly, never through Faust's topics."""

    app: App

    def _new_producer(self, transactional_id: str | None = None) -> AIOKafkaProducer:  # noqa: ARG002
        return self.app.engine.new_producer()

    async def flush(self) -> None:
        """Wait for what is in flight, but not for ever: each delivery is awaited by whoever sent it."""
        if self._producer is not None:
            try:
                async with asyncio.timeout(self.app.engine.settings.revoke_budget_s):
                    await self._producer.flush()
            except TimeoutError:
                log.error("deliveries are still not acknowledged")


class Transport(driver.Transport):
    Consumer = Consumer
    Producer = Producer


def _isolated(held: tuple[TopicPartition, PartitionLease]) -> bool:
    return held[1].suspicion.isolated


def _offsets(offsets: Mapping[TopicPartition, int]) -> dict[str, int]:
    return {f"{partition.topic}/{partition.partition}": offset for partition, offset in offsets.items()}
