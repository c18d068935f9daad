"""A quote on fakes: what it counts, and that it comes to what a worker is billed for the same requests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from processor.adapters.avro import encode_request
from processor.cache import CacheKeys
from processor.decode import Checker
from processor.domain import DlqClass, Entry, ErrorCode, Item, Request, TokenSource
from processor.errors import CacheUnavailable
from processor.identity import request_id
from processor.ports import NO_FORMER, Found, Undecodable
from processor.quote import Pace, Quote, Quoter, Share
from processor.work import Policy
from tests.support.builders import NOW_MS, a_request, a_source, a_vector
from tests.support.steps import Bench, MemoryCache, TinyCatalogue, VirtualClock, WordCounter

SPACE = "tiny@1/4/l2"


async def quote(
    *requests: Request | Undecodable,
    cache: MemoryCache | None = None,
    max_call_tokens: int | None = None,
    **policy: Any,
) -> Quote:
    """Of these records, in this order."""
    quoter = Quoter(
        Policy(**policy),
        catalogue=TinyCatalogue(),
        cache=cache,
        counter=WordCounter(),
        clock=VirtualClock(),
        max_call_tokens=max_call_tokens,
    )
    for offset, request in enumerate(requests):
        size_bytes = len(encode_request(request)) if isinstance(request, Request) else 10
        await quoter.take(a_source(offset), request, size_bytes)
    return await quoter.finish()


def a_corpus(seed: int) -> list[Request]:
    """Requests of three tenants, with texts that repeat, are empty or too long, and some records twice."""
    dice = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta"]

    def text() -> str:
        return " ".join(dice.choices(words, k=dice.choice([0, 1, 2, 3, 5, 8, 10, 11])))

    requests = [
        a_request(
            [text() for _ in range(dice.randint(1, 6))],
            tenant_id=dice.choice(["a", "b", "c"]),
            correlation_id=f"r{number}",
            document_id=None,
            use_cache=dice.random() < 0.8,
            model=dice.choice([None, None, None, "elsewhere"]),
            action=dice.choice(["generate", "generate", "generate", "validate"]),
        )
        for number in range(60)
    ]
    return requests + dice.sample(requests, 5)


@pytest.mark.parametrize("seed", range(5))
async def test_a_quote_is_the_bill_of_a_worker(seed: int) -> None:
    """Texts, tokens, calls, cost and failures are those of a worker that starts with an empty cache."""
    corpus = a_corpus(seed)
    quoted = await quote(*corpus)
    async with Bench() as bench:
        outbox = await bench.handle(*corpus)
    charges = {usage.request_id: usage for usage in reversed(outbox.usage)}.values()
    accepted = [usage for usage in charges if usage.model]
    assert quoted.requests == len(accepted)
    assert quoted.texts == sum(usage.texts for usage in accepted)
    assert quoted.characters == sum(usage.characters for usage in accepted)
    total = quoted.total
    assert total.texts == sum(usage.billed.texts for usage in accepted)
    assert total.tokens == sum(usage.billed.tokens for usage in accepted) == sum(bench.provider.bills.values())
    assert total.cost_nanos == sum(usage.billed.cost_nanos or 0 for usage in accepted)
    assert total.calls == len(bench.provider.bills)
    assert quoted.repeated_texts == sum(usage.saved.texts for usage in accepted)
    first = {(result.request_id, result.chunk_index): result for result in reversed(outbox.results)}.values()
    failed = Counter(result.error.code for result in first if result.error is not None and result.status == "error")
    assert quoted.failed_texts | quoted.refused == failed
    assert quoted.cached_texts == 0


@pytest.mark.parametrize("texts", [41, 64, 100, 145])
async def test_windows_that_come_together_share_their_calls(texts: int) -> None:
    """Though a worker looks up twenty at a time, its calls are as full as those of the quote: eight texts each."""
    corpus = [a_request([f"{place} two three"], correlation_id=str(place)) for place in range(texts)]
    async with Bench(window_max_texts=20) as bench:
        await bench.handle(*corpus)
    assert len(bench.provider.bills) == (await quote(*corpus)).total.calls == -(-texts // 8)


@pytest.mark.parametrize("seed", range(5))
async def test_each_text_is_counted_as_one_thing(seed: int) -> None:
    """To be embedded, repeated, in the cache or failed: together that is all texts."""
    cache = MemoryCache()
    for tenant in ("a", "b", "c"):
        cache.entries |= (await a_cache(tenant, ["alpha", "beta", "gamma", "delta"])).entries
    quoted = await quote(*a_corpus(seed), cache=cache)
    assert quoted.cached_texts > 0
    parts = quoted.total.texts, quoted.repeated_texts, quoted.cached_texts, *quoted.failed_texts.values()
    assert sum(parts) == quoted.texts


async def test_equal_texts_are_embedded_once_for_each_tenant() -> None:
    """Wherever they stand; and again for whoever does without the cache."""
    quoted = await quote(
        a_request(["same", "same"], correlation_id="1"),
        a_request(["same"], correlation_id="2"),
        a_request(["same"], correlation_id="3", tenant_id="other"),
        a_request(["same"], correlation_id="4", use_cache=False),
        window_max_texts=1,
    )
    assert (quoted.texts, quoted.total.texts, quoted.repeated_texts) == (5, 3, 2)


async def test_a_request_sent_again_is_counted_once() -> None:
    """By its request id: another correlation id is another request."""
    request = a_request(["one", "two"], use_cache=False)
    quoted = await quote(request, request, a_request(["one", "two"], use_cache=False, correlation_id="other"))
    assert (quoted.requests, quoted.copies, quoted.total.texts) == (2, 1, 4)


async def test_what_the_cache_has_costs_nothing() -> None:
    """Neither a text that others paid for nor the own entry of a request that does without the cache."""
    alone = a_request(["mine"], use_cache=False)
    cache = await a_cache("acme", ["known"])
    cache.entries |= (await a_cache("acme", ["mine"], own=Item(request_id(alone), 0))).entries
    quoted = await quote(a_request(["known", "new"], correlation_id="c"), alone, cache=cache)
    assert (quoted.cached_texts, quoted.total.texts, quoted.total.tokens) == (2, 1, 1)


async def test_a_cache_out_of_reach_is_named() -> None:
    """The quote is that of an empty cache, says so, and asks no more."""

    class Gone(MemoryCache):
        asked = 0

        async def get_many(
            self, keys: Sequence[bytes], dimensions: int, former: Mapping[bytes, bytes] = NO_FORMER
        ) -> Mapping[bytes, Found]:
            self.asked += 1
            raise CacheUnavailable("redis: TimeoutError")

    gone = Gone()
    quoted = await quote(a_request(["a", "b", "c"]), cache=gone, window_max_texts=1)
    assert (quoted.cache_unavailable, quoted.total.texts, gone.asked) == ("redis: TimeoutError", 3, 1)


async def test_what_embeds_nothing_is_listed_apart() -> None:
    """Other actions, refused requests by code, records that can't be read by class."""
    quoted = await quote(
        a_request(action="validate"),
        a_request(model="nobody-knows"),
        a_request(action="sing"),
        Undecodable(DlqClass.NO_IDENTITY, "no_tenant"),
    )
    assert (quoted.requests, quoted.others, quoted.texts) == (0, 1, 0)
    assert quoted.refused == {ErrorCode.UNKNOWN_MODEL: 1, ErrorCode.INVALID_REQUEST: 1}
    assert quoted.unreadable == {DlqClass.NO_IDENTITY: 1}
    assert quoted.total == Share()


