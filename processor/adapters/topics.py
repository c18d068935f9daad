"""The topics of schemas/topics.yaml: making them, and refusing at start what would break a law."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import yaml
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from processor.adapters.kafka import answered, connection, unavailable
from processor.adapters.schemas import schema_directory
from processor.errors import TopicsError
from processor.settings import Settings

CREATE_COMMAND = "embedding-processor topics create"
DAY_MS = 86_400_000
BATCH_SPARE_BYTES = 1_024
"""What a record batch adds to its one record."""

REQUEST_TOPICS = frozenset({"requests", "queries"})
LEDGER_TOPICS = frozenset({"usage", "calls"})
"""Their log is the truth of the bill: totals and residuals are recomputed from it."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as described. `id` is its logical name in code; `name` lacks the prefix of the settings."""

    id: str
    name: str
    owner: str
    key: str
    value: str
    partitions: int
    config: Mapping[str, str]
    doc: str


class Severity(StrEnum):
    """An error keeps a process from starting; a warning is logged."""

    ERROR = "error"
    WARNING = "warning"


class Finding(NamedTuple):
    """What is wrong with a topic, and how to mend it."""

    topic: str
    severity: Severity
    what: str
    fix: str


class Live(NamedTuple):
    """A topic as the broker has it. A setting that the broker doesn't report is missing from `config`."""

    partitions: int
    config: Mapping[str, str]


@cache
def topics() -> Mapping[str, Topic]:
    """Every topic by its logical name: requests, queries, results, ..."""
    described = yaml.safe_load((schema_directory() / "topics.yaml").read_text(encoding="utf-8"))
    return {
        id_: Topic(id=id_, **fields | {"config": {name: str(v) for name, v in fields["config"].items()}})
        for id_, fields in described.items()
    }


def subjects(settings: Settings) -> list[tuple[str, str]]:
    """(full topic name, record name) of every topic with an Avro value, for `Codec.start`."""
    named = ((settings.topic(topic.name), topic.value.split(",")[0]) for topic in topics().values())
    return [(name, record) for name, record in named if record.isidentifier()]


async def create(settings: Settings, *, partitions: int | None = None, replication: int | None = None) -> list[str]:
    """Make what is missing; returns the full names of what was made. What exists is left as it is.

    `partitions` overrides every topic's count; `replication` defaults to 3, or the number of brokers if lower.
    Returns once the brokers know the topics. Raises TopicsError or BrokerUnavailable.
    """
    async with _admin(settings) as admin:
        cluster = await admin.describe_cluster()
        factor = replication or min(3, len(cluster["brokers"]))
        wanted = [
            NewTopic(settings.topic(topic.name), partitions or topic.partitions, factor, None, dict(topic.config))
            for topic in topics().values()
        ]
        existing = set(await _describe(admin, [topic.name for topic in wanted]))
        missing = [topic for topic in wanted if topic.name not in existing]
        if not missing:
            return []
        answer = await admin.create_topics(missing)
        made: list[str] = []
        for name, code, *message in answer.topic_errors:
            error = for_code(code)
            if code == 0:
                made.append(name)
            elif error is not TopicAlreadyExistsError:
                detail = message[0] if message and message[0] else error.__name__
                raise TopicsError(f"{name}: can't be made: {detail}")
        await _await_known(admin, [topic.name for topic in missing])
        return made


async def check(settings: Settings, only: Collection[str] | None = None) -> list[Finding]:
    """What is wrong with the topics (`only` these logical names), worst first. May raise BrokerUnavailable."""
    wanted = [topic for topic in topics().values() if only is None or topic.id in only]
    async with _admin(settings) as admin:
        live = await _describe(admin, [settings.topic(topic.name) for topic in wanted])
    found = [finding for topic in wanted for finding in judge(topic, live.get(settings.topic(topic.name)), settings)]
    return sorted(found, key=lambda finding: (finding.severity, finding.topic))


async def verify(settings: Settings, only: Collection[str] | None = None) -> list[Finding]:
    """`check` for a start: raises TopicsError with every error at once, else returns the warnings.

    Brokers that don't answer are waited for, up to `broker_wait_s`.
    """
    findings = await answered(settings, lambda: check(settings, only))
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        lines = "\n".join(f"  {finding.topic}: {finding.what}; {finding.fix}" for finding in errors)
        raise TopicsError(f"topics are not usable, fix these and start again:\n{lines}")
    return findings


async def partition_counts(settings: Settings, names: Iterable[str]) -> dict[str, int]:
    """How many partitions each of these topics (full names) has; a missing one is left out. May raise
    BrokerUnavailable."""
    async with _admin(settings) as admin:
        return await _partition_counts(admin, names)


