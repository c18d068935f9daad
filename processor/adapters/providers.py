"""The providers that the settings or the file of deployments name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from processor.adapters import local_files
from processor.adapters.catalogue import ModelCatalogue
from processor.adapters.deployments import SETTING, DeploymentEntry, read_deployments
from processor.adapters.shortening import Shortening
from processor.errors import SettingsError
from processor.ports import Catalogue, EmbeddingProvider
from processor.settings import Settings


class NamedProvider(NamedTuple):
    """A provider with the limits of its account, None: unknown. Equal `account`s share limits; it tells no key."""

    name: str
    provider: EmbeddingProvider
    requests_per_minute: int | None
    tokens_per_minute: int | None
    account: str


def open_deployments(settings: Settings, catalogue: ModelCatalogue) -> Sequence[NamedProvider]:
    """In order of preference, at least one; nothing is sent yet. All serve the same models of the catalogue.

    SettingsError with every fault of the file, or when a key is missing.
    """
    if settings.deployments_file is None:
        provider = open_provider(settings, catalogue)
        if settings.provider == "cohere":
            base_url, key = settings.cohere_base_url, settings.secret("cohere_api_key")
        else:
            base_url, key = settings.openai_base_url or "", settings.secret("openai_api_key")
        account = _account(settings.provider, base_url, key)
        limits = settings.requests_per_minute, settings.tokens_per_minute
        return [NamedProvider(provider.name, provider, *limits, account)]
    entries = read_deployments(settings.deployments_file, provider=settings.provider, served=catalogue.served_models)
    for entry in entries:
        _refuse_other_models(entry, catalogue)
    return [_deployed(settings, entry) for entry in entries]


def _refuse_other_models(entry: DeploymentEntry, catalogue: ModelCatalogue) -> None:
    """SettingsError for a name there that is another model's: its vectors would pass for those of the one here."""
    for here, there in (entry.models or {}).items():
        model, other = catalogue.find(here), catalogue.find(there)
        if model is not None and other is not None and other.weights != model.weights:
            raise SettingsError(
                f"{SETTING}: {entry.name}: models: {here}: {there} is another model; name what serves {here} there, or "
                "say by weights in EMBEDDING_CATALOGUE_FILE that they are the same"
            )


def _sendable(key: str | None, setting: str) -> str | None:
    """A key that can stand in a header. SettingsError for another: no text is at fault when none can be sent."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise SettingsError(f"{setting}: holds what no key has, such as a line break or a curly quote; set it anew")
    return key


def _deployed(settings: Settings, entry: DeploymentEntry) -> NamedProvider:
    key = _sendable(entry.key(), f"{SETTING}: {entry.name}: api_key_file or api_key_env")
    if key is None and (entry.base_url is None or entry.provider != "openai"):
        raise SettingsError(f"{SETTING}: {entry.name}: api_key_file: is missing; name the key by it or by api_key_env")
    return NamedProvider(
        entry.name,
        Shortening(_over_http(settings, entry.provider, key, entry.base_url, entry.api_version, entry.models)),
        entry.requests_per_minute or settings.requests_per_minute,
        entry.tokens_per_minute or settings.tokens_per_minute,
        _account(entry.provider, entry.base_url or "", key),
    )


def _account(provider: str, base_url: str, key: str | None) -> str:
    """Who is billed and limited, as a name that is safe to store: 16 hexadecimal digits."""
    identity = hashlib.sha256()
    for part in (provider, base_url.rstrip("/"), key or ""):
        identity.update(f"{len(part)}:{part}".encode())
    return identity.hexdigest()[:16]


def open_provider(settings: Settings, catalogue: Catalogue) -> EmbeddingProvider:
    """The one that the settings name, ready to embed. SettingsError when a key, a file or an extra is missing."""
    return Shortening(_open(settings, catalogue))


def _open(settings: Settings, catalogue: Catalogue) -> EmbeddingProvider:
    if settings.provider in {"local", "sentence-transformers"}:
        return _on_this_machine(settings, catalogue)
    if settings.provider == "cohere":
        key = _sendable(settings.secret("cohere_api_key"), "EMBEDDING_COHERE_API_KEY")
        return _over_http(settings, settings.provider, key, None)
    if settings.provider == "azure" and not (settings.openai_base_url or "").endswith("/openai/v1"):
        raise SettingsError(
            "EMBEDDING_DEPLOYMENTS_FILE: list the deployments of Azure there, or set EMBEDDING_OPENAI_BASE_URL to "
            "https://<resource>.openai.azure.com/openai/v1"
        )
    key = _sendable(settings.secret("openai_api_key"), "EMBEDDING_OPENAI_API_KEY")
    return _over_http(settings, settings.provider, key, settings.openai_base_url)


def _over_http(
    settings: Settings,
    kind: str,
    key: str | None,
    base_url: str | None,
    azure_api_version: str | None = None,
    models: Mapping[str, str] | None = None,
) -> EmbeddingProvider:
    """A provider of kind openai, azure or cohere. `models`: name in the catalogue -> name there."""
    timeout_s, connect_timeout_s = settings.provider_timeout_s, settings.provider_connect_timeout_s
    if kind == "cohere":
        from processor.adapters.cohere import CohereProvider

        return CohereProvider(
            api_key=key,
            base_url=base_url or settings.cohere_base_url,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=settings.provider_read_timeout_s,
            models=models,
        )

    from processor.adapters.openai import OpenAIProvider

    return OpenAIProvider(
        name=kind,
        api_key=key,
        base_url=base_url,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        read_timeout_s=settings.provider_read_timeout_s,
        azure_api_version=azure_api_version,
        models=models,
    )


def _on_this_machine(settings: Settings, catalogue: Catalogue) -> EmbeddingProvider:
    """Serves one model, which the catalogue has named by the same files."""
    model = catalogue.find(catalogue.default_model)
    if model is None:
        raise SettingsError(f"EMBEDDING_CATALOGUE_FILE: {catalogue.default_model} is not in the catalogue")
    if settings.provider == "local":
        from processor.adapters.onnx import LocalProvider

        return LocalProvider(local_files.locate(settings.local_model_path), model, threads=settings.local_threads)

    from processor.adapters.sentence_transformers import SentenceTransformersProvider

    return SentenceTransformersProvider(
        local_files.locate_weights(settings.local_model_path),
        model,
        device=settings.local_device,
        threads=settings.local_threads,
    )
