"""Deployments of the same models: the file that lists them, Azure's two addresses, and servers of other makers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from processor.adapters.catalogue import load_catalogue
from processor.adapters.deployments import DeploymentEntry, read_deployments
from processor.adapters.providers import NamedProvider, open_deployments
from processor.cli import doctor
from processor.domain import EmbeddingFunction, InputType, Truncate
from processor.errors import (
    CallTooLarge,
    InputRejected,
    ModelRejected,
    ProviderError,
    ProviderPaused,
    ProviderThrottled,
    ProviderTransient,
    SettingsError,
)
from processor.settings import Settings, load
from tests.support.provider_server import Faults, Options, ProviderServer, expected_vector

SMALL = "text-embedding-3-small"
CANARY = "canary-7d1f the customer's own words"


def a_function(settings: Settings, model: str = SMALL) -> EmbeddingFunction:
    spec = load_catalogue(settings).find(model)
    assert spec is not None
    return EmbeddingFunction(spec, spec.space(spec.dimensions[0]), InputType.DOCUMENT, "", Truncate.ERROR)


def settings_with(path: Path, listed: Any, **others: Any) -> Settings:
    file = path / "deployments.yaml"
    file.write_text(yaml.safe_dump(listed))
    return load(**{"models": (SMALL,), "deployments_file": file, "_env_file": None, **others})


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Sequence[NamedProvider]]:
    deployments = open_deployments(settings, load_catalogue(settings))
    yield deployments
    for deployment in deployments:
        await deployment.provider.close()


# --- Azure


@pytest.fixture
async def azure() -> AsyncIterator[ProviderServer]:
    options = Options(dialect="azure", api_key="azure-key", models={SMALL: 1536}, aliases={"embed small": SMALL})
    async with ProviderServer(options) as server:
        yield server


def azure_entry(server: ProviderServer, version: str | None) -> dict[str, Any]:
    """By the address with a version of the API and its deployments, or by the newer one without."""
    entry = {"name": "twin", "provider": "azure", "api_key_env": "TEST_AZURE_KEY", "models": {SMALL: "embed small"}}
    if version is None:
        return {**entry, "base_url": server.base_url}
    return {**entry, "base_url": server.root_url, "api_version": version}


@pytest.mark.parametrize("version", ["2024-10-21", None])
async def test_azure_is_asked_by_the_names_of_its_deployments(
    version: str | None, azure: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer carries the catalogue's name, the vectors are the same as anywhere, the call is known by its id."""
    monkeypatch.setenv("TEST_AZURE_KEY", "azure-key")
    settings = settings_with(tmp_path, [azure_entry(azure, version)], provider="azure")
    async with opened(settings) as [twin]:
        answer = await twin.provider.embed(["one", "two"], a_function(settings), "attempt-1")
        listed = await twin.provider.list_models()
    assert answer.model == SMALL
    assert np.array_equal(answer.vectors[1], expected_vector("two", 1536))
    assert [call.attempt_id for call in azure.ledger] == ["attempt-1"]
    assert answer.billed_tokens == azure.billed_tokens > 0
    assert SMALL in listed


