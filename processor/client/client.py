"""The client: texts in, outcomes out, over Kafka alone."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, Unpack

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from processor.adapters import topics
from processor.adapters.avro import Codec, request_key
from processor.adapters.catalogue import load_catalogue
from processor.adapters.kafka import connection, unavailable
from processor.adapters.murmur2 import partition_of
from processor.client.outcomes import FirstCharges, FirstResults, Outcome
from processor.client.replies import Replies
from processor.client.requests import RequestOptions, as_chunks, check, split
from processor.client.streams import read_records
from processor.domain import Action, Chunk, ReceivedResult, ReplyTo, Request, Usage
from processor.errors import DeliveryFailed, RequestRefused, TopicsError
from processor.identity import request_id
from processor.ports import Undecodable
from processor.settings import Settings, load


@dataclass(frozen=True, slots=True)
class DocumentOutcome:
    """What became of a document's chunks, in their order, and of the manifest that names them all."""

    chunks: list[Outcome]
    manifest: Outcome

    @property
    def ok(self) -> bool:
        return self.manifest.ok and all(outcome.ok for outcome in self.chunks)


class Client:
    """Asks the embedding processor and reads what it wrote. An async context manager; one per process is enough.

    Settings come from the environment unless given. `source_service` names the caller in results and usage.
    Bad input raises RequestRefused before anything is sent; outcomes of single texts, failures and timeouts too,
    are values. DeliveryFailed and BrokerUnavailable mean Kafka: the same call with the same `correlation_id` may
    be repeated and is charged once.
    """

    def __init__(
        self, settings: Settings | None = None, *, bootstrap_servers: str | None = None, source_service: str = ""
    ) -> None:
        given = {"bootstrap_servers": bootstrap_servers} if bootstrap_servers is not None else {}
        self.settings = load(**given) if settings is None else settings.model_copy(update=given)
        self._source_service = source_service
        self._names = {id_: self.settings.topic(topic.name) for id_, topic in topics.topics().items()}
        self._codec = Codec.from_settings(self.settings)
        self._replies = Replies(self.settings, self._codec, self._names["replies"])
        self._producer: AIOKafkaProducer | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._connecting = asyncio.Lock()
        self._counts: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        """Raises BrokerUnavailable, or RegistryUnavailable when a schema registry is set."""
        try:
            await self._codec.start([(self._names[id_], "EmbeddingRequest") for id_ in ("requests", "queries")])
            await self._connected()
        except BaseException:
            await self._codec.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._replies.stop()
        if self._producer is not None:
            await self._producer.stop()
        await asyncio.gather(*self._retiring)
        await self._codec.close()

    async def embed(
        self,
        texts: Sequence[str | Chunk],
        *,
        tenant_id: str,
        collection: str | None = None,
        document_id: str | None = None,
        action: str = Action.GENERATE,
        timeout_s: float = 60.0,
        **options: Unpack[RequestOptions],
    ) -> list[Outcome]:
        """The outcome of each text, in their order, within the time; what is not known by then is `timed_out`.

        `action` may be batch_process (another word on the bill) or validate (nothing is embedded or charged).
        With a document its vectors enter the sink view. Raises RequestRefused, DeliveryFailed, BrokerUnavailable.
        """
        request = self._request(tenant_id, action, collection, document_id, options, chunks=as_chunks(texts))
        return await self._ask("requests", [request], timeout_s)

    async def embed_query(
        self, text: str, *, tenant_id: str, timeout_s: float = 10.0, **options: Unpack[RequestOptions]
    ) -> Outcome:
        """The outcome of one search text, on the interactive lane. Raises as `embed`."""
        chunks = as_chunks([text])
        request = self._request(tenant_id, Action.GENERATE_QUERY, None, None, options, chunks=chunks)
        return (await self._ask("queries", [request], timeout_s))[0]

    async def submit(
        self,
        texts: Sequence[str | Chunk],
        *,
        tenant_id: str,
        collection: str | None = None,
        document_id: str | None = None,
        action: str = Action.GENERATE,
        reply_to: ReplyTo | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[str]:
        """Send and return once Kafka has it: the request ids, one for each part that the texts were split into.

        The outcomes appear in `results`, and as copies where `reply_to` says. Raises as `embed`.
        """
        request = self._request(tenant_id, action, collection, document_id, options, chunks=as_chunks(texts))
        parts = self._parts(replace(request, reply_to=reply_to))
        await self._produce("requests", parts)
        return [request_id(part) for part in parts]

    async def replace_document(
        self,
        chunks: Sequence[str | Chunk],
        *,
        tenant_id: str,
        collection: str | None,
        document_id: str,
        vector_spaces: Sequence[str] = (),
        timeout_s: float = 60.0,
        **options: Unpack[RequestOptions],
    ) -> DocumentOutcome:
        """Embed a document's chunks, then say that these are all it has: what it had before leaves the sink view.

        No chunks delete the document. `vector_spaces` default to the settings. A chunk that fails keeps the vector
        it had before, if any: look at the outcomes. Raises as `embed`.
        """
        whole = as_chunks(chunks)
        request = self._request(tenant_id, Action.GENERATE, collection, document_id, options, chunks=whole)
        manifest = replace(
            request,
            action=Action.DOCUMENT_MANIFEST.value,
            chunks=(),
            chunk_ids=tuple(chunk.chunk_id for chunk in whole),
            vector_spaces=self._spaces(vector_spaces, request),
        )
        outcomes = await self._ask("requests", [request, manifest] if whole else [manifest], timeout_s)
        return DocumentOutcome(outcomes[:-1], outcomes[-1])

    async def delete(
        self,
        chunk_ids: Sequence[str],
        *,
        tenant_id: str,
        collection: str | None,
        document_id: str,
        vector_spaces: Sequence[str] = (),
        timeout_s: float = 60.0,
        **options: Unpack[RequestOptions],
    ) -> list[Outcome]:
        """Delete single chunks of a document from the sink view; an outcome for each id. Raises as `embed`."""
        request = self._request(tenant_id, Action.DELETE, collection, document_id, options, chunk_ids=tuple(chunk_ids))
        request = replace(request, vector_spaces=self._spaces(vector_spaces, request))
        return await self._ask("requests", [request], timeout_s)

    async def results(
        self, *, from_beginning: bool = True, follow: bool = True, remember: int | None = 1_000_000
    ) -> AsyncGenerator[ReceivedResult, None]:
        """Outcomes as they were written, the first copy of each; without `follow`, up to the present end.

        Copies are told apart within the newest `remember` requests (None: all, in unbounded memory). Close it
        (`contextlib.aclosing`) when you stop early. Raises BrokerUnavailable.
        """
        first = FirstResults(remember=remember)
        records = read_records(self.settings, self._names["results"], from_beginning=from_beginning, follow=follow)
        async with aclosing(records):
            async for record in records:
                result = await self._codec.read(ReceivedResult, record.value)
                if not isinstance(result, Undecodable) and first.is_first(result):
                    yield result

    async def usage(
        self, *, from_beginning: bool = True, follow: bool = True, remember: int | None = None
    ) -> AsyncGenerator[Usage, None]:
        """Charges as they were written: the first copy of each usage event, by the rule of the totals.

        `remember` bounds the keys kept (default: those of twice the horizon); a bill needs all of them. Else as
        `results`.
        """
        first = FirstCharges(horizon_days=self.settings.horizon_days, remember=remember)
        records = read_records(self.settings, self._names["usage"], from_beginning=from_beginning, follow=follow)
        async with aclosing(records):
            async for record in records:
                usage = await self._codec.read(Usage, record.value)
                if isinstance(usage, Undecodable):
                    continue
                if first.is_first(usage.idempotency_key, record.source.append_ms):
                    yield usage

    def _request(
        self,
        tenant_id: str,
        action: str,
        collection: str | None,
        document_id: str | None,
        options: RequestOptions,
        *,
        chunks: tuple[Chunk, ...] = (),
        chunk_ids: tuple[str, ...] = (),
    ) -> Request:
        fields: RequestOptions = {"correlation_id": uuid.uuid4().hex, **options}
        return Request(
            tenant_id=tenant_id,
            action=str(action),
            collection=collection,
            document_id=document_id,
            source_service=self._source_service,
            requested_at_ms=time.time_ns() // 1_000_000,
            chunks=chunks,
            chunk_ids=chunk_ids,
            **fields,
        )

    def _spaces(self, given: Sequence[str], request: Request) -> tuple[str, ...]:
        """The vector spaces meant: as given, else of the settings, else the one this request's model has."""
        if given or self.settings.vector_spaces:
            return tuple(given or self.settings.vector_spaces)
        catalogue = load_catalogue(self.settings)
        model = catalogue.find(request.model or catalogue.default_model)
        if model is None:
            raise RequestRefused(
                "vector_spaces: the model is not in this client's catalogue; name the spaces meant, here or by "
                "EMBEDDING_VECTOR_SPACES"
            )
        return (str(model.space(request.dimensions or catalogue.default_dimensions(model))),)

    def _parts(self, request: Request) -> list[Request]:
        check(request)
        return split(request, max_bytes=self.settings.max_request_bytes, encode=self._codec.encode_request)

    async def _ask(self, topic: str, requests: Sequence[Request], timeout_s: float) -> list[Outcome]:
        """Send the requests in their order and gather the outcomes."""
        for request in requests:
            check(request)
        await self._replies.start(await self._partitions("replies"))
        address = self._replies.address()
        parts = [part for request in requests for part in self._parts(replace(request, reply_to=address))]
        with self._replies.expecting(parts) as pending:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._produce(topic, parts)
                    await self._replies.wait(pending)
            except TimeoutError:
                pass  # what is there is told, the rest is timed_out
            return [outcome for one in pending for outcome in one.outcomes()]

    async def _produce(self, topic: str, requests: Sequence[Request]) -> None:
        """Returns when the broker has acknowledged all. A document's requests share a partition, in their order."""
        producer, name, count = await self._connected(), self._names[topic], await self._partitions(topic)
        sent: list[asyncio.Future[object]] = []
        try:
            async with asyncio.timeout(self.settings.delivery_timeout_s):
                for request in requests:
                    key = request_key(request)
                    partition = None if key is None else partition_of(key, count)
                    value = self._codec.encode_request(request)
                    sent.append(await producer.send(name, value, key=key, partition=partition))
                await asyncio.gather(*sent)
        except (KafkaError, TimeoutError) as error:
            self._retire(producer)
            raise DeliveryFailed(
                f"{name}: not acknowledged ({type(error).__name__}); repeat the call with the same correlation_id"
            ) from None

    def _retire(self, producer: AIOKafkaProducer) -> None:
        """An idempotent producer does not recover from every failure: the next call gets a new one.

        The old one may take its request timeout to stop, which no caller should wait for.
        """
        current = self._producer is producer
        if not current:
            return  # another call that failed with it was first
        task = asyncio.create_task(producer.stop())
        self._producer = None
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _connected(self) -> AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    acks="all",
                    enable_idempotence=self.settings.producer_idempotent,
                    compression_type=self.settings.producer_compression,
                    max_request_size=self.settings.max_record_bytes + topics.BATCH_SPARE_BYTES,
                    **connection(self.settings),
                )
                try:
                    await producer.start()
                except (KafkaError, OSError) as error:
                    await producer.stop()
                    raise unavailable(self.settings, error) from None
                self._producer = producer
            return self._producer

    async def _partitions(self, topic: str) -> int:
        """Of one of our topics, asked once: counts are fixed."""
        name = self._names[topic]
        if name not in self._counts:
            self._counts |= await topics.partition_counts(self.settings, [name])
        if name not in self._counts:
            raise TopicsError(f"{name}: is missing; run `{topics.CREATE_COMMAND}`")
        return self._counts[name]