async def test_texts_that_would_fail_are_listed_by_code() -> None:
    """Empty, over the limit, or past the deadline of their request now; one that is cut is embedded."""
    too_long = "w " * 11
    quoted = await quote(
        a_request([" ", too_long, "fine"]),
        a_request(["late"], deadline_ms=NOW_MS - 1, correlation_id="late"),
        a_request([too_long], truncate="truncate_end", correlation_id="cut"),
    )
    assert quoted.failed_texts == {
        ErrorCode.EMPTY_TEXT: 1,
        ErrorCode.TEXT_TOO_LONG: 1,
        ErrorCode.DEADLINE_EXCEEDED: 1,
    }
    assert (quoted.total.texts, quoted.total.tokens, quoted.truncated_texts) == (2, 11, 1)


async def test_calls_keep_to_what_the_limits_allow_at_once() -> None:
    """A limit on the tokens of a call makes more of them; without one the model's own limits hold."""
    corpus = [a_request([f"{place} two three four five"], correlation_id=str(place)) for place in range(24)]
    assert (await quote(*corpus)).total.calls == 3
    assert (await quote(*corpus, max_call_tokens=10)).total.calls == 12


async def test_texts_do_not_pile_up_until_the_end() -> None:
    """Calls are made on the way: only what waits for one is held, however much comes."""
    quoter = Quoter(
        Policy(window_max_texts=512),
        catalogue=TinyCatalogue(),
        cache=None,
        counter=WordCounter(),
        clock=VirtualClock(),
        max_call_tokens=None,
    )
    for place in range(10):
        texts = [f"{place} {number}" for number in range(1000)]
        await quoter.take(a_source(place), a_request(texts, correlation_id=str(place)), 1)
    assert quoter.quote.total.texts > 4_000
    assert (await quoter.finish()).total == Share(texts=10_000, tokens=20_000, calls=1250, cost_nanos=20_000)


