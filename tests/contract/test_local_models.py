"""Models on this machine: the built-in one, and exports whose vectors numpy can tell from a table of tokens."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from processor.adapters import local_files
from processor.adapters.catalogue import load_catalogue
from processor.adapters.onnx import LocalProvider, pieces
from processor.adapters.providers import open_provider
from processor.adapters.tokens import LocalTokenCounter, WordPiece
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate
from processor.errors import CallTooLarge, InputRejected, ProviderTransient, SettingsError
from processor.settings import load
from tests.support.stack import until
from tests.support.tiny_onnx import greedy, lookup, pooling_itself, write_export

VOCABULARY, SIZE = 30_522, 12
TABLE: NDArray[np.float32] = np.random.default_rng(5).normal(0.1, 1.0, (VOCABULARY, SIZE)).astype(np.float32)
TEXTS = ["one", "a table of words", "table " * 30, "naïve 文 <s> [SEP]", "the same", "the same", ""]
MEAN = {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True}


def tokenizer_file() -> Path:
    return local_files.locate().tokenizer


def tokens_of(text: str) -> list[int]:
    return list(WordPiece(tokenizer_file()).ids(text))


def function_of(model: ModelSpec, dimensions: int | None = None) -> EmbeddingFunction:
    space = model.space(dimensions or model.dimensions[0])
    return EmbeddingFunction(model, space, InputType.DOCUMENT, "", Truncate.ERROR)


@asynccontextmanager
async def running(
    directory: Path | None, *, threads: int = 2, **overrides: Any
) -> AsyncIterator[tuple[Any, ModelSpec]]:
    """The provider of a directory with the model that the catalogue makes of it."""
    settings = load(provider="local", local_model_path=directory, local_threads=threads, _env_file=None, **overrides)
    catalogue = load_catalogue(settings)
    model = catalogue.find(catalogue.default_model)
    assert model is not None
    provider = open_provider(settings, catalogue)
    yield provider, model
    await provider.close()


def mean(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows.mean(axis=0), np.float32)


POOLINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "mean": ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, mean),
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda rows: rows[0]),
    "max": ({"pooling_mode_max_tokens": True}, lambda rows: rows.max(axis=0)),
    "mean_sqrt_len": (
        {"pooling_mode_mean_sqrt_len_tokens": True},
        lambda rows: rows.sum(axis=0) / np.sqrt(len(rows)),
    ),
    "lasttoken": ({"pooling_mode_lasttoken": True}, lambda rows: rows[-1]),
    "a word": ({"pooling_mode": "lasttoken", "include_prompt": True}, lambda rows: rows[-1]),
}


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
async def test_an_export_is_pooled_and_normalised_as_its_files_say(
    pooling: str, normalised: bool, tmp_path: Path
) -> None:
    """Each text's vector is that of its own tokens, whatever is run beside it, in the order of the call."""
    flags, expected = POOLINGS[pooling]
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    config = {"word_embedding_dimension": SIZE, **flags}
    write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=config, modules=modules)
    async with running(tmp_path / "m") as (provider, model):
        assert provider._provider._piece_tokens > 1
        answer = await provider.embed(TEXTS, function_of(model), "attempt")
    assert (model.normalised, list(answer.indices)) == (normalised, list(range(len(TEXTS))))
    for text, vector in zip(TEXTS, answer.vectors, strict=True):
        whole = expected(TABLE[tokens_of(text)])
        assert vector == pytest.approx(whole / np.linalg.norm(whole) if normalised else whole, abs=1e-5)
        assert vector.dtype == np.float32


async def test_what_a_model_is_comes_from_its_files(tmp_path: Path) -> None:
    """Name, size, limit and prefixes of a directory that no catalogue lists."""
    prompts = {"query": "find: ", "passage": "text: ", "other": "x"}
    write_export(tmp_path / "mine", lookup(TABLE), tokenizer_file(), pooling=MEAN, prompts=prompts, max_seq_length=48)
    async with running(tmp_path / "mine") as (_, model):
        assert (model.name, model.dimensions, model.max_input_tokens) == ("mine", (SIZE,), 48)
    assert model.prefixes == {InputType.QUERY: "find: ", InputType.DOCUMENT: "text: "}
    assert model.answers_as == frozenset({"mine"})
    assert model.prices == ()


