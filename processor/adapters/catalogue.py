"""The model catalogue: `processor/catalogue.yaml`, the operator's file over it, and which models this worker serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from processor.adapters import local_files
from processor.adapters.local_files import LocalFiles
from processor.adapters.tokens import BPE, WORDPIECE
from processor.adapters.yaml_files import read_yaml
from processor.domain import MAX_PRICE, CallEstimator, InputType, ModelSpec, Price
from processor.errors import SettingsError
from processor.settings import Settings

BUILTIN_FILE = Path(__file__).parent.parent / "catalogue.yaml"

Maker = Literal["openai", "cohere", "local", "open"]

_SERVES: Mapping[str, frozenset[Maker]] = {
    "openai": frozenset({"openai", "open"}),
    "azure": frozenset({"openai"}),
    "cohere": frozenset({"cohere"}),
    "local": frozenset({"local", "open"}),
    "sentence-transformers": frozenset({"open"}),
}
"""EMBEDDING_PROVIDER -> whose models it can serve. Open models are served where EMBEDDING_MODELS names them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _PriceEntry(_Strict):
    from_: date = Field(alias="from")
    version: str
    nanos_per_million: int = Field(ge=0, le=MAX_PRICE)

    def price(self) -> Price:
        midnight = datetime(self.from_.year, self.from_.month, self.from_.day, tzinfo=UTC)
        return Price(self.nanos_per_million, int(midnight.timestamp() * 1000), self.version)


class _ModelEntry(_Strict):
    provider: Maker
    dimensions: list[Annotated[int, Field(gt=0, le=65_536)]] = Field(min_length=1)
    shortenable: bool = False
    shortened: Literal["there", "here"] = "there"
    weights: str | None = None
    revision: str = "1"
    normalised: bool = True
    max_input_tokens: int = Field(gt=0)
    max_inputs_per_call: int = Field(2048, gt=0)
    max_tokens_per_call: int = Field(300_000, gt=0)
    max_bytes_per_call: int = Field(8_000_000, gt=0)
    call_estimator: CallEstimator = CallEstimator.TOKENS
    tokenizer: str | None = None
    prefixes: dict[InputType, str] = Field(default_factory=dict)
    answers_as: list[str] | Literal["any"] | None = None
    prices: list[_PriceEntry] = Field(default_factory=list)

    @field_validator("tokenizer")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in BPE and not Path(value).is_file():
            raise ValueError(f"must be one of {', '.join(sorted(BPE))} or the path of a tokenizer.json that is there")
        return value

    @model_validator(mode="after")
    def _a_text_fits_a_call(self) -> Self:
        if self.max_tokens_per_call < self.max_input_tokens:
            raise ValueError("max_tokens_per_call must be at least max_input_tokens")
        return self

    @model_validator(mode="after")
    def _what_is_cut_is_larger(self) -> Self:
        if (self.shortened == "here" or self.shortenable) and max(self.dimensions) > self.dimensions[0]:
            raise ValueError(
                "the first of dimensions is the model's own size, so the largest; "
                "a smaller default is named by EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL"
            )
        return self

    def spec(self, name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            weights=self.weights or name,
            revision=self.revision,
            dimensions=tuple(self.dimensions),
            shortenable=self.shortenable,
            shortened_here=self.shortened == "here",
            normalised=self.normalised,
            max_input_tokens=self.max_input_tokens,
            max_inputs_per_call=self.max_inputs_per_call,
            max_tokens_per_call=self.max_tokens_per_call,
            max_bytes_per_call=self.max_bytes_per_call,
            call_estimator=self.call_estimator,
            tokenizer=self.tokenizer if self.tokenizer in BPE or not self.tokenizer else WORDPIECE + self.tokenizer,
            prefixes=self.prefixes,
            answers_as=None if self.answers_as == "any" else frozenset(self.answers_as or [name]),
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

    @property
    def served_models(self) -> Sequence[str]:
        """Their names, in the catalogue's order."""
        return [name for name in self._models if name in self._served]

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

    With a model on this machine its files are read: their SHA-256 is its revision, and what the catalogue does not
    say of it they do.
    """
    listed = _read(BUILTIN_FILE)
    if settings.catalogue_file is not None:
        for name, fields in _read(settings.catalogue_file).items():
            listed[name] = {**listed.get(name, {}), **fields}
    path = settings.catalogue_file or BUILTIN_FILE
    on_this_machine = settings.provider in {"local", "sentence-transformers"}
    if on_this_machine:
        locate = local_files.locate if settings.provider == "local" else local_files.locate_weights
        files = locate(settings.local_model_path)
        name = _listed_name(files.name, listed, _SERVES[settings.provider])
        listed[name] = {**_by_its_files(files, settings), **listed.get(name, {})}
    entries = _validate(listed, path)

    specs = {name: entry.spec(name) for name, entry in entries.items()}
    builtin_tokenizer = local_files.builtin_tokenizer()
    if builtin_tokenizer is not None:
        builtin = specs[local_files.BUILTIN_NAME]
        specs[builtin.name] = replace(builtin, tokenizer=f"{WORDPIECE}{builtin_tokenizer}")
    if on_this_machine:
        specs[name] = replace(
            specs[name], revision=files.revision, tokenizer=f"{WORDPIECE}{files.tokenizer}", shortened_here=True
        )
        return _choose(settings, specs, [name], [name])
    servable = [name for name, entry in entries.items() if entry.provider in _SERVES[settings.provider]]
    unasked = [name for name in servable if entries[name].provider != "open"]
    return _choose(settings, specs, servable, unasked)


def _listed_name(directory: str, listed: Mapping[str, Mapping[str, Any]], makers: frozenset[Maker]) -> str:
    """The catalogue's name of the model in a directory of that name: e5-base-v2 is intfloat/e5-base-v2."""
    fitting = [name for name, fields in listed.items() if fields.get("provider") in makers]
    for found in (name for name in fitting if name == directory):
        return found
    return next((name for name in fitting if name.rpartition("/")[2] == directory), directory)


def _by_its_files(files: LocalFiles, settings: Settings) -> dict[str, Any]:
    """Fields of a model of this machine that its files give. SettingsError when they lack what must be known."""
    found: dict[str, Any] = {
        "provider": "local" if settings.provider == "local" else "open",
        "normalised": files.normalised,
        "prefixes": dict(files.prefixes),
        # A call of a second or so: what a cancelled one still holds is bounded by it.
        "max_inputs_per_call": 128,
        "max_tokens_per_call": max(16_384, files.max_input_tokens or 0),
    }
    if files.dimensions is not None:
        found["dimensions"] = [files.dimensions]
    if files.max_input_tokens is not None:
        found["max_input_tokens"] = files.max_input_tokens
    return found


def _choose(
    settings: Settings, specs: Mapping[str, ModelSpec], of_route: Sequence[str], unasked: Sequence[str]
) -> ModelCatalogue:
    """`of_route` may be served, `unasked` are served when EMBEDDING_MODELS names none."""
    served = list(settings.models) or list(unasked)
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
    content = read_yaml(path, "EMBEDDING_CATALOGUE_FILE")
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
