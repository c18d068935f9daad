"""The file of deployments: several places that serve the same models, in order of preference (`docs/providers.md`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from processor.adapters.yaml_files import read_yaml
from processor.errors import SettingsError
from processor.settings import checked_address, read_secret

SETTING = "EMBEDDING_DEPLOYMENTS_FILE"

Kind = Literal["openai", "azure", "cohere"]

_SAME_MODELS: dict[str, frozenset[Kind]] = {
    "openai": frozenset({"openai", "azure"}),
    "azure": frozenset({"openai", "azure"}),
    "cohere": frozenset({"cohere"}),
}
"""EMBEDDING_PROVIDER -> who can serve its models too."""


class DeploymentEntry(BaseModel):
    """One deployment. `models`: name in the catalogue -> name there; None: the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    provider: Kind
    base_url: str | None = None
    api_key_file: Path | None = None
    api_key_env: str | None = None
    api_version: str | None = Field(None, min_length=1)
    models: dict[str, str] | None = None
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0)

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        return None if value is None else checked_address(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_no_key(cls, value: str | None) -> str | None:
        """What passes may be quoted."""
        if value is not None and re.fullmatch("[A-Z_][A-Z0-9_]*", value) is None:
            raise ValueError("must be the name of an environment variable in capitals, not the key itself")
        return value

    @field_validator("models")
    @classmethod
    def _are_different(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and not all(value.values()):
            raise ValueError("gives a model no name there")
        if value is not None and len(set(value.values())) != len(value):
            raise ValueError("gives two models the same name there: each needs a deployment of its own")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ValueError("name the key by api_key_file or by api_key_env, not by both")
        if self.api_version is not None and self.provider != "azure":
            raise ValueError("api_version is for provider azure; remove it")
        if self.provider == "azure":
            path = urlsplit(self.base_url or "").path
            if self.base_url is None:
                raise ValueError("base_url is missing: https://<resource>.openai.azure.com")
            if self.api_version is not None and path:
                raise ValueError("base_url must end after the host where there is an api_version")
            if self.api_version is None and not path.endswith("/openai/v1"):
                raise ValueError("add api_version, or end base_url with /openai/v1, which needs none")
        return self

    def key(self) -> str | None:
        """The API key. SettingsError when its file or variable is not there or empty."""
        if self.api_key_file is not None:
            return read_secret(self.api_key_file, f"{SETTING}: {self.name}: api_key_file")
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise SettingsError(f"{SETTING}: {self.name}: api_key_env: set {self.api_key_env}, it is empty")
            return key
        return None


def read_deployments(path: Path, *, provider: str, served: Iterable[str]) -> Sequence[DeploymentEntry]:
    """The entries in order. SettingsError with every fault, by deployment and field.

    `provider` is that of the settings, `served` the models of the catalogue that this worker serves: each deployment
    must serve all of them, so that a text has the same vector wherever it is embedded.
    """
    entries, faults = _validated(_listed(path))
    allowed = _SAME_MODELS.get(provider, frozenset())
    wanted = list(served)
    if not allowed:
        faults.append(f"is for providers over HTTP; unset it, for EMBEDDING_PROVIDER is {provider}")
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            faults.append(f"{entry.name}: name: stands there twice; give each deployment its own")
        if allowed and entry.provider not in allowed:
            faults.append(
                f"{entry.name}: provider: {entry.provider} does not serve the models of EMBEDDING_PROVIDER {provider}; "
                f"use {' or '.join(sorted(allowed))}"
            )
        if entry.models is None:
            continue
        faults += [
            f"{entry.name}: models: {model} is missing; say its name there, or take it out of EMBEDDING_MODELS"
            for model in wanted
            if model not in entry.models
        ]
        faults += [
            f"{entry.name}: models: {model} is not served by this worker; remove it, or add it to EMBEDDING_MODELS"
            for model in entry.models
            if model not in wanted
        ]
    if faults:
        raise SettingsError("\n".join(f"{SETTING}: {path}: {fault}" for fault in dict.fromkeys(faults)))
    return entries


def _listed(path: Path) -> list[object]:
    content = read_yaml(path, SETTING)
    if not isinstance(content, list) or not content:
        raise SettingsError(f"{SETTING}: {path}: must be a list of deployments, each with name and provider")
    return content


def _validated(listed: Sequence[object]) -> tuple[list[DeploymentEntry], list[str]]:
    entries: list[DeploymentEntry] = []
    faults: list[str] = []
    for place, fields in enumerate(listed, 1):
        name = fields.get("name") if isinstance(fields, dict) else None
        try:
            entries.append(DeploymentEntry.model_validate(fields))
        except ValidationError as error:
            for fault in error.errors(include_input=False, include_url=False):
                field = ".".join(map(str, fault["loc"])) or "fields"
                what = fault["msg"].removeprefix("Value error, ")
                if field == "api_key":
                    what = "a key does not belong in this file; name it by api_key_file or api_key_env"
                faults.append(f"{name if isinstance(name, str) else f'number {place}'}: {field}: {what}")
    return entries, faults
