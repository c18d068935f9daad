"""The model catalogue: `processor/catalogue.yaml`, the operator's file over it, and which models this worker serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from processor.adapters import local_files
from processor.adapters.tokens import WORDPIECE
from processor.domain import InputType, ModelSpec, Price
from processor.errors import SettingsError
from processor.settings import Settings

BUILTIN_FILE = Path(__file__).parent.parent / "catalogue.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _PriceEntry(_Strict):
    from_: date = Field(alias="from")
    version: str
    nanos_per_million: int = Field(ge=0)

    def price(self) -> Price:
        midnight = datetime(self.from_.year, self.from_.month, self.from_.day, tzinfo=UTC)
        return Price(self.nanos_per_million, int(midnight.timestamp() * 1000), self.version)


class _ModelEntry(_Strict):
    provider: Literal["openai", "local"]
    dimensions: list[Annotated[int, Field(gt=0, le=65_536)]] = Field(min_length=1)
    shortenable: bool = False
    weights: str | None = None
    revision: str = "1"
    normalised: bool = True
    max_input_tokens: int = Field(gt=0)
    max_inputs_per_call: int = Field(2048, gt=0)
    max_tokens_per_call: int = Field(300_000, gt=0)
    tokenizer: Literal["cl100k_base", "o200k_base"] | None = None
    prefixes: dict[InputType, str] = Field(default_factory=dict)
    answers_as: list[str] | Literal["any"] | None = None
    prices: list[_PriceEntry] = Field(default_factory=list)

    @model_validator(mode="after")
    def _a_text_fits_a_call(self) -> Self:
        if self.max_tokens_per_call < self.max_input_tokens:
            raise ValueError("max_tokens_per_call must be at least max_input_tokens")
        return self

    @model_validator(mode="after")
    def _a_local_model_has_one_size(self) -> Self:
        if self.provider == "local" and (self.shortenable or len(self.dimensions) != 1):
            raise ValueError("a local model gives vectors of one size: list it alone, and no shortenable")
        return self

    def spec(self, name: str, local_tokenizer: Path | None) -> ModelSpec:
        tokenizer: str | None = self.tokenizer
        if self.provider == "local":
            tokenizer = f"{WORDPIECE}{local_tokenizer}" if local_tokenizer is not None else None
        accepted = None if self.answers_as == "any" else frozenset(self.answers_as or [name])
        return ModelSpec(
            name=name,
            weights=self.weights or name,
            revision=self.revision,
            dimensions=tuple(self.dimensions),
            shortenable=self.shortenable,
            normalised=self.normalised,
            max_input_tokens=self.max_input_tokens,
            max_inputs_per_call=self.max_inputs_per_call,
            max_tokens_per_call=self.max_tokens_per_call,
            tokenizer=tokenizer,
            prefixes=self.prefixes,
            answers_as=accepted,
            prices=tuple(entry.price() for entry in self.prices),
        )


class ModelCatalogue:
    """Implements `ports.Catalogue`. `served` are the names this worker serves, the default model among them."""

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        *,
        served: Sequence[str],
        default_model: str,
        default_dimensions: Mapping[str, int],
    ) -> None:
        self.default_model = default_model
        self._models = dict(models)
        self._served = frozenset(served)
        self._default_dimensions = dict(default_dimensions)

    def find(self, name: str) -> ModelSpec | None:
        return self._models.get(name)

    def served(self, name: str) -> bool:
        return name in self._served

    def default_dimensions(self, model: ModelSpec) -> int:
        return self._default_dimensions.get(model.name, model.dimensions[0])

    def describe(self) -> list[dict[str, Any]]:
        """Every model in plain words, for `/models` and the command line."""
        return [
            {
                "model": spec.name,
                "served": spec.name in self._served,
                "default": spec.name == self.default_model,
                "dimensions": spec.describe_dimensions(),
                "default_dimensions": self.default_dimensions(spec),
                "vector_space": str(spec.space(self.default_dimensions(spec))),
                "max_input_tokens": spec.max_input_tokens,
                "exact_token_counts": spec.tokenizer is not None,
                "prices": [
                    {
                        "from_ms": price.effective_ms,
                        "version": price.version,
                        "nanos_per_million_tokens": price.nanos_per_million,
                    }
                    for price in spec.prices
                ],
            }
            for spec in self._models.values()
        ]


def load_catalogue(settings: Settings) -> ModelCatalogue:
    """The catalogue as this process sees it. SettingsError with every fault, by setting or file, model and field.

    With provider=local the model's files are read: their SHA-256 is its revision.
    """
    listed = _read(BUILTIN_FILE)
    if settings.catalogue_file is not None:
        for name, fields in _read(settings.catalogue_file).items():
            listed[name] = {**listed.get(name, {}), **fields}
    entries = _validate(listed, settings.catalogue_file or BUILTIN_FILE)

    tokenizer = local_files.builtin_tokenizer()
    of_route = [name for name, entry in entries.items() if entry.provider == settings.provider]
    if settings.provider == "local":
        files = local_files.locate(settings.local_model_path)
        if files.name not in of_route:
            raise SettingsError(
                f"EMBEDDING_CATALOGUE_FILE: list the model {files.name} with provider local and its dimensions, "
                f"for EMBEDDING_LOCAL_MODEL_PATH names it; see {BUILTIN_FILE.name} for the form"
            )
        tokenizer, of_route = files.tokenizer, [files.name]
    specs = {name: entry.spec(name, tokenizer) for name, entry in entries.items()}
    if settings.provider == "local":
        specs[files.name] = replace(specs[files.name], revision=files.revision)
    return _choose(settings, specs, of_route)


def _choose(settings: Settings, specs: Mapping[str, ModelSpec], of_route: Sequence[str]) -> ModelCatalogue:
    served = list(settings.models) or list(of_route)
    default_model = settings.default_model or served[0]
    faults = [
        f"EMBEDDING_MODELS: {name} is no model of provider {settings.provider}; there are {', '.join(of_route)}"
        for name in served
        if name not in of_route
    ]
    if default_model not in served:
        faults.append(f"EMBEDDING_DEFAULT_MODEL: {default_model} is not served; served are {', '.join(served)}")
    for name, dimensions in settings.default_dimensions_by_model.items():
        spec = specs.get(name)
        if spec is None:
            faults.append(f"EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL: {name} is not in the catalogue")
        elif not spec.allows(dimensions):
            faults.append(
                f"EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL: {name} has {spec.describe_dimensions()}, not {dimensions}"
            )
    if faults:
        raise SettingsError("\n".join(faults))
    return ModelCatalogue(
        specs,
        served=served,
        default_model=default_model,
        default_dimensions=settings.default_dimensions_by_model,
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Model name -> fields, not yet validated."""
    where = f"EMBEDDING_CATALOGUE_FILE: {path}"
    try:
        with path.open("rb") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise SettingsError(f"{where}: can't be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SettingsError(f"{where}: is no YAML{f', line {mark.line + 1}' if mark else ''}") from None
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict) or set(content) != {"models"}:
        raise SettingsError(f"{where}: must hold models: and nothing else at its top level")
    for name, fields in models.items():
        if not isinstance(name, str) or not isinstance(fields, dict):
            raise SettingsError(f"{where}: models.{name}: must be the fields of a model under its name")
    return models


def _validate(listed: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, _ModelEntry]:
    entries, faults = {}, []
    for name, fields in listed.items():
        try:
            entries[name] = _ModelEntry.model_validate(fields)
        except ValidationError as error:
            for fault in error.errors(include_input=False, include_url=False):
                field = ".".join(map(str, fault["loc"])) or "the model"
                faults.append(f"EMBEDDING_CATALOGUE_FILE: {path}: models.{name}: {field}: {fault['msg']}")
    if faults:
        raise SettingsError("\n".join(faults))
    return entries
