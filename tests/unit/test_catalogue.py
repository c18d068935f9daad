"""The model catalogue: what this release lists, what an operator's file changes, what is refused at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from processor.adapters import local_files
from processor.adapters.catalogue import load_catalogue
from processor.adapters.tokens import tokenizer_of
from processor.domain import CallEstimator, InputType
from processor.errors import SettingsError
from processor.settings import Settings, load

MS_2026 = 1_767_225_600_000


def settings(tmp_path: Path, yaml: str | None = None, **overrides: Any) -> Settings:
    if yaml is not None:
        overrides["catalogue_file"] = tmp_path / "models.yaml"
        overrides["catalogue_file"].write_text(yaml)
    return load(**{"provider": "openai", **overrides})


@pytest.mark.parametrize(
    "name,dimensions,nanos",
    [
        ("text-embedding-3-small", 1536, 20_000_000),
        ("text-embedding-3-large", 3072, 130_000_000),
        ("text-embedding-ada-002", 1536, 100_000_000),
        ("embed-v4.0", 1536, 120_000_000),
        ("embed-english-v3.0", 1024, 100_000_000),
        ("embed-multilingual-v3.0", 1024, 100_000_000),
        ("all-MiniLM-L6-v2", 384, 1_000_000),
    ],
)
def test_each_listed_model_has_dimensions_and_a_price(name: str, dimensions: int, nanos: int, tmp_path: Path) -> None:
    """Nano-dollars per 1,000,000 tokens as published."""
    spec = load_catalogue(settings(tmp_path)).find(name)
    assert spec is not None
    price = spec.price_at(MS_2026)
    assert price is not None
    assert (spec.dimensions[0], price.nanos_per_million) == (dimensions, nanos)


@pytest.mark.parametrize(
    "name,texts,tokens,estimator,text_tokens",
    [
        ("text-embedding-3-small", 2048, 300_000, CallEstimator.BYTES_4, 8192),
        ("text-embedding-ada-002", 2048, 300_000, CallEstimator.BYTES_4, 8192),
        ("embed-v4.0", 96, 128_000, CallEstimator.TOKENS, 128_000),
        ("embed-english-v3.0", 96, 49_152, CallEstimator.TOKENS, 512),
        ("BAAI/bge-m3", 256, 65_536, CallEstimator.TOKENS, 8192),
    ],
)
def test_each_listed_model_has_the_limits_of_its_provider(
    name: str, texts: int, tokens: int, estimator: CallEstimator, text_tokens: int, tmp_path: Path
) -> None:
    """Of a call and of a text, and how the provider counts a call before it takes it."""
    spec = load_catalogue(settings(tmp_path)).find(name)
    assert spec is not None
    assert (spec.max_inputs_per_call, spec.max_tokens_per_call) == (texts, tokens)
    assert (spec.call_estimator, spec.max_input_tokens) == (estimator, text_tokens)


@pytest.mark.parametrize(
    "name,document,query",
    [
        ("intfloat/e5-base-v2", "passage: ", "query: "),
        ("intfloat/multilingual-e5-large", "passage: ", "query: "),
        ("BAAI/bge-small-en-v1.5", None, "Represent this sentence for searching relevant passages: "),
        ("BAAI/bge-m3", None, None),
        ("nomic-embed-text", "search_document: ", "search_query: "),
        ("sentence-transformers/all-mpnet-base-v2", None, None),
        ("embed-v4.0", None, None),
    ],
)
def test_a_model_that_tells_queries_by_a_prefix_gets_it(
    name: str, document: str | None, query: str | None, tmp_path: Path
) -> None:
    """As its authors trained it; Cohere's are told by a parameter instead."""
    spec = load_catalogue(settings(tmp_path)).find(name)
    assert spec is not None
    assert (spec.prefixes.get(InputType.DOCUMENT), spec.prefixes.get(InputType.QUERY)) == (document, query)


def test_another_revision_is_another_space(tmp_path: Path) -> None:
    """Weights that changed under the same name are never compared with the old ones, nor found in their cache."""
    name = "intfloat/e5-base-v2"
    before = load_catalogue(settings(tmp_path)).find(name)
    after = load_catalogue(settings(tmp_path, f"models: {{{name}: {{revision: '2'}}}}")).find(name)
    assert before is not None
    assert after is not None
    assert before.space(768) != after.space(768)
    assert after.prefixes == before.prefixes


def test_the_revision_of_the_local_model_is_that_of_its_files(tmp_path: Path) -> None:
    """A worker that has the files and one that only reads the list name the same vector space."""
    listed = load_catalogue(settings(tmp_path)).find(local_files.BUILTIN_NAME)
    loaded = load_catalogue(settings(tmp_path, provider="local")).find(local_files.BUILTIN_NAME)
    assert listed is not None
    assert loaded is not None
    assert listed.space(384) == loaded.space(384)
    assert loaded.revision == local_files.builtin_revision() == local_files.locate().revision


