"""Looks at everything a worker needs and says of each fault its cause and its fix. Never embeds, never writes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from processor.adapters import topics
from processor.adapters.budgets_file import read_budgets_file
from processor.adapters.catalogue import load_catalogue
from processor.adapters.providers import NamedProvider, open_deployments
from processor.adapters.redis_cache import RedisCache
from processor.adapters.registry import SchemaRegistry
from processor.errors import (
    BrokerUnavailable,
    ProcessorError,
    ProviderError,
    ProviderPaused,
    RegistryUnavailable,
    SettingsError,
)
from processor.settings import Settings, load


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `state` is ok, warning or error; `fix` says what to do about the latter two."""

    name: str
    state: str
    what: str
    fix: str = ""


async def examine(settings: Settings | None = None) -> AsyncIterator[Check]:
    """All checks, each as it is done; without usable settings there is nothing else to look at."""
    try:
        settings = settings or load()
    except SettingsError as error:
        yield Check("settings", "error", str(error), "correct the named variables")
        return
    secrets = _cache_secrets(settings)
    yield secrets
    if secrets.state == "error":
        return
    yield _budgets(settings)
    async for check in _kafka(settings):
        yield check
    yield await _cache(settings)
    yield await _registry(settings)
    async for check in _providers(settings):
        yield check


def _cache_secrets(settings: Settings) -> Check:
    """Every worker reads them at start, with Redis or without."""
    try:
        settings.secret("cache_secret")
        settings.secret("cache_secret_former")
    except SettingsError as error:
        return Check("settings", "error", str(error), "correct the named variable, or the file")
    return Check("settings", "ok", "usable")


def _budgets(settings: Settings) -> Check:
    try:
        read_budgets_file(settings.budgets_file)
    except SettingsError as error:
        return Check("budgets", "error", str(error), "correct the file: the aggregator does not start with it")
    return Check("budgets", "ok", "none set" if settings.budgets_file is None else "the file is usable")


async def _kafka(settings: Settings) -> AsyncIterator[Check]:
    try:
        findings = await topics.check(settings)
    except BrokerUnavailable as error:
        yield Check("broker", "error", str(error), "start Kafka, or correct EMBEDDING_BOOTSTRAP_SERVERS")
        return
    except ProcessorError as error:
        yield Check("broker", "error", str(error), "correct the named variables")
        return
    yield Check("broker", "ok", f"answers at {settings.bootstrap_servers}")
    for finding in findings:
        yield Check("topics", finding.severity.value, f"{finding.topic}: {finding.what}", finding.fix)
    if not findings:
        yield Check("topics", "ok", f"all {len(topics.topics())} are as described")


async def _cache(settings: Settings) -> Check:
    if not settings.redis_url:
        fix = "set EMBEDDING_REDIS_URL to share the cache and keep it over restarts"
        return Check("cache", "warning", "no shared cache: each worker has its own, empty at start", fix)
    try:
        redis = RedisCache.from_settings(settings)
    except SettingsError as error:
        return Check("cache", "error", str(error), "correct the named variable")
    try:
        said = await redis.ping()
    finally:
        await redis.close()
    if said != "ok":
        return Check("cache", "error", said, "start Redis, or correct EMBEDDING_REDIS_URL; workers go on without it")
    if settings.has_default_cache_secret:
        fix = "put one of your own into a file and name it in EMBEDDING_CACHE_SECRET_FILE"
        return Check("cache", "warning", "Redis answers; its keys are hashed with the default secret", fix)
    return Check("cache", "ok", "Redis answers")


async def _registry(settings: Settings) -> Check:
    if not settings.schema_registry_url:
        return Check("registry", "ok", "none set: records are Avro single objects")
    registry = SchemaRegistry(settings.schema_registry_url, timeout_s=settings.schema_registry_timeout_s)
    try:
        await registry.schema(1)
    except RegistryUnavailable as error:
        return Check("registry", "error", str(error), "start it, or correct EMBEDDING_SCHEMA_REGISTRY_URL")
    finally:
        await registry.close()
    return Check("registry", "ok", "answers")


async def _providers(settings: Settings) -> AsyncIterator[Check]:
    try:
        catalogue = load_catalogue(settings)
        deployments = open_deployments(settings, catalogue)
    except SettingsError as error:
        yield Check("provider", "error", str(error), "correct the named variables")
        return
    for deployment in deployments:
        yield await _provider(settings, deployment, catalogue.default_model)


async def _provider(settings: Settings, deployment: NamedProvider, default_model: str) -> Check:
    name = deployment.name
    try:
        models = await deployment.provider.list_models()
    except ProviderPaused as error:
        return Check("provider", "error", f"{name}: {error}", "check the API key and the account's quota")
    except ProviderError as error:
        where = "EMBEDDING_OPENAI_BASE_URL"
        if settings.deployments_file is not None:
            where = f"base_url of {name} in EMBEDDING_DEPLOYMENTS_FILE"
        elif settings.provider == "cohere":
            where = "EMBEDDING_COHERE_BASE_URL"
        return Check("provider", "error", f"{name}: {error}", f"check {where} and the network")
    finally:
        await deployment.provider.close()
    if default_model not in models:
        fix = "set EMBEDDING_DEFAULT_MODEL to one that it lists, or ignore this if the server lists none"
        return Check("provider", "warning", f"{name} answers, but does not list {default_model}", fix)
    return Check("provider", "ok", f"{name} serves {default_model}")
