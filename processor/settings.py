"""Every setting, with its unit in its name, a sane default and the help text that the docs table is made of.

Environment variables carry the prefix EMBEDDING_ (EMBEDDING_WINDOW_MAX_TEXTS=256); the names of the systems that this
one replaces (OPENAI_API_KEY, ...) are accepted as aliases. `load()` reports all faults together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from processor.domain import Lane, TokenType, Truncate
from processor.errors import SettingsError

PREFIX = "EMBEDDING_"

DEFAULT_CACHE_SECRET = "embedding-processor"

DAY_S = 86_400
CACHE_LIVES = 2
"""A vector lives up to so often: in L2, and as long again in the L1 that found it there at the last moment."""

RESULT_SPARE_BYTES = 50_000
"""What a result may hold beside what it repeats of its request: a vector of up to 10,000 dimensions, ids, names."""


def read_secret(path: Path, of: str) -> str:
    """What a file of one secret holds, without blanks around it. SettingsError, which names `of` and quotes nothing."""
    try:
        secret = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        why = f"can't read it: {error.strerror}"
    except UnicodeDecodeError:
        why = "is no text"
    else:
        if secret:
            return secret
        why = "is empty"
    raise SettingsError(f"{of}: {why}")


def checked_address(address: str) -> str:
    """An address over HTTP, without a slash at its end. ValueError says what is wrong and quotes nothing."""
    try:
        parts = urlsplit(address)
        named = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        named = None
    if not named or not address.isascii() or not address.isprintable() or " " in address:
        raise ValueError("must begin with https:// or http:// and name a host")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must end after the path, and name no user; a key has a setting of its own")
    return address.rstrip("/")


def _alias(*others: str) -> AliasChoices:
    return AliasChoices(*others)


class Settings(BaseSettings):
    """One frozen object for a worker, an aggregator and the command line."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_file=".env", populate_by_name=True, allow_inf_nan=False
    )

    # Kafka
    bootstrap_servers: str = Field(
        "localhost:9092",
        min_length=1,
        description="Kafka brokers, host:port separated by commas.",
        validation_alias=_alias("EMBEDDING_BOOTSTRAP_SERVERS", "KAFKA_BOOTSTRAP_SERVERS"),
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."
    )
    sasl_username: str | None = Field(None, description="SASL user name.")
    sasl_password: SecretStr | None = Field(None, description="SASL password; or the file below.")
    sasl_password_file: Path | None = Field(None, description="File that holds the SASL password.")
    ssl_ca_file: Path | None = Field(None, description="PEM file of the certificate authority of the brokers.")
    ssl_cert_file: Path | None = Field(None, description="PEM file of our certificate (mutual TLS).")
    ssl_key_file: Path | None = Field(None, description="PEM file of our key (mutual TLS).")
    topic_prefix: str = Field("", description="Put before the name of every topic.")
    group_id: str = Field("embedding-processor", description="Consumer group of the workers; the lane is appended.")
    aggregator_group_id: str = Field("embedding-aggregator", description="Consumer group of the aggregator.")
    group_instance_id: str | None = Field(None, description="Static membership id, unique per process; seldom pays.")
    session_timeout_s: float = Field(30.0, gt=1, description="Group session: a silent worker is replaced after this.")
    heartbeat_interval_s: float = Field(
        1.0, gt=0, description="Time between heartbeats to the group; a rebalance is noticed by the next one."
    )
    lease_margin_s: float = Field(
        2.0, ge=0, description="A worker stops sending this long before its session may have run out."
    )
    revoke_budget_s: float = Field(10.0, gt=0, description="Time to finish work in flight when partitions are revoked.")
    delivery_timeout_s: float = Field(
        60.0, gt=0, description="A record not acknowledged by the broker in this time ends the process."
    )
    broker_wait_s: float = Field(
        300.0, ge=0, description="How long a start waits for brokers that don't answer; then the process ends."
    )
    commit_interval_s: float = Field(1.0, gt=0, description="Time between offset commits.")
    commit_records: int = Field(
        10_000, gt=0, description="Finished records that are committed before that time is over."
    )
    max_record_bytes: int = Field(1_000_000, gt=1000, description="Largest record that is decoded or produced, bytes.")
    producer_compression: Literal["gzip", "snappy", "lz4", "zstd"] | None = Field(
        None, description="gzip, snappy, lz4 or zstd; default none."
    )
    producer_idempotent: bool = Field(
        True, description="Off only for the embedded broker, which knows no such producer."
    )
    require_log_append_time: bool = Field(
        True, description="Refuse topics whose timestamps are the client's. Off only for the embedded broker."
    )
    schema_registry_url: str | None = Field(
        None, repr=False, description="Confluent-compatible registry; none: Avro single-object encoding."
    )
    schema_registry_timeout_s: float = Field(5.0, gt=0, description="Time limit of one registry request.")

    # Worker
    lane: Lane = Field(Lane.BULK, description="bulk takes embedding-requests, interactive takes embedding-queries.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models this worker serves, separated by commas; none: all of the provider's catalogue.",
    )
    sink_view: bool = Field(True, description="Keep embedding-vectors, the compacted view for sinks.")
    reply_topics: Annotated[tuple[str, ...], NoDecode] = Field(
        ("embedding-replies",),
        description="Topics a request may name in reply_to (there in full, here without prefix), separated by commas.",
    )
    window_max_texts: int = Field(512, gt=0, description="A window (texts looked up together) closes at this many.")
    window_max_tokens: int = Field(200_000, gt=0, description="A window closes at this many tokens (bytes / 4).")
    window_max_wait_ms: int = Field(50, ge=0, description="A window closes after this wait; interactive: at once.")
    max_concurrent_calls: int = Field(
        16,
        gt=0,
        description="Most provider calls in flight per worker and deployment; it finds out by itself how many pay.",
        validation_alias=_alias("EMBEDDING_MAX_CONCURRENT_CALLS", "WORKER_COUNT"),
    )
    read_ahead_bytes: int = Field(
        128 * 1024 * 1024,
        gt=0,
        description="Bytes of fetched records not yet finished, 4,000 and its vector added a text; then reading waits. "
        "Of texts with 1,536 dimensions it holds six full calls.",
    )
    max_request_bytes: int = Field(
        900_000, gt=0, description="Largest request that is served, bytes; the client splits what is larger."
    )
    truncate: Truncate = Field(Truncate.ERROR, description="Policy for over-long texts when a request names none.")
    shutdown_timeout_s: float = Field(25.0, gt=0, description="A watchdog ends a shutdown that takes longer.")
    http_host: str = Field("127.0.0.1", description="Address of the internal port: metrics, health, models.")
    http_port: int = Field(
        8080, ge=0, le=65535, description="Internal port; 0 picks a free one. --processes counts up from it."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO",
        description="DEBUG, INFO, WARNING or ERROR.",
        validation_alias=_alias("EMBEDDING_LOG_LEVEL", "LOG_LEVEL"),
    )
    log_format: Literal["json", "console"] = Field("json", description="json, or console for people.")

    # Provider
    provider: Literal["openai", "azure", "cohere", "local", "sentence-transformers"] = Field(
        "openai",
        description="openai (or any server of its embeddings API), azure (a base URL ending in /openai/v1, or the "
        "deployments file), cohere, local (ONNX) or sentence-transformers.",
    )
    default_model: str | None = Field(
        None,
        description="Model of requests that name none; default: the provider's first.",
        validation_alias=_alias("EMBEDDING_DEFAULT_MODEL", "OPENAI_DEFAULT_MODEL"),
    )
    openai_base_url: str | None = Field(
        None,
        description="Base URL of the embeddings API; default OpenAI's.",
        validation_alias=_alias("EMBEDDING_OPENAI_BASE_URL", "OPENAI_BASE_URL"),
    )
    openai_api_key: SecretStr | None = Field(
        None, description="API key.", validation_alias=_alias("EMBEDDING_OPENAI_API_KEY", "OPENAI_API_KEY")
    )
    openai_api_key_file: Path | None = Field(None, description="File that holds the API key.")
    cohere_base_url: str = Field(
        "https://api.cohere.com", min_length=1, description="Base URL of Cohere's API, or of a server that speaks it."
    )
    cohere_api_key: SecretStr | None = Field(
        None,
        description="API key of Cohere.",
        validation_alias=_alias("EMBEDDING_COHERE_API_KEY", "CO_API_KEY", "COHERE_API_KEY"),
    )
    cohere_api_key_file: Path | None = Field(None, description="File that holds the API key of Cohere.")
    provider_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Time limit of one whole provider call.",
        validation_alias=_alias("EMBEDDING_PROVIDER_TIMEOUT_S", "OPENAI_TIMEOUT_SECONDS"),
    )
    provider_connect_timeout_s: float = Field(5.0, gt=0, description="Time limit of connecting to the provider.")
    provider_read_timeout_s: float = Field(
        30.0, gt=0, description="Time limit of waiting for the next bytes of an answer."
    )
    deployments_file: Path | None = Field(
        None,
        description="YAML file of deployments of the same models, in order of preference, for failover; "
        "none: the one that the settings above name.",
    )
    requests_per_minute: int | None = Field(
        None, gt=0, description="Request limit of the provider's account; corrected by its headers; none: unknown."
    )
    tokens_per_minute: int | None = Field(
        None, gt=0, description="Token limit of the provider's account; corrected by its headers; none: unknown."
    )
    interactive_share_percent: int = Field(
        10,
        ge=0,
        le=90,
        description="Part of these limits that is the interactive lane's; bulk has the rest. 0: each lane takes "
        "all, for accounts of one lane.",
    )
    limit_sharers: int = Field(
        1,
        gt=0,
        description="Workers of a lane that share the limits. With Redis they lease what they need; without it, or "
        "while it is out of reach, each keeps to this fraction.",
    )
    retry_after_max_s: float = Field(
        300.0, gt=0, description="Longest wait that a Retry-After of the provider can ask for."
    )
    tenant_weights: Annotated[dict[str, PositiveInt], NoDecode] = Field(
        default_factory=dict,
        description='Shares of tenants in the tokens of calls, JSON such as {"acme": 3}; others have 1.',
    )
    retry_initial_s: float = Field(
        0.5, gt=0, description="First backoff after a transient fault; doubles, full jitter."
    )
    retry_max_s: float = Field(30.0, gt=0, description="Longest backoff between attempts.")
    poison_attempts: int = Field(
        5,
        gt=0,
        description="A call that failed so often while others succeeded is searched for the text at fault, which "
        "ends as provider_rejects.",
    )
    local_model_path: Path | None = Field(
        None,
        description="Directory of a model saved by sentence-transformers, for local its ONNX export; the directory's "
        "name is the model's. Default: local has a model built in.",
    )
    local_threads: int = Field(0, ge=0, description="Threads of a model on this machine; 0: one per core.")
    local_device: str = Field(
        "cpu", min_length=1, description="Device of sentence-transformers, as torch names it: cpu, cuda, cuda:1, mps."
    )
    catalogue_file: Path | None = Field(None, description="YAML file that extends or overrides the model catalogue.")
    default_dimensions_by_model: Annotated[dict[str, int], NoDecode] = Field(
        default_factory=dict,
        description='Dimensions of requests that name none, JSON such as {"text-embedding-3-large": 1024}.',
        validation_alias=_alias(
            "EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL", "DEFAULT_DIMENSIONS_BY_MODEL", "PREFERRED_DIMENSIONS"
        ),
    )

    # Cache
    redis_url: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="redis:// or rediss:// of the shared cache (L2); none: L1 alone.",
        validation_alias=_alias("EMBEDDING_REDIS_URL", "REDIS_URL"),
    )
    redis_cluster: bool = Field(False, description="Whether the URL names a node of a Redis Cluster.")
    redis_username: str | None = Field(None, description="ACL user of Redis; or in the URL.")
    redis_password: SecretStr | None = Field(None, description="Password of Redis; or in the URL, or the file below.")
    redis_password_file: Path | None = Field(None, description="File that holds the password of Redis.")
    redis_ca_file: Path | None = Field(
        None, description="PEM file of the certificate authority of Redis, for rediss://."
    )
    redis_cert_file: Path | None = Field(None, description="PEM file of our certificate for Redis (mutual TLS).")
    redis_key_file: Path | None = Field(None, description="PEM file of our key for Redis (mutual TLS).")
    redis_timeout_ms: int = Field(
        250,
        gt=0,
        le=3_000,  # a purge waits for look-ups under way: see `purge_watch.AGAIN_S`
        description="Time budget of a look-up, up to 3000; then the cache is gone without.",
    )
    cache_ttl_s: int = Field(86_400, gt=0, description="Life of a cache entry; at most half of EMBEDDING_HORIZON_DAYS.")
    cache_ttl_jitter_percent: int = Field(
        10,
        ge=0,
        le=90,
        description="An entry lives up to so much shorter, by chance: what was stored together "
        "does not expire together.",
    )
    cache_scope: Literal["tenant", "shared"] = Field(
        "tenant",
        description="Whose vectors a text may be answered with: its tenant's, or anybody's. shared saves more, and "
        "lets a tenant find out by timing whether another one has embedded a text.",
    )
    l1_bytes: int = Field(64 * 1024 * 1024, ge=0, description="Size of the in-process cache.")
    l1_policy: Literal["lru", "lfu"] = Field(
        "lfu", description="What the in-process cache drops first: what was not used for longest, or least often."
    )
    cache_secret: SecretStr = Field(
        SecretStr(DEFAULT_CACHE_SECRET),
        description="Key of the cache-key hash; set one of your own, or the file below.",
    )
    cache_secret_file: Path | None = Field(None, description="File that holds the cache secret.")
    cache_secret_former: SecretStr | None = Field(
        None,
        description="The secret before the present one: what was stored under it is still found. For as long as "
        "entries live after a change; or the file below.",
    )
    cache_secret_former_file: Path | None = Field(None, description="File that holds the former cache secret.")

    # Aggregator
    aggregator_store: Path = Field(Path("aggregator.sqlite"), description="The aggregator's local store; can be lost.")
    horizon_days: int = Field(35, gt=0, description="Copies of a usage event closer together than twice this are one.")
    ledger_confirm_margin_s: float = Field(
        30.0,
        gt=0,
        description="Added to call and session timeout: an intent without receipt is then unconfirmed.",
    )

    usage_token_types: Annotated[tuple[str, ...], NoDecode] = Field(
        ("embedding",),
        description="Token types of usage events that are totalled, embedding among them, separated by commas, * for "
        "all; those of other services that share the topic are passed over.",
    )
    budgets_file: Path | None = Field(
        None, description="YAML file of monthly limits of tokens or money by payer; none: no budgets."
    )
    budgets_bind_queries: bool = Field(
        False, description="Whether a spent budget refuses texts of the interactive lane too (a worker's setting)."
    )

    # Client
    vector_spaces: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Vector spaces that deletes and manifests of the client mean, separated by commas; "
        "none: that of the default model.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any, info: ValidationInfo) -> Any:
        """A variable that is set to nothing, as container files like to, means none where none is the default."""
        assert info.field_name is not None
        return None if value == "" and cls.model_fields[info.field_name].default is None else value

    @field_validator("security_protocol", "sasl_mechanism", "log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("openai_base_url", "cohere_base_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        return None if value is None else checked_address(value)

    @field_validator("models", "reply_topics", "vector_spaces", "usage_token_types", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("usage_token_types")
    @classmethod
    def _ours_are_totalled(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if not {TokenType.EMBEDDING, "*"} & set(types):
            raise ValueError("must name embedding, or be *: without our own charges all that was billed is a residual")
        return types

    @field_validator("default_dimensions_by_model", "tenant_weights", mode="before")
    @classmethod
    def _parse_json(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        example = '{"acme": 3}' if info.field_name == "tenant_weights" else '{"text-embedding-3-large": 1024}'
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"must be a JSON object such as {example}") from None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.heartbeat_interval_s * 3 > self.session_timeout_s:
            raise ValueError(f"{PREFIX}HEARTBEAT_INTERVAL_S: must be at most a third of {PREFIX}SESSION_TIMEOUT_S")
        if self.lease_margin_s + self.heartbeat_interval_s >= self.session_timeout_s:
            raise ValueError(
                f"{PREFIX}LEASE_MARGIN_S: plus {PREFIX}HEARTBEAT_INTERVAL_S must stay below {PREFIX}SESSION_TIMEOUT_S"
            )
        if self.retry_initial_s > self.retry_max_s:
            raise ValueError(f"{PREFIX}RETRY_INITIAL_S: must be at most {PREFIX}RETRY_MAX_S")
        if CACHE_LIVES * self.cache_ttl_s > self.horizon_days * DAY_S:
            # A request that is sent again and finds its entry is charged to the call that was paid; it must still be
            # known that it was charged to that call before.
            raise ValueError(f"{PREFIX}CACHE_TTL_S: must be at most half of {PREFIX}HORIZON_DAYS")
        if self.max_request_bytes + RESULT_SPARE_BYTES > self.max_record_bytes:
            raise ValueError(
                f"{PREFIX}MAX_REQUEST_BYTES: must be {RESULT_SPARE_BYTES} below {PREFIX}MAX_RECORD_BYTES, "
                "a result repeats a chunk's metadata beside its vector"
            )
        return self

    @property
    def lane_share(self) -> float:
        """The part of an account's limits that all workers of this lane have, 0 to 1."""
        if self.interactive_share_percent == 0:
            return 1.0
        percent = self.interactive_share_percent
        return (percent if self.lane is Lane.INTERACTIVE else 100 - percent) / 100

    @property
    def has_default_cache_secret(self) -> bool:
        """Whether who reads this code can tell from the shared cache's keys whether a text was embedded."""
        return self.secret("cache_secret") in {"", DEFAULT_CACHE_SECRET}

    def topic(self, name: str) -> str:
        """The full name of a topic of ours."""
        return self.topic_prefix + name

    def secret(self, name: str) -> str | None:
        """The value of a secret setting, from its file when `<name>_file` is set. SettingsError when that has none."""
        path: Path | None = getattr(self, f"{name}_file")
        if path is not None:
            return read_secret(path, f"{PREFIX}{name.upper()}_FILE")
        value: SecretStr | None = getattr(self, name)
        return value.get_secret_value() if value is not None else None


def load(**overrides: Any) -> Settings:
    """Settings from the environment and `.env`, overrides first. Raises SettingsError with every fault at once."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        faults = "".join(f"\n  {_sentence(fault)}" for fault in error.errors(include_input=False))
        raise SettingsError(f"settings are not usable, fix these and start again:{faults}") from None


def _sentence(fault: Mapping[str, Any]) -> str:
    """A fault with its variable; one of several settings together names them itself."""
    what = fault["msg"].removeprefix("Value error, ")
    name = "_".join(map(str, fault["loc"])).upper().removeprefix(PREFIX)
    return f"{PREFIX}{name}: {what}" if name else what
