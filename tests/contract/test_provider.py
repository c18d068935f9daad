"""What every EmbeddingProvider promises: the embeddings API over HTTP, and the model on this machine."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from processor.adapters import local_files
from processor.adapters.catalogue import load_catalogue
from processor.adapters.onnx import LocalProvider
from processor.adapters.providers import open_provider
from processor.adapters.tokens import LocalTokenCounter
from processor.answers import split
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate
from processor.errors import CallTooLarge, InputRejected, SettingsError
from processor.ports import EmbeddingProvider, TokenCounts
from processor.settings import Settings, load
from tests.support.provider_server import ProviderServer

TEXTS = ["How do I parse a date from a string?", "<|endoftext|> [SEP]", "naïve 文 \x00", "x" * 300]


@dataclass
class Case:
    provider: EmbeddingProvider
    model: ModelSpec

    @property
    def function(self) -> EmbeddingFunction:
        space = self.model.space(self.model.dimensions[0])
        return EmbeddingFunction(self.model, space, InputType.DOCUMENT, "", Truncate.ERROR)

    def count(self, texts: list[str]) -> TokenCounts:
        return LocalTokenCounter().count(texts, self.model)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Case]:
    """The provider with the catalogue's default model."""
    catalogue = load_catalogue(settings)
    model = catalogue.find(catalogue.default_model)
    assert model is not None
    provider = open_provider(settings, catalogue)
    yield Case(provider, model)
    await provider.close()


@pytest.fixture(params=["openai", "local"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    async with ProviderServer() as server:
        settings = load(
            provider=request.param, openai_base_url=server.base_url, openai_api_key="sk-test", local_threads=2
        )
        async with opened(settings) as case:
            yield case


async def test_each_text_gets_a_vector_of_its_own_in_order(case: Case) -> None:
    """One finite float32 vector of length 1 a text, by a model name that the catalogue accepts."""
    answer = await case.provider.embed(TEXTS, case.function, "attempt")
    assert list(answer.indices) == [0, 1, 2, 3]
    assert case.model.answers_as is not None
    assert answer.model in case.model.answers_as
    for vector in answer.vectors:
        assert vector.dtype == np.float32
        assert vector.shape == (case.model.dimensions[0],)
        assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    alone = await case.provider.embed([TEXTS[2]], case.function, "attempt-2")
    assert float(alone.vectors[0] @ answer.vectors[2]) > 0.999
    assert float(answer.vectors[0] @ answer.vectors[1]) < 0.9


async def test_the_bill_is_the_sum_of_the_local_counts(case: Case) -> None:
    """Counter and bill agree to the token, so a text's share is its count in any batch."""
    answer = await case.provider.embed(TEXTS, case.function, "attempt")
    counts = case.count(TEXTS).counts
    assert answer.billed_tokens == sum(counts)
    assert split(answer.billed_tokens, counts) == list(counts)


async def test_a_text_over_the_limit_is_refused_with_a_status_and_never_cut(case: Case) -> None:
    """The refusal is an answer, so its receipt can say that nothing was billed."""
    limit = case.model.max_input_tokens
    over = "table " * (limit + 1)
    with pytest.raises((InputRejected, CallTooLarge)) as caught:
        await case.provider.embed(["fine", over], case.function, "attempt")
    assert caught.value.http_status == 400
    fits = LocalTokenCounter().truncate(over, case.model, limit, keep_end=False)
    assert case.count([fits]).counts[0] == limit
    await case.provider.embed([fits], case.function, "attempt-2")


async def test_the_models_can_be_listed_without_embedding(case: Case) -> None:
    """Health asks for no more than this."""
    assert case.model.name in await case.provider.list_models()


async def test_calls_side_by_side_do_not_mix(case: Case) -> None:
    """Each call gets the vectors of its own texts."""
    alone = await case.provider.embed(TEXTS, case.function, "attempt")
    answers = await asyncio.gather(
        *(case.provider.embed([text], case.function, f"attempt-{i}") for i, text in enumerate(TEXTS))
    )
    for answer, vector in zip(answers, alone.vectors, strict=True):
        assert float(answer.vectors[0] @ vector) > 0.999


# --- the local model alone


@pytest.fixture
async def local() -> AsyncIterator[Case]:
    async with opened(load(provider="local", local_threads=2)) as case:
        yield case


async def test_what_means_the_same_lies_close(local: Case) -> None:
    """The right answer is nearer to its question than any other."""
    questions = [
        "parse a date from a string",
        "remove a directory and all that is in it",
        "the largest of some numbers",
    ]
    answers = ["datetime.strptime: make a datetime of text", "shutil.rmtree: delete a whole tree", "max: biggest item"]
    found = await local.provider.embed(questions + answers, local.function, "attempt")
    vectors = np.array(found.vectors)
    assert (vectors[:3] @ vectors[3:].T).argmax(axis=1).tolist() == [0, 1, 2]


async def test_a_text_has_the_same_bits_whatever_it_is_called_with(local: Case) -> None:
    """No padding, no neighbours: a replay gives the very same vector."""
    together = await local.provider.embed(TEXTS, local.function, "attempt")
    alone = await local.provider.embed(TEXTS[1:2], local.function, "attempt")
    assert np.array_equal(together.vectors[1], alone.vectors[0])


async def test_a_cancelled_call_gives_its_threads_back(local: Case) -> None:
    """What nobody waits for any more is not computed to the end."""
    assert isinstance(local.provider, LocalProvider)
    call = asyncio.create_task(local.provider.embed(["table " * 250] * 500, local.function, "attempt"))
    async with asyncio.timeout(5):
        while local.provider._threads._work_queue.qsize() < 100:
            await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(5):
        await local.provider.embed(["next"], local.function, "attempt")


async def test_a_model_of_other_size_than_listed_is_refused_at_start(local: Case) -> None:
    """Else every answer would fail its verification, for ever."""
    wrong = ModelSpec(name="m", weights="m", dimensions=(768,))
    with pytest.raises(SettingsError, match="the model gives 384"):
        LocalProvider(local_files.locate(), wrong)


def test_files_that_are_not_the_ones_we_know_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The built-in model is used only as this release was tested with it."""
    real = local_files.locate()
    changed = tmp_path / "tokenizer.json"
    changed.write_bytes(real.tokenizer.read_bytes() + b" ")
    monkeypatch.setattr(local_files, "builtin_tokenizer", lambda: changed)
    with pytest.raises(SettingsError, match="SHA-256"):
        local_files.locate()


def test_the_local_model_leaves_nothing_in_the_home_directory(tmp_path: Path) -> None:
    """No device id and no queue of reports to the maker of the runtime: what happens here stays here."""
    start = (
        "from processor.adapters.catalogue import load_catalogue;"
        "from processor.adapters.providers import open_provider;"
        "from processor.settings import load;"
        "settings = load(provider='local', _env_file=None);"
        "open_provider(settings, load_catalogue(settings))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        environment[name] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob("*")) == []