def test_only_the_models_of_the_route_are_served(tmp_path: Path) -> None:
    """A model of another provider is known, and not served here."""
    openai = load_catalogue(settings(tmp_path))
    local = load_catalogue(settings(tmp_path, provider="local"))
    assert (openai.default_model, local.default_model) == ("text-embedding-3-small", "all-MiniLM-L6-v2")
    assert openai.served("text-embedding-ada-002")
    assert not openai.served("all-MiniLM-L6-v2")
    assert local.served("all-MiniLM-L6-v2")
    assert not local.served("text-embedding-3-small")
    assert not openai.served("unheard-of")


def test_an_open_model_is_served_where_it_is_named(tmp_path: Path) -> None:
    """A worker that asks OpenAI does not offer what OpenAI does not have; one that asks a server of its own can."""
    unnamed = load_catalogue(settings(tmp_path))
    named = load_catalogue(settings(tmp_path, models="BAAI/bge-m3"))
    assert not unnamed.served("BAAI/bge-m3")
    assert (named.default_model, named.served("text-embedding-3-small")) == ("BAAI/bge-m3", False)
    with pytest.raises(SettingsError, match="BAAI/bge-m3 is no model of provider cohere"):
        load_catalogue(settings(tmp_path, provider="cohere", models="BAAI/bge-m3"))


@pytest.mark.parametrize(
    "provider,default,sizes",
    [("azure", "text-embedding-3-small", (1536,)), ("cohere", "embed-v4.0", (1536, 1024, 512, 256))],
)
def test_each_vendor_serves_its_models(provider: str, default: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Azure those of OpenAI, in the same vector space."""
    catalogue = load_catalogue(settings(tmp_path, provider=provider))
    spec = catalogue.find(catalogue.default_model)
    assert spec is not None
    assert (spec.name, spec.dimensions) == (default, sizes)
    assert spec == load_catalogue(settings(tmp_path)).find(default)


def test_a_tokenizer_of_ones_own_counts_for_a_server(tmp_path: Path) -> None:
    """So that what a server would cut without a word is refused here, by the token."""
    tokenizer = local_files.locate().tokenizer
    yaml = f"models: {{intfloat/e5-base-v2: {{tokenizer: {tokenizer}}}}}"
    spec = load_catalogue(settings(tmp_path, yaml)).find("intfloat/e5-base-v2")
    assert spec is not None
    counted = tokenizer_of(spec.tokenizer)
    assert counted is not None
    assert counted.count("hello world") == 4


def test_the_operator_chooses_models_default_and_dimensions(tmp_path: Path) -> None:
    """The first of the served is the default unless one is named; sizes fall back to the model's own."""
    chosen = settings(
        tmp_path,
        models="text-embedding-3-large,text-embedding-3-small",
        default_dimensions_by_model='{"text-embedding-3-large": 1024}',
    )
    catalogue = load_catalogue(chosen)
    large, small = catalogue.find("text-embedding-3-large"), catalogue.find("text-embedding-3-small")
    assert large is not None
    assert small is not None
    assert catalogue.default_model == "text-embedding-3-large"
    assert not catalogue.served("text-embedding-ada-002")
    assert (catalogue.default_dimensions(large), catalogue.default_dimensions(small)) == (1024, 1536)


def test_a_file_adds_models_and_changes_single_fields(tmp_path: Path) -> None:
    """What the file does not say of a listed model stays as it is listed."""
    yaml = """
models:
  text-embedding-3-small:
    prices:
      - {from: 2024-01-25, version: a, nanos_per_million: 20000000}
      - {from: 2026-01-01, version: b, nanos_per_million: 15000000}
  nomic:
    provider: openai
    dimensions: [768, 256]
    max_input_tokens: 512
    prefixes: {query: "search_query: "}
    answers_as: any
"""
    catalogue = load_catalogue(settings(tmp_path, yaml, default_model="nomic"))
    small, nomic = catalogue.find("text-embedding-3-small"), catalogue.find("nomic")
    assert small is not None
    assert nomic is not None
    assert (small.shortenable, small.max_input_tokens) == (True, 8192)
    assert small.answers_as == frozenset({"text-embedding-3-small"})
    before, after = small.price_at(MS_2026 - 1), small.price_at(MS_2026)
    assert before is not None
    assert after is not None
    assert (before.version, after.version) == ("a", "b")
    assert nomic.prefixes == {InputType.QUERY: "search_query: "}
    assert (nomic.answers_as, nomic.tokenizer, nomic.price_at(MS_2026)) == (None, None, None)
    assert [size for size in (768, 256, 128) if nomic.allows(size)] == [768, 256]


def test_a_directory_of_ones_own_is_a_model_once_it_is_listed(tmp_path: Path) -> None:
    """Its name is the directory's, its revision that of its files, its counter its own tokenizer."""
    builtin = local_files.locate()
    directory = tmp_path / "my-export"
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"some weights")
    (directory / "tokenizer.json").write_bytes(builtin.tokenizer.read_bytes())
    with pytest.raises(SettingsError, match=r"models\.my-export: dimensions"):
        load_catalogue(settings(tmp_path, provider="local", local_model_path=directory))

    yaml = "models: {my-export: {provider: local, dimensions: [384], max_input_tokens: 512}}"
    catalogue = load_catalogue(settings(tmp_path, yaml, provider="local", local_model_path=directory))
    spec = catalogue.find("my-export")
    assert spec is not None
    tokenizer = tokenizer_of(spec.tokenizer)
    assert tokenizer is not None
    assert tokenizer.count("hello world") == 4
    assert spec.revision != builtin.revision
    assert catalogue.served("my-export")
    assert not catalogue.served(local_files.BUILTIN_NAME)