@pytest.mark.parametrize("version", ["2024-10-21", None])
@pytest.mark.parametrize(
    "fault,kind,http_status",
    [
        ("401", ProviderPaused, 401),
        ("404", ModelRejected, 404),
        ("429", ProviderThrottled, 429),
        ("quota", ProviderPaused, 429),
        ("400", InputRejected, 400),
        ("context_length", CallTooLarge, 400),
        ("500", ProviderTransient, 500),
    ],
)
async def test_azures_own_words_for_faults_are_understood(
    fault: str,
    kind: type[ProviderError],
    http_status: int,
    version: str | None,
    azure: ProviderServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its codes are statuses as text, its delay stands in the message."""
    monkeypatch.setenv("TEST_AZURE_KEY", "azure-key")
    settings = settings_with(tmp_path, [azure_entry(azure, version)], provider="azure")
    azure.set_faults(Faults(script=[fault], body_delay="7s"))
    async with opened(settings) as [twin]:
        with pytest.raises(ProviderError) as caught:
            await twin.provider.embed([CANARY], a_function(settings), "a")
    assert (type(caught.value), caught.value.http_status) == (kind, http_status)
    if isinstance(caught.value, ProviderThrottled):
        assert caught.value.retry_after_s == 7
    assert "canary" not in str(caught.value)


async def test_a_wrong_key_of_azure_pauses(
    azure: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key goes in Azure's own header, and the control is the test above."""
    monkeypatch.setenv("TEST_AZURE_KEY", "another-key")
    settings = settings_with(tmp_path, [azure_entry(azure, "2024-10-21")], provider="azure")
    async with opened(settings) as [twin]:
        with pytest.raises(ProviderPaused):
            await twin.provider.embed(["x"], a_function(settings), "a")
    assert azure.billed_tokens == 0


# --- servers of other makers


@pytest.mark.parametrize("dialect", ["vllm", "tei", "infinity", "litellm", "ollama"])
async def test_an_answer_of_any_compatible_server_is_read(dialect: str, tmp_path: Path) -> None:
    """With or without base64 and a bill, by the name that the deployment has there or by its own."""
    async with ProviderServer(Options(dialect=dialect, aliases={"served-name": SMALL})) as server:
        entry = {"name": dialect, "provider": "openai", "base_url": server.base_url, "models": {SMALL: "served-name"}}
        settings = settings_with(tmp_path, [entry])
        async with opened(settings) as [there]:
            answer = await there.provider.embed(["one", "two"], a_function(settings), "a")
    assert answer.model == SMALL
    assert answer.billed_tokens == (None if dialect == "ollama" else server.billed_tokens)
    for text, vector in zip(["one", "two"], answer.vectors, strict=True):
        assert np.array_equal(vector, expected_vector(text, 1536))


async def test_models_are_listed_by_the_catalogues_names(tmp_path: Path) -> None:
    """So that the doctor finds the default model, whatever it is called there."""
    async with ProviderServer(Options(dialect="vllm", models={"served-name": 1536})) as server:
        entry = {"name": "vllm", "provider": "openai", "base_url": server.base_url, "models": {SMALL: "served-name"}}
        async with opened(settings_with(tmp_path, [entry])) as [there]:
            assert await there.provider.list_models() == [SMALL]


@pytest.mark.parametrize("dialect", ["vllm", "tei", "infinity", "litellm", "ollama"])
@pytest.mark.parametrize(
    "fault,kind",
    [
        ("context_length", CallTooLarge),
        ("out_of_memory", CallTooLarge),
        ("413", CallTooLarge),
        ("overloaded", ProviderThrottled),
        ("429", ProviderThrottled),
        ("400", InputRejected),
        ("500", ProviderTransient),
        ("404", ModelRejected),
        ("401", ProviderPaused),
    ],
)
async def test_a_fault_means_the_same_in_any_servers_words(
    dialect: str, fault: str, kind: type[ProviderError], tmp_path: Path
) -> None:
    """Two texts: what is too much for this call, for the server, for ever, or for now, is told apart everywhere."""
    async with ProviderServer(Options(dialect=dialect)) as server:
        entry = {"name": dialect, "provider": "openai", "base_url": server.base_url}
        settings = settings_with(tmp_path, [entry])
        server.script(fault)
        async with opened(settings) as [there]:
            with pytest.raises(ProviderError) as caught:
                await there.provider.embed([CANARY, "y"], a_function(settings), "a")
    assert type(caught.value) is kind
    assert caught.value.http_status is not None
    assert "canary" not in str(caught.value)


async def test_a_server_with_too_many_requests_in_work_asks_to_wait(tmp_path: Path) -> None:
    """text-embeddings-inference refuses what it has no room for, without saying for how long."""
    async with ProviderServer(Options(dialect="tei", refuse_over=0)) as server:
        settings = settings_with(tmp_path, [{"name": "tei", "provider": "openai", "base_url": server.base_url}])
        async with opened(settings) as [there]:
            with pytest.raises(ProviderThrottled) as caught:
                await there.provider.embed(["x"], a_function(settings), "a")
    assert (caught.value.code, caught.value.http_status, caught.value.retry_after_s) == ("overloaded", 429, None)


# --- doctor


async def test_the_doctor_looks_at_each_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second key may be the wrong one long before it is needed; nothing is embedded to find out."""
    monkeypatch.setenv("TEST_KEY", "right")
    monkeypatch.setenv("TEST_OTHER_KEY", "wrong")
    async with ProviderServer(Options(api_key="right")) as server:
        main = {**A, "base_url": server.base_url, "api_key_env": "TEST_KEY"}
        twin = {**B, "base_url": server.base_url, "api_key_env": "TEST_OTHER_KEY"}
        checks = [check async for check in doctor._providers(settings_with(tmp_path, [main, twin]))]
    assert [(check.state, check.what) for check in checks] == [
        ("ok", f"main serves {SMALL}"),
        ("error", "twin: key_refused (HTTP 401)"),
    ]
    assert server.ledger == []


# --- the file

A = {"name": "main", "provider": "openai", "base_url": "http://one.test/v1"}
B = {"name": "twin", "provider": "openai", "base_url": "http://two.test/v1"}


async def test_deployments_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Each with its own limits, or those of the settings, and an account that tells equal ones apart from others."""
    same_account = {**A, "name": "again", "tokens_per_minute": 7}
    settings = settings_with(tmp_path, [A, B, same_account], requests_per_minute=600)
    async with opened(settings) as deployments:
        pass
    assert [each.name for each in deployments] == ["main", "twin", "again"]
    assert [each.requests_per_minute for each in deployments] == [600, 600, 600]
    assert [each.tokens_per_minute for each in deployments] == [None, None, 7]
    main, twin, again = (each.account for each in deployments)
    assert main == again != twin


async def test_without_a_file_there_is_the_one_of_the_settings() -> None:
    """Its limits are those of the settings; two keys are two accounts, and neither can be read from its name."""
    accounts = []
    for key in ("sk-one", "sk-other"):
        settings = load(openai_api_key=key, tokens_per_minute=9, _env_file=None)
        async with opened(settings) as [only]:
            assert (only.name, only.requests_per_minute, only.tokens_per_minute) == ("openai", None, 9)
        accounts.append(only.account)
    assert accounts[0] != accounts[1]
    assert not any(key in account for key in ("sk-one", "sk-other") for account in accounts)


async def test_a_key_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks around it are cut."""
    (tmp_path / "key").write_text(" right\n")
    monkeypatch.setenv("TEST_KEY", "right ")
    async with ProviderServer(Options(api_key="right")) as server:
        by_file = {**A, "base_url": server.base_url, "api_key_file": str(tmp_path / "key")}
        by_name = {**B, "base_url": server.base_url, "api_key_env": "TEST_KEY"}
        settings = settings_with(tmp_path, [by_file, by_name])
        async with opened(settings) as deployments:
            for each in deployments:
                assert (await each.provider.embed(["x"], a_function(settings), "a")).indices == [0]


@pytest.mark.parametrize(
    "listed,told",
    [
        ({"main": A}, "must be a list of deployments"),
        ([], "must be a list of deployments"),
        ([A, {**B, "name": "main"}], "main: name: stands there twice"),
        (
            [{**A, "provider": "cohere"}],
            "main: provider: cohere does not serve the models of EMBEDDING_PROVIDER openai",
        ),
        ([{**A, "models": {}}], f"main: models: {SMALL} is missing"),
        ([{**A, "models": {SMALL: "s", "text-embedding-3-large": "l"}}], "text-embedding-3-large is not served"),
        ([{**A, "models": {SMALL: "s", "text-embedding-3-large": "s"}}], "the same name there"),
        ([{**A, "requests_per_minute": 0}], "main: requests_per_minute: Input should be greater than 0"),
        ([{**A, "base_url": "one.test"}], "main: base_url: must begin with https://"),
        ([{**A, "api_version": "2024-10-21"}], "api_version is for provider azure"),
        ([{**A, "api_key_file": "k", "api_key_env": "K"}], "not by both"),
        ([{**A, "api_key": "sk-canary-7d1f"}], "main: api_key: a key does not belong in this file"),
        ([{**A, "provider": "azure"}], "end base_url with /openai/v1"),
        ([{**A, "provider": "azure", "api_version": "2024-10-21"}], "must end after the host"),
        ([{"name": "twin", "provider": "azure", "api_version": "x"}], "base_url is missing"),
        ([{**A, "api_key_env": "sk-canary-7d1f"}], "main: api_key_env: must be the name of an environment variable"),
        ([{**A, "base_url": "http://x.test:99999/v1"}], "main: base_url: must begin with https://"),
        ([{**A, "base_url": "http://me:canary@x.test/v1"}], "main: base_url: must end after the path"),
        ([{**A, "base_url": "http://x.test/v1?key=canary"}], "main: base_url: must end after the path"),
        ([{**A, "models": {SMALL: ""}}], "main: models: gives a model no name there"),
        ([{**A, "models": {SMALL: "text-embedding-ada-002"}}], "text-embedding-ada-002 is another model"),
        ([{"provider": "openai"}], "number 1: name: Field required"),
        ([A, 7], "number 2: fields: "),
    ],
)
def test_a_fault_of_the_file_names_deployment_field_and_fix(listed: Any, told: str, tmp_path: Path) -> None:
    """And never a key that someone wrote into it."""
    settings = settings_with(tmp_path, listed)
    with pytest.raises(SettingsError) as caught:
        open_deployments(settings, load_catalogue(settings))
    assert told in str(caught.value)
    assert str(caught.value).startswith("EMBEDDING_DEPLOYMENTS_FILE: ")
    assert "canary" not in str(caught.value)


def test_the_example_in_the_docs_is_such_a_file(tmp_path: Path) -> None:
    """What one copies from there is right."""
    page = (Path(__file__).parents[2] / "docs/providers.md").read_text(encoding="utf-8")
    file = tmp_path / "deployments.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    entries = read_deployments(file, provider="openai", served=[SMALL])
    assert [(entry.name, entry.provider) for entry in entries] == [("main", "openai"), ("twin", "azure")]
    fields = {name for name in DeploymentEntry.model_fields if f"`{name}`" in page}
    assert fields == set(DeploymentEntry.model_fields)


def test_all_faults_of_the_file_are_told_at_once(tmp_path: Path) -> None:
    """A second start finds nothing new."""
    listed = [{**A, "models": {}}, {**B, "provider": "cohere"}, {**B, "name": "third", "tokens_per_minute": -1}]
    settings = settings_with(tmp_path, listed)
    with pytest.raises(SettingsError) as caught:
        open_deployments(settings, load_catalogue(settings))
    for told in ("main: models", "twin: provider", "third: tokens_per_minute"):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    "entry,told",
    [
        ({"api_key_file": "/nowhere/key"}, "api_key_file: can't read it: No such file"),
        ({"api_key_env": "TEST_NO_SUCH_KEY"}, "api_key_env: set TEST_NO_SUCH_KEY"),
        ({}, "api_key_file: is missing"),
    ],
)
def test_a_key_that_is_not_there_is_told_at_start(entry: dict[str, str], told: str, tmp_path: Path) -> None:
    """By deployment and field."""
    settings = settings_with(tmp_path, [{"name": "main", "provider": "openai", **entry}])
    with pytest.raises(SettingsError, match=f"main: {told}"):
        open_deployments(settings, load_catalogue(settings))


@pytest.mark.parametrize(
    "content,told",
    [
        (b"\n", "is empty"),
        (b"\xff\xfecanary", "is no text"),
        (b"canary\nkey", "holds what no key has"),
        ("“canary”".encode(), "holds what no key has"),
    ],
)
def test_a_key_that_cannot_be_sent_is_told_at_start(content: bytes, told: str, tmp_path: Path) -> None:
    """And is not quoted: found with the first call, it would pass for a fault of each text."""
    (tmp_path / "key").write_bytes(content)
    listed = [{"name": "main", "provider": "openai", "api_key_file": str(tmp_path / "key")}]
    by_settings = load(openai_api_key_file=tmp_path / "key", _env_file=None)
    for settings in (settings_with(tmp_path, listed), by_settings):
        with pytest.raises(SettingsError, match=told) as caught:
            open_deployments(settings, load_catalogue(settings))
        assert "canary" not in str(caught.value)


async def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    """Some editors put one before all they write."""
    (tmp_path / "key").write_text("right\n", encoding="utf-8-sig")
    async with ProviderServer(Options(api_key="right")) as server:
        settings = load(openai_base_url=server.base_url, openai_api_key_file=tmp_path / "key", _env_file=None)
        async with opened(settings) as [only]:
            assert (await only.provider.embed(["x"], a_function(settings), "a")).indices == [0]


def test_a_local_model_has_no_deployments(tmp_path: Path) -> None:
    """A file that would do nothing is refused."""
    file = tmp_path / "deployments.yaml"
    file.write_text(yaml.safe_dump([A]))
    with pytest.raises(SettingsError, match="EMBEDDING_PROVIDER is local"):
        read_deployments(file, provider="local", served=[SMALL])


def test_azure_without_a_file_needs_an_address() -> None:
    """The message names both ways."""
    for url in (None, "https://resource.openai.azure.com"):
        settings = load(provider="azure", openai_api_key="k", openai_base_url=url, models=(SMALL,), _env_file=None)
        with pytest.raises(SettingsError, match="EMBEDDING_OPENAI_BASE_URL"):
            open_deployments(settings, load_catalogue(settings))