@pytest.mark.parametrize(
    "default,query,document", [("query", "q: ", "q: "), ("plain", "q: ", None), (None, "q: ", None)]
)
def test_a_default_prompt_stands_for_what_has_none(
    default: str | None, query: str, document: str | None, tmp_path: Path
) -> None:
    """An empty one is none, as one that is not there."""
    directory = write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=MEAN)
    prompts = {"prompts": {"query": "q: ", "plain": ""}, "default_prompt_name": default}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    prefixes = local_files.locate(directory).prefixes
    assert (prefixes.get(InputType.QUERY), prefixes.get(InputType.DOCUMENT)) == (query, document)


async def test_the_catalogue_overrides_the_files(tmp_path: Path) -> None:
    """Of a listed model its fields hold, under its listed name; what it does not give, the files do."""
    write_export(
        tmp_path / "e5-base-v2", lookup(TABLE), tokenizer_file(), pooling=MEAN, prompts={"query": "q "}, nested=False
    )
    listed = tmp_path / "models.yaml"
    listed.write_text(f"models: {{intfloat/e5-base-v2: {{dimensions: [{SIZE}], max_input_tokens: 40}}}}")
    async with running(tmp_path / "e5-base-v2", catalogue_file=listed) as (provider, model):
        assert list(await provider.list_models()) == ["intfloat/e5-base-v2"]
    assert model.prefixes == {InputType.DOCUMENT: "passage: ", InputType.QUERY: "query: "}
    assert (model.max_input_tokens, model.normalised) == (40, True)


async def test_other_pooling_is_another_space(tmp_path: Path) -> None:
    """The same weights pooled otherwise are no neighbours; the same files anywhere are."""
    for name, pooling in (("a", MEAN), ("b", {"pooling_mode": "cls", "word_embedding_dimension": SIZE}), ("c", MEAN)):
        write_export(tmp_path / name / "m", lookup(TABLE), tokenizer_file(), pooling=pooling)
    a, b, c = (local_files.locate(tmp_path / name / "m").revision for name in "abc")
    assert a == c != b


async def test_vectors_are_shortened_and_normalised_anew(tmp_path: Path) -> None:
    """A shorter size that the operator lists is cut here."""
    write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=MEAN)
    listed = tmp_path / "models.yaml"
    listed.write_text(f"models: {{m: {{provider: local, dimensions: [{SIZE}], shortenable: true}}}}")
    async with running(tmp_path / "m", catalogue_file=listed) as (provider, model):
        answer = await provider.embed(["a table of words"], function_of(model, 5), "attempt")
    whole = mean(TABLE[tokens_of("a table of words")])[:5]
    assert answer.vectors[0] == pytest.approx(whole / np.linalg.norm(whole), abs=1e-5)


@pytest.mark.parametrize(
    "pooling,modules,prompts,told",
    [
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            (),
            {},
            "pooling mean and cls is not done",
        ),
        ({"pooling_mode_weightedmean_tokens": True}, (), {}, "pooling_mode_weightedmean_tokens is not done"),
        ({"pooling_mode": "median"}, (), {}, "pooling median is not done"),
        ({"pooling_mode_mean_tokens": False}, (), {}, "pooling none is not done"),
        (MEAN, ("Dense",), {}, "module Dense, which is not run here"),
        ({**MEAN, "include_prompt": False}, (), {"query": "q "}, "include_prompt false is not done"),
    ],
)
def test_what_is_not_done_is_refused_at_start(
    pooling: dict[str, Any], modules: tuple[str, ...], prompts: dict[str, str], told: str, tmp_path: Path
) -> None:
    """Vectors made in another way than the model wants would look sound."""
    parts = ("Transformer", "Pooling", *modules)
    write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=pooling, modules=parts, prompts=prompts)
    with pytest.raises(SettingsError, match=told):
        local_files.locate(tmp_path / "m")


