"""The command `quote` over files, without broker, cache or provider: what it prints, and what it refuses."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from processor.adapters.catalogue import load_catalogue
from processor.adapters.clock import SystemClock
from processor.adapters.tokens import tokenizer_of
from processor.app import open_gate
from processor.cli.commands import app
from processor.cli.quote import Report, Wishes, print_report, quote_sources
from processor.domain import ErrorCode
from processor.errors import BrokerUnavailable, RequestRefused, SettingsError
from processor.limits import PACE
from processor.quote import Quote, Share
from processor.settings import Settings, load

TEXT = "Frogs live near water.\n\nThey eat insects.\n\nFrogs live near water."


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A directory with a file of three chunks of 20 to 30 characters, two of them equal."""
    (tmp_path / "frogs.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    return str(tmp_path)


def settings(**given: Any) -> Settings:
    return load(_env_file=None, **given)


async def quote(source: str, wishes: Wishes | None = None, **given: Any) -> Report:
    return await quote_sources(settings(**given), [source], wishes or Wishes(max_characters=30))


def test_the_command_prints_a_line_of_json(corpus: str) -> None:
    """Exact tokens, and the price of the catalogue; nothing is asked of anybody."""
    done = CliRunner().invoke(app, ["quote", corpus, "--max-characters", "30", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    tokenizer = tokenizer_of("cl100k_base")
    assert tokenizer is not None
    tokens = tokenizer.count("Frogs live near water.") + tokenizer.count("They eat insects.")
    assert (said["requests"], said["texts"], said["repeated_texts"], said["texts_to_embed"]) == (1, 3, 1, 2)
    assert (said["tokens"], said["token_source"], said["calls"]) == (tokens, "tokenizer", 1)
    assert said["cost_nanos"] == tokens * 20
    assert said["spaces"]["text-embedding-3-small@1/1536/l2"]["tokens"] == tokens


async def test_model_and_dimensions_are_those_asked_for(corpus: str) -> None:
    """Another model has another price; shorter vectors cost the same."""
    report = await quote(corpus, Wishes(model="text-embedding-3-large", dimensions=256, max_characters=30))
    (space,) = report.quote.spaces
    assert space == "text-embedding-3-large@1/256/l2"
    default = await quote(corpus)
    assert report.quote.total.cost_nanos == default.quote.total.cost_nanos * 130 // 20


@pytest.mark.parametrize(
    "wishes, told",
    [
        (Wishes(model="nobody-knows"), "model: not in the catalogue.*served are text-embedding-3-small, "),
        (Wishes(dimensions=9999), "dimensions: text-embedding-3-small has 1 to 1536 dimensions"),
    ],
)
async def test_what_no_request_may_ask_for_is_refused(corpus: str, wishes: Wishes, told: str) -> None:
    """Once, with the field and what there is, and not for each file."""
    with pytest.raises(RequestRefused, match=told):
        await quote(corpus, wishes)


async def test_a_source_that_is_not_there_is_named(corpus: str) -> None:
    """A path is no topic; what could be one is looked up, and the brokers that don't answer are said."""
    with pytest.raises(RequestRefused, match=r"docs/none\.txt: no such file or directory"):
        await quote("docs/none.txt")
    with pytest.raises(RequestRefused, match="gone: no such file or directory; name files and directories, or one"):
        await quote_sources(settings(), [corpus, "gone"], Wishes())
    with pytest.raises(BrokerUnavailable, match="gone: no such file or directory, and topics can't be looked up: "):
        await quote("gone", bootstrap_servers="127.0.0.1:1")


@pytest.mark.parametrize(
    "given, wishes, minutes, bound_by, told",
    [
        ({}, {}, 1 / 60, "calls at a time", "16 calls at a time of 1 s each"),
        ({}, {"call_s": 90.0}, 1.5, "calls at a time", "16 calls at a time of 90 s each"),
        ({"requests_per_minute": 10}, {}, 1 / 9 / PACE, "requests per minute", "9 requests a minute: what workers of"),
        ({"requests_per_minute": 10, "lane": "interactive"}, {}, 1 / PACE, "requests per minute", "of the interactive"),
        (
            {"requests_per_minute": 10, "interactive_share_percent": 0},
            {},
            0.1 / PACE,
            "requests per minute",
            "a minute",
        ),
        ({"requests_per_minute": 10, "limit_sharers": 4}, {}, 1 / 9 / PACE, "requests per minute", "9 requests"),
        ({"provider": "local"}, {}, None, None, "measure it, give it as --call-seconds"),
    ],
)
async def test_the_time_is_bound_by_limits_or_by_what_is_assumed(
    corpus: str, given: dict[str, Any], wishes: dict[str, Any], minutes: float | None, bound_by: str | None, told: str
) -> None:
    """By the lane's part of the limits that are set; without any, by calls at a time; and it says which."""
    report = await quote(corpus, Wishes(max_characters=30, **wishes), **given)
    assert report.minutes == (None if minutes is None else pytest.approx(minutes))
    assert report.bound_by == bound_by
    assert any(told in sentence for sentence in report.assumed), report.assumed


async def test_a_token_limit_makes_calls_smaller_as_it_does_in_a_worker(corpus: str) -> None:
    """The tokens of a call are at most what the gate of a worker lets pass at once."""
    given: dict[str, Any] = {"tokens_per_minute": 150, "interactive_share_percent": 0}
    gate = open_gate(settings(**given), None, 150, sharers=1, clock=SystemClock())
    assert gate.max_call_tokens == 7
    assert (await quote(corpus, **given)).quote.total.calls == 2


async def test_deployments_add_up_where_their_accounts_differ(corpus: str, tmp_path: Path) -> None:
    """Two keys have twice the limits, one key that is named twice has them once; no key is read."""
    file = tmp_path.parent / f"{tmp_path.name}.yaml"

    async def minutes(*keys: str) -> float:
        entries = [f"{{name: n{at}, provider: openai, api_key_env: {key}}}" for at, key in enumerate(keys)]
        file.write_text("".join(f"- {entry}\n" for entry in entries), encoding="utf-8")
        report = await quote(corpus, deployments_file=file, requests_per_minute=10)
        assert report.minutes is not None
        return report.minutes

    assert await minutes("NO_KEY", "NO_OTHER_KEY") == pytest.approx(await minutes("NO_KEY") / 2)
    assert await minutes("NO_KEY", "NO_KEY") == pytest.approx(await minutes("NO_KEY"))
    file.write_text("".join(f"- {{name: n{at}, provider: openai}}\n" for at in range(3)), encoding="utf-8")
    assert "48 calls at a time" in "".join((await quote(corpus, deployments_file=file)).assumed)
    file.write_text("- {name: n}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="provider"):
        await quote(corpus, deployments_file=file)


async def test_without_a_tenant_no_cache_is_expected(corpus: str) -> None:
    """Each tenant has a cache of its own; without Redis there is none to look at."""
    assert "that depends on the --tenant" in (await quote(corpus, redis_url="redis://127.0.0.1:1")).assumed[0]
    assert "EMBEDDING_REDIS_URL is not set" in (await quote(corpus, Wishes(tenant_id="acme"))).assumed[0]


def test_the_report_has_a_row_for_each_space_and_a_line_for_each_code() -> None:
    """Sums below, unpriced tokens apart; whatever can't be embedded is said by its code."""
    spaces = {
        "b@1/8/l2": Share(texts=10, tokens=1000, calls=1, cost_nanos=20_000),
        "a@1/8/l2": Share(texts=5, tokens=500, calls=1, unpriced_tokens=500),
    }
    quoted = Quote(requests=3, copies=1, texts=17, failed_texts={ErrorCode.EMPTY_TEXT: 2}, spaces=spaces)
    printed = Console(file=StringIO(), width=120)
    print_report(Report(quoted, 2.5, "tokens per minute", ["a [b]"]), printed)
    shown = printed.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in shown.splitlines()]
    assert ["a@1/8/l2", "5", "500", "1", "$0.00", "+", "500", "unpriced"] in rows
    assert ["all", "15", "1,500", "2", "$0.00002", "+", "500", "unpriced"] in rows
    assert "1 of them sent again, counted once" in shown
    assert "2 texts would fail: empty_text" in shown
    assert "at least 2.5 minutes, bound by tokens per minute" in shown
    assert "assumed: a [b]" in shown


def test_the_models_of_the_catalogue_can_all_be_quoted(corpus: str) -> None:
    """Whichever is served: none needs a key."""
    served = [row["model"] for row in load_catalogue(settings()).describe() if row["served"]]
    assert len(served) > 2
    for model in served:
        done = CliRunner().invoke(app, ["quote", corpus, "--model", model, "--json"])
        assert done.exit_code == 0, done.output
