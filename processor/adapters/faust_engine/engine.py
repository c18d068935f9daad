"""The engine: a Faust app that joins the group, drives a `RunHandler` and lends its producer.

It is run by `Engine.run`, not by Faust's worker: logging, signals and the loop stay ours. No web, no tables, no
directory, no topic of Faust's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import faust
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import KafkaError
from faust.serializers.schemas import Schema

from processor.adapters.faust_engine import extensions
from processor.adapters.faust_engine.assignor import SingleOwnerAssignor
from processor.adapters.faust_engine.consumer import COMMIT_TIMEOUT_S, Consumer, Transport
from processor.adapters.faust_engine.thread import RECORDS_PER_FETCH
from processor.adapters.kafka import connection, unavailable, unhurried
from processor.errors import BrokerUnavailable, DeliveryFailed, ProcessorError, RegistryUnavailable, SettingsError
from processor.ports import Run, RunHandler
from processor.settings import Settings

Hook = Callable[[], Awaitable[None]]

BATCH_BYTES = 512 * 1024
"""A batch of the producer. Well below any broker's limit: a batch over it stops an idempotent producer for good."""

REQUEST_TIMEOUT_MS = 40_000
METADATA_AGE_MS = 10_000
"""Within this a topic that was made again, or has grown, is read; aiokafka's five minutes would be an outage."""
FOREVER_MS = 2**31 - 1

BLAMELESS = (DeliveryFailed, BrokerUnavailable, RegistryUnavailable, KafkaError)
"""What a crash of this class says of the record that was worked on: nothing."""

log = structlog.stdlib.get_logger(__name__)


class PassThrough(Schema[Any, Any]):
    """Our messages are runs already; there is nothing to decode."""

    def compile(self, app: Any, **options: Any) -> Any:  # noqa: ARG002
        async def decode(message: Any, *, propagate: bool = False) -> Any:  # noqa: ARG001
            return app.create_event(None, message.value, {}, message)

        return decode


class App(faust.App):
    """A Faust app that reads and writes through our transport and leaves nothing on the disk."""

    def __init__(self, engine: Engine, app_id: str, **options: Any) -> None:
        self.engine = engine
        super().__init__(app_id, **options)

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> Transport:
        return Transport(self.conf.broker_producer, self)

    def _create_directories(self) -> None:
        """Only tables would need them."""

    def _crash(self, reason: BaseException) -> None:
        """Whichever service breaks, in whichever thread: mode tells the root of the tree by this."""
        self.engine.crash(reason)
        super()._crash(reason)