def test_text_in_lower_case_is_refused_at_start(tmp_path: Path) -> None:
    """Of a kind of export that wants its texts changed."""
    write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=MEAN)
    (tmp_path / "m" / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(SettingsError, match="do_lower_case"):
        local_files.locate(tmp_path / "m")


async def test_a_directory_that_does_not_say_enough_is_told(tmp_path: Path) -> None:
    """A bare model needs its size and limit in the catalogue."""
    write_export(tmp_path / "bare", lookup(TABLE), tokenizer_file(), nested=False)
    with pytest.raises(SettingsError, match=r"models\.bare: dimensions") as caught:
        load_catalogue(load(provider="local", local_model_path=tmp_path / "bare"))
    assert "models.bare: max_input_tokens" in str(caught.value)


async def test_a_model_whose_vectors_depend_on_their_neighbours_runs_text_by_text(tmp_path: Path) -> None:
    """Else a text's vector would depend on what happened to wait beside it."""
    write_export(tmp_path / "m", lookup(TABLE, mixing=True), tokenizer_file(), pooling=MEAN, modules=("Pooling",))
    async with running(tmp_path / "m") as (provider, model):
        assert provider._provider._piece_tokens == 1
        together = await provider.embed(TEXTS, function_of(model), "attempt")
        for text, vector in zip(TEXTS, together.vectors, strict=True):
            alone = await provider.embed([text], function_of(model), "attempt")
            assert np.array_equal(vector, alone.vectors[0])


@pytest.mark.parametrize("at_once", [None, 1])
async def test_a_model_that_pools_itself_is_taken_at_its_word(at_once: int | None, tmp_path: Path) -> None:
    """An output of one vector a text is not pooled again; here one that sees padding, or takes one text at a time."""
    model_file = pooling_itself(TABLE, texts=at_once)
    write_export(tmp_path / "m", model_file, tokenizer_file(), pooling=MEAN)
    async with running(tmp_path / "m") as (provider, model):
        answer = await provider.embed(TEXTS, function_of(model), "attempt")
    for text, vector in zip(TEXTS, answer.vectors, strict=True):
        whole = TABLE[tokens_of(text)].max(axis=0)
        assert vector == pytest.approx(whole / np.linalg.norm(whole), abs=1e-5)


async def test_too_little_memory_asks_for_smaller_calls(tmp_path: Path) -> None:
    """What does not fit is a fault of the call; a text alone can't be made smaller, and is tried again."""
    write_export(tmp_path / "m", greedy(TABLE, from_tokens=20), tokenizer_file(), pooling=MEAN)
    async with running(tmp_path / "m") as (provider, model):
        large, small = "table " * 40, "table"
        with pytest.raises(CallTooLarge) as caught:
            await provider.embed([small, large], function_of(model), "attempt")
        assert (caught.value.code, caught.value.http_status) == ("out_of_memory", 507)
        assert caught.value.__cause__ is None
        with pytest.raises(ProviderTransient, match="out_of_memory"):
            await provider.embed([large], function_of(model), "attempt")
        assert len((await provider.embed([small], function_of(model), "attempt")).vectors) == 1


@pytest.mark.parametrize("content", [b"", b"no model at all"])
async def test_a_file_that_is_no_model_is_told_at_start(content: bytes, tmp_path: Path) -> None:
    """With the path, and without what the runtime says of it."""
    write_export(tmp_path / "m", content, tokenizer_file(), pooling=MEAN)
    with pytest.raises(SettingsError, match=r"model\.onnx can't be loaded"):
        async with running(tmp_path / "m"):
            pass


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 300))
def test_pieces_hold_each_text_once_and_hardly_any_padding(lengths: list[int], tokens: int) -> None:
    """A piece of several is within its tokens with padding, and no text is padded by more than an eighth and one."""
    found = list(pieces(lengths, tokens))
    assert sorted(index for piece in found for index in piece) == list(range(len(lengths)))
    for piece in found:
        sizes = [lengths[index] for index in piece]
        assert len(piece) == 1 or len(piece) * max(sizes) <= tokens
        assert max(sizes) <= min(sizes) * 1.125 + 1


# --- the built-in model


@pytest.fixture
async def local() -> AsyncIterator[LocalProvider]:
    """By itself, for its insides are looked at."""
    catalogue = load_catalogue(load(provider="local"))
    model = catalogue.find(catalogue.default_model)
    assert model is not None
    provider = LocalProvider(local_files.locate(), model, threads=2)
    yield provider
    await provider.close()


@pytest.fixture
def function(local: LocalProvider) -> EmbeddingFunction:
    return function_of(local._model)