def judge(topic: Topic, live: Live | None, settings: Settings) -> Iterable[Finding]:
    """The findings on one topic as the broker has it; `live` None: it is missing."""
    name = settings.topic(topic.name)

    def error(what: str, fix: str) -> Finding:
        return Finding(name, Severity.ERROR, what, fix)

    def set_to(setting: str, value: object) -> str:
        return f"set {setting}={value}"

    if live is None:
        yield error("is missing", f"run `{CREATE_COMMAND}`")
        return
    config = live.config
    policy, ours = config.get("cleanup.policy"), topic.config["cleanup.policy"]
    if policy is not None and policy != ours:
        lost = "records that count would vanish" if "compact" in policy else "the newest of a key would expire"
        yield error(f"cleanup.policy is {policy}: {lost}", set_to("cleanup.policy", ours))
    stamp = topic.config.get("message.timestamp.type")
    if stamp is not None and config.get("message.timestamp.type") != stamp:
        what = "message.timestamp.type is not LogAppendTime: a client's clock could move a charge"
        if settings.require_log_append_time:
            yield error(what, set_to("message.timestamp.type", stamp))
        else:
            yield Finding(name, Severity.WARNING, what, "accepted, EMBEDDING_REQUIRE_LOG_APPEND_TIME is off")
    yield from _judge_retention(topic, name, config, settings)
    if topic.id not in REQUEST_TOPICS:
        least = settings.max_record_bytes + BATCH_SPARE_BYTES
        if (most := _number(config, "max.message.bytes")) is not None and most < least:
            yield error(
                f"max.message.bytes is {most}: a record of EMBEDDING_MAX_RECORD_BYTES would be refused",
                set_to("max.message.bytes", topic.config["max.message.bytes"]),
            )
    lag, least_lag = _number(config, "min.compaction.lag.ms"), _number(topic.config, "min.compaction.lag.ms")
    if lag is not None and least_lag is not None and lag < least_lag:
        yield error(
            f"min.compaction.lag.ms is {lag}: a manifest could vanish before it was compared",
            set_to("min.compaction.lag.ms", least_lag),
        )


def _judge_retention(topic: Topic, name: str, config: Mapping[str, str], settings: Settings) -> Iterable[Finding]:
    kept_ms, ours_ms = _number(config, "retention.ms"), _number(topic.config, "retention.ms")
    if kept_ms is None or ours_ms is None:
        return
    if topic.id in LEDGER_TOPICS:
        least_ms = (2 * settings.horizon_days + 30) * DAY_MS
        if kept_ms != -1 and kept_ms < least_ms:
            what = f"retention.ms is {kept_ms}: under twice the horizon + 30 days, a copy could be charged again"
            yield Finding(name, Severity.ERROR, what, f"set retention.ms={least_ms} or more")
        if (_number(config, "retention.bytes") or -1) != -1:
            what = "retention.bytes is set: a busy day would delete what totals are recomputed from"
            yield Finding(name, Severity.ERROR, what, "set retention.bytes=-1")
    elif kept_ms != -1 and kept_ms < ours_ms:
        what = f"retention.ms is {kept_ms}, described as {ours_ms}"
        yield Finding(name, Severity.WARNING, what, f"set retention.ms={ours_ms} if that was not meant")


def _number(config: Mapping[str, str], name: str) -> int | None:
    value = config.get(name)
    return int(value) if value else None


@asynccontextmanager
async def _admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**connection(settings), request_timeout_ms=20_000)
    try:
        await admin.start()
        yield admin
    except (KafkaError, TimeoutError) as error:
        raise unavailable(settings, error) from None
    finally:
        await admin.close()


async def _partition_counts(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, int]:
    """Of the topics that exist. The whole list is asked for: to name a missing topic may make it."""
    wanted = set(names)
    return {
        topic["topic"]: len(topic["partitions"])
        for topic in await admin.describe_topics()
        if topic["topic"] in wanted and not topic["error_code"]
    }


async def _describe(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, Live]:
    """The topics that exist, by name."""
    known = await _partition_counts(admin, names)
    if not known:
        return {}
    answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in known])
    configs: dict[str, dict[str, Any]] = {
        name: {entry[0]: entry[1] for entry in entries}
        for answer in answers
        for _code, _message, _type, name, entries in answer.resources
    }
    return {name: Live(count, configs.get(name, {})) for name, count in known.items()}


async def _await_known(admin: AIOKafkaAdminClient, names: Sequence[str], *, attempts: int = 50) -> None:
    """A broker may answer for the controller before it knows the topic itself."""
    for _ in range(attempts):
        if set(names) <= (await _partition_counts(admin, names)).keys():
            return
        await asyncio.sleep(0.1)
    raise TopicsError(f"{', '.join(names)}: made, but the brokers don't show them; run `{CREATE_COMMAND}` again")
