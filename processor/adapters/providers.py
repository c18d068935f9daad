"""The provider that the settings name."""

from __future__ import annotations

from processor.adapters import local_files
from processor.errors import SettingsError
from processor.ports import Catalogue, EmbeddingProvider
from processor.settings import Settings


def open_provider(settings: Settings, catalogue: Catalogue) -> EmbeddingProvider:
    """Ready to embed; nothing is sent yet. SettingsError when a key, a file or an extra is missing."""
    if settings.provider == "local":
        from processor.adapters.onnx import LocalProvider

        files = local_files.locate(settings.local_model_path)
        model = catalogue.find(files.name)
        if model is None:
            raise SettingsError(f"EMBEDDING_CATALOGUE_FILE: {files.name} is not in the catalogue")
        return LocalProvider(files, model, threads=settings.local_threads)

    from processor.adapters.openai import OpenAIProvider

    return OpenAIProvider(
        api_key=settings.secret("openai_api_key"),
        base_url=settings.openai_base_url,
        timeout_s=settings.provider_timeout_s,
        connect_timeout_s=settings.provider_connect_timeout_s,
    )