async def test_what_means_the_same_lies_close(local: LocalProvider, function: EmbeddingFunction) -> None:
    """The right answer is nearer to its question than any other."""
    questions = [
        "parse a date from a string",
        "remove a directory and all that is in it",
        "the largest of some numbers",
    ]
    answers = ["datetime.strptime: make a datetime of text", "shutil.rmtree: delete a whole tree", "max: biggest item"]
    found = await local.embed(questions + answers, function, "attempt")
    vectors = np.array(found.vectors)
    assert (vectors[:3] @ vectors[3:].T).argmax(axis=1).tolist() == [0, 1, 2]


async def test_a_text_has_the_same_vector_whatever_it_is_called_with(
    local: LocalProvider, function: EmbeddingFunction
) -> None:
    """Neither neighbours nor padding are seen in it: a replay in another call gives the same vector."""
    texts = [f"{'word ' * (i % 9)}number {i}" for i in range(40)]
    together = await local.embed(texts, function, "attempt")
    assert local._piece_tokens > 1
    for text, vector in list(zip(texts, together.vectors, strict=True))[::5]:
        alone = await local.embed([text], function, "attempt")
        assert np.abs(vector - alone.vectors[0]).max() < 1e-5


async def test_threads_are_bounded_and_the_loop_goes_on(
    local: LocalProvider, function: EmbeddingFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many calls there are: never more than its two threads, and none of them the loop's."""
    run, begun, others_had_theirs = local._run, threading.Event(), threading.Event()
    threads = set[threading.Thread]()

    def watched(tokens: Any) -> Any:
        threads.add(threading.current_thread())
        begun.set()
        assert threading.current_thread() is not threading.main_thread()
        assert others_had_theirs.wait(30), "the loop stood still"
        return run(tokens)

    async def others() -> None:
        while not begun.is_set():
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        others_had_theirs.set()

    monkeypatch.setattr(local, "_run", watched)
    await asyncio.gather(others(), *(local.embed(["table " * 60] * 4, function, f"a{i}") for i in range(4)))
    assert 1 <= len(threads) <= 2


async def test_a_cancelled_call_gives_its_threads_back(
    local: LocalProvider, function: EmbeddingFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody waits for any more is not computed to the end: of 500 pieces only those on its two threads are."""
    run, begun, cancelled = local._run, list[object](), threading.Event()

    def held(tokens: Any) -> Any:
        begun.append(tokens)
        assert cancelled.wait(30)
        return run(tokens)

    monkeypatch.setattr(local, "_run", held)
    call = asyncio.create_task(local.embed(["table " * 250] * 500, function, "attempt"))
    await until(lambda: len(begun) == 2, within_s=30, what="both threads have a piece", every_s=0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)  # the loop tells the pool of it in its next turn
    cancelled.set()
    async with asyncio.timeout(30):
        await local.embed(["next"], function, "attempt")
    assert len(begun) == 3


async def test_a_model_of_other_size_than_listed_is_refused_at_start() -> None:
    """Else every answer would fail its verification, for ever."""
    wrong = ModelSpec(name="m", weights="m", dimensions=(768,))
    with pytest.raises(SettingsError, match="the model gives 384"):
        LocalProvider(local_files.locate(), wrong)


async def test_of_a_call_that_failed_nothing_more_is_begun(tmp_path: Path) -> None:
    """Its texts are tried again: what was left of it would only be in their way."""
    write_export(tmp_path / "m", lookup(TABLE), tokenizer_file(), pooling=MEAN)
    async with running(tmp_path / "m", threads=1) as (provider, model):
        runs, run, told = 0, provider._provider._run, threading.Event()

        def failing_at_first(tokens: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                raise MemoryError
            told.wait(30)
            return run(tokens)

        provider._provider._run = failing_at_first
        with pytest.raises(CallTooLarge):
            await provider.embed(["table " * 40] * 100, function_of(model), "attempt")
        await asyncio.sleep(0)  # the loop tells the pool of it in its next turn
        told.set()
        await provider.embed(["table"], function_of(model), "attempt")
    assert runs <= 3


async def test_a_text_over_the_limit_is_refused_before_anything_runs(
    local: LocalProvider, function: EmbeddingFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody pays for its neighbours."""
    ran: list[object] = []
    monkeypatch.setattr(local, "_run", lambda *call: ran.append(call))
    over = LocalTokenCounter().truncate("table " * 400, function.model, 257, keep_end=False)
    with pytest.raises(InputRejected):
        await local.embed(["fine", over], function, "attempt")
    assert ran == []


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