@pytest.mark.parametrize(
    "yaml,told",
    [
        ("models: [", "is no YAML, line 1"),
        ("- a", "must hold models:"),
        ("models: {}\nmodel: {}", "must hold models:"),
        ("models: {m: 3}", r"models\.m: must be the fields"),
        ("models: {m: {dimensions: [8], max_input_tokens: 8}}", r"models\.m: provider: Field required"),
        (
            "models: {m: {provider: openai, dimensions: [], max_input_tokens: 8}}",
            r"models\.m: dimensions: List should",
        ),
        ("models: {text-embedding-3-small: {dimension: [3]}}", r"text-embedding-3-small: dimension: Extra inputs"),
        ("models: {text-embedding-3-small: {max_tokens_per_call: 1}}", "must be at least max_input_tokens"),
        (
            "models: {text-embedding-3-small: {prices: [{from: soon, version: a, nanos_per_million: 1}]}}",
            r"prices\.0\.from: ",
        ),
        (
            "models: {BAAI/bge-m3: {prices: [{from: 2026-01-01, version: a, nanos_per_million: 1000000000001}]}}",
            r"prices\.0\.nanos_per_million: Input should be less than or equal to 1000000000000",
        ),
        ("models: {text-embedding-3-small: {prefixes: {other: x}}}", r"prefixes\.other"),
        (
            "models: {nomic-embed-text: {dimensions: [256, 768]}}",
            "nomic-embed-text: the model: Value error, the first of dimensions is the model's own size",
        ),
        (
            "models: {text-embedding-3-small: {dimensions: [512, 1536]}}",
            "text-embedding-3-small: the model: Value error, the first of dimensions is the model's own size",
        ),
        ("models: {BAAI/bge-m3: {tokenizer: /no/such.json}}", r"bge-m3: tokenizer: Value error, must be one of cl100k"),
        ("models: {BAAI/bge-m3: {call_estimator: guess}}", r"bge-m3: call_estimator: Input should be 'tokens' or"),
        ("models: {BAAI/bge-m3: {shortened: somewhere}}", r"bge-m3: shortened: Input should be 'there' or 'here'"),
    ],
)
def test_a_fault_in_the_file_names_file_model_and_field(yaml: str, told: str, tmp_path: Path) -> None:
    """Whoever wrote it finds the place."""
    with pytest.raises(SettingsError, match=told) as caught:
        load_catalogue(settings(tmp_path, yaml))
    assert str(tmp_path / "models.yaml") in str(caught.value)


def test_all_faults_of_the_choice_are_told_together(tmp_path: Path) -> None:
    """One start shows them all."""
    chosen = settings(
        tmp_path,
        models="all-MiniLM-L6-v2,text-embedding-3-small",
        default_model="gpt",
        default_dimensions_by_model={"gpt": 1, "text-embedding-ada-002": 512},
    )
    with pytest.raises(SettingsError) as caught:
        load_catalogue(chosen)
    told = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "EMBEDDING_MODELS",
        "EMBEDDING_DEFAULT_MODEL",
        "EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL",
        "EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL",
    ]


@pytest.mark.parametrize("missing", ["model.onnx", "tokenizer.json"])
def test_an_incomplete_directory_is_told_by_the_missing_file(missing: str, tmp_path: Path) -> None:
    """The path that was looked for is in the message."""
    for name in {"model.onnx", "tokenizer.json"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(SettingsError, match=missing):
        local_files.locate(tmp_path)