class Engine:
    """Consumes `topics` as group `app_id` and hands runs to the handler.

    `run` is the whole life of a process. `start`, `wait` and `stop` are its parts, to embed it in a running loop.
    The hooks run before the app connects, once it has joined its group, and after the last lease was given up while
    the producer is still open. With `single_owner` one member gets all partitions and the others stand by. With
    `isolates` a record that ends processes is found and handed over as lethal. A run has `records_per_fetch` records at
    most, and fewer where they are large.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        app_id: str,
        topics: Sequence[str],
        handler: RunHandler,
        single_owner: bool = False,
        isolates: bool = False,
        records_per_fetch: int = RECORDS_PER_FETCH,
        on_starting: Sequence[Hook] = (),
        on_started: Sequence[Hook] = (),
        on_stopping: Sequence[Hook] = (),
    ) -> None:
        self.settings = settings
        self.handler = handler
        self._app_id = app_id
        self._topics = list(topics)
        self._single_owner = single_owner
        self.isolates = isolates
        self.records_per_fetch = records_per_fetch
        self._on_starting = on_starting
        self._on_started = on_started
        self._on_stopping = on_stopping
        self._app: App | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._error: BaseException | None = None
        self._stopping = False

    # --- life ------------------------------------------------------------------------------------------

    def run(self, *, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> int:
        """Run until SIGTERM or SIGINT and return 0. A crash ends the process at once with code 1.

        So does a shutdown that takes longer than `shutdown_timeout_s`.
        """
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(self._main())

    async def _main(self) -> int:
        loop = asyncio.get_running_loop()
        log.info("starting", group=self._app_id, topics=self._topics, loop=_kind(loop))
        if slow := [name for name, there in extensions.loaded().items() if not there]:
            log.warning(
                "compiled extensions are not loaded: records cost several times more", of=slow, fix=extensions.FIX
            )
        if not self.settings.producer_idempotent:
            log.warning("the producer is not idempotent: for the embedded broker alone")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        started = asyncio.create_task(self.start())
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait({started, ended}, return_when=asyncio.FIRST_COMPLETED)
        if started.done() and (error := started.exception()) is not None:
            self.crash(error)
        await ended
        if self._error is not None:
            await self._excuse()
            _end_process(self._error)
        log.info("stopping")
        watchdog = threading.Timer(self.settings.shutdown_timeout_s, _end_process, [None])
        watchdog.daemon = True
        watchdog.start()
        if not started.done():
            started.cancel()
            await asyncio.wait({started})
        try:
            await self.stop()
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the process
            self.crash(error)
        if self._error is not None:
            _end_process(self._error)
        watchdog.cancel()
        log.info("stopped")
        return 0

    async def start(self) -> None:
        """Connect, join the group, run the hooks. Returns once the first assignment is there (it may be empty)."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.current_thread()
        for hook in self._on_starting:
            await hook()
        self._app = self._new_app()
        starting = asyncio.create_task(self._app.start())
        ended = asyncio.create_task(self._ended.wait())
        try:
            # Faust waits for an assignment even when what would bring it has crashed.
            await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._error is not None:
                raise self._error
            await starting
        except KafkaError as error:
            raise unavailable(self.settings, error) from error
        finally:
            for task in (starting, ended):
                task.cancel()
            await asyncio.wait({starting, ended})
        log.info("joined", **self.runtime()["loops"])
        for hook in self._on_started:
            await hook()

    async def wait(self) -> None:
        """Until a crash; raises what it crashed of."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        """Stop fetching, let the handler finish within its budget, commit, run the hooks, leave the group."""
        if self._app is None or self._stopping:
            return
        self._stopping = True
        if self._consumer is not None:
            await self._consumer.shut()
        for hook in self._on_stopping:
            await hook()
        await self._app.stop()

    def crash(self, error: BaseException) -> None:
        """End the process with code 1 and try nothing more: no send, no offset. The first error is the one told."""
        if self._error is None:
            self._error = error
            if threading.current_thread() is self._thread:
                self._abandon()
            elif self._loop is not None:
                self._loop.call_soon_threadsafe(self._abandon)

    def replaced(self) -> None:
        """Another process has joined under our static membership id: it has our partitions now, and this one ends."""
        self.crash(
            SettingsError(
                "EMBEDDING_GROUP_INSTANCE_ID: another process joined under it: give each its own, or unset it"
            )
        )

    async def _excuse(self) -> None:
        """An outage that ends the process again and again must not look like a record that does."""
        if self.isolates and self._consumer is not None and isinstance(self._error, BLAMELESS):
            try:
                await self._consumer.excuse()
            except Exception as error:  # noqa: BLE001 - the process ends; at worst a life counts that should not
                log.warning("the end is not excused", reason=type(error).__name__)

    def _abandon(self) -> None:
        if self._consumer is not None:
            self._consumer.abandon()
        self._ended.set()

    # --- parts -----------------------------------------------------------------------------------------

    @property
    def producer(self) -> AIOKafkaProducer:
        """The producer, once started."""
        assert self._app is not None, "the engine is not started"
        return self._app.producer._producer  # type: ignore[attr-defined]

    @property
    def _consumer(self) -> Consumer | None:
        return None if self._app is None else self._app._consumer  # type: ignore[return-value]

    def status(self) -> dict[str, object]:
        """For health: state, generation, age of the heartbeat, and per partition how far it is."""
        if self._error is not None:
            return {"state": "crashed", "reason": type(self._error).__name__}
        if self._stopping or self._consumer is None:
            return {"state": "stopping" if self._stopping else "starting"}
        return self._consumer.status()

    def runtime(self) -> dict[str, dict[str, Any]]:
        """For health: kinds of the loops that run it, and which compiled extensions are loaded."""
        loops = {"main": self._loop, "consumer": None if self._consumer is None else self._consumer.thread_loop}
        return {
            "loops": {name: _kind(loop) for name, loop in loops.items() if loop is not None},
            "extensions": dict(extensions.loaded()),
        }

    def new_consumer(self) -> AIOKafkaConsumer:
        """Called in the consumer's thread."""
        settings = self.settings
        grace_s = settings.revoke_budget_s + settings.lease_margin_s + COMMIT_TIMEOUT_S
        return AIOKafkaConsumer(
            **connection(settings),
            client_id=self._app_id,
            group_id=self._app_id,
            group_instance_id=settings.group_instance_id,
            partition_assignment_strategy=[
                SingleOwnerAssignor() if self._single_owner else RoundRobinPartitionAssignor
            ],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            metadata_max_age_ms=METADATA_AGE_MS,
            # Fetching waits for hours while a provider is out; that must not cost the membership.
            max_poll_interval_ms=FOREVER_MS,
            session_timeout_ms=_ms(settings.session_timeout_s),
            heartbeat_interval_ms=_ms(settings.heartbeat_interval_s),
            # The broker must wait longer for a member that gives its partitions up than the member may take, and
            # it counts from before the member's next heartbeat.
            rebalance_timeout_ms=_ms(settings.session_timeout_s + grace_s),
            # A join is answered when every member has joined, or at the end of that wait.
            request_timeout_ms=_ms(settings.session_timeout_s + grace_s) + REQUEST_TIMEOUT_MS,
        )

    def new_producer(self) -> AIOKafkaProducer:
        """acks=all, idempotent; the settings that the embedded broker relaxes are named at start."""
        settings = self.settings
        return unhurried(
            AIOKafkaProducer(
                **connection(settings),
                client_id=self._app_id,
                acks="all",
                enable_idempotence=settings.producer_idempotent,
                compression_type=settings.producer_compression,
                max_batch_size=min(BATCH_BYTES, settings.max_record_bytes),
                max_request_size=settings.max_record_bytes,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
            )
        )

    def _new_app(self) -> App:
        settings = self.settings
        app = App(
            self,
            self._app_id,
            broker_commit_interval=settings.commit_interval_s,
            broker_session_timeout=settings.session_timeout_s,
            broker_request_timeout=REQUEST_TIMEOUT_MS / 1000 + settings.session_timeout_s,
            datadir=Path(os.devnull),
            stream_wait_empty=True,
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
        )
        topic = app.topic(*self._topics, schema=PassThrough(), key_type=None, value_type=None)

        @app.agent(topic, name="runs")
        async def take_runs(stream: Any) -> None:
            async for event in stream.noack().events():
                run = event.value
                assert isinstance(run, Run)
                assert isinstance(app.consumer, Consumer)
                await app.consumer.take(run)

        return app


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _kind(loop: asyncio.AbstractEventLoop) -> str:
    """uvloop, or asyncio and what of it."""
    return type(loop).__module__


def _end_process(error: BaseException | None) -> None:
    """No clean-up: it might send or commit. Whoever owns the partitions next does the work again."""
    if error is None:
        log.critical("shutdown took too long: ending the process")
    else:
        # An error of ours says by itself what to do; of any other, where it came from is all there is to say.
        ours = isinstance(error, ProcessorError)
        log.critical(
            "crashed: ending the process",
            error=type(error).__name__,
            **({"why": str(error)} if ours else {"exc_info": error}),
        )
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1)