async def test_estimated_tokens_are_called_so() -> None:
    """One text that was not counted exactly is enough."""

    class Guess(WordCounter):
        def count(self, texts: Sequence[str], model: Any) -> Any:
            return super().count(texts, model)._replace(source=TokenSource.ESTIMATE)

    quoter = Quoter(
        Policy(), catalogue=TinyCatalogue(), cache=None, counter=Guess(), clock=VirtualClock(), max_call_tokens=None
    )
    await quoter.take(a_source(), a_request(), 10)
    assert (await quoter.finish()).token_source is TokenSource.ESTIMATE


@pytest.mark.parametrize(
    "pace, expected",
    [
        ({"requests_per_minute": 50.0}, (2.0, "requests per minute")),
        ({"requests_per_minute": 50.0, "tokens_per_minute": 1000.0}, (10.0, "tokens per minute")),
        ({"call_s": 6.0}, (1.3, "calls at a time")),
        ({"call_s": 6.0, "requests_per_minute": 50.0}, (2.0, "requests per minute")),
        ({}, None),
    ],
)
def test_the_tightest_bound_says_how_long_it_takes(pace: dict[str, float], expected: tuple[float, str] | None) -> None:
    """Whichever of the limits it is; no bound, no time."""
    known: dict[str, Any] = {"requests_per_minute": None, "tokens_per_minute": None, "call_s": None}
    found = Pace(**known | pace, concurrent_calls=8).minutes(Share(calls=100, tokens=10_000))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == pytest.approx(expected[0])
        assert found[1] == expected[1]


async def a_cache(tenant: str, texts: Sequence[str], own: Item | None = None) -> MemoryCache:
    """What a worker remembers of these texts of the tiny model."""
    plan = Checker(Policy(), TinyCatalogue()).check(a_request(texts), 0)
    function = plan.function  # type: ignore[union-attr]
    assert function is not None
    cache = MemoryCache()
    await cache.put_many(
        {
            CacheKeys(b"").present(tenant, function, text, own): Entry(
                a_vector(4), 1, own or Item("somebody", 0), "attempt", TokenSource.PROVIDER
            )
            for text in texts
        }
    )
    return cache
