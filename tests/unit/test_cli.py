"""The command line without a broker: help, exit codes, errors in one line, the settings page, the splitter."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from processor.accounts import BucketKey, UsageSums
from processor.cli.commands import app
from processor.cli.console import money
from processor.cli.corpus import of_files, standard_library
from processor.cli.demo import Report
from processor.cli.produce import read_text, text_files
from processor.cli.settings_table import markdown, rows
from processor.cli.splitter import split_text
from processor.cli.totals import table
from processor.errors import RequestRefused, SettingsError
from processor.settings import Settings, load

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "worker",
    "aggregator",
    "topics create",
    "topics check",
    "produce",
    "quote",
    "results",
    "usage",
    "usage report",
    "usage audit",
    "usage explain",
    "usage rebuild",
    "cache stats",
    "cache purge",
    "cache warm",
    "doctor",
    "demo",
]


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "processor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
        env={"PATH": os.environ["PATH"], "COLUMNS": "120", **environment},
    )


def test_every_command_is_in_the_help_and_so_are_the_exit_codes() -> None:
    """A person finds the commands and what their exit codes mean."""
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    assert all(command.split(" ", maxsplit=1)[0] in done.stdout for command in COMMANDS)
    assert "Exit codes: 0 ok, 1 failed" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    """Its help says what it does and shows its options."""
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.stdout
    assert "--help" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["sing"],
        ["produce", "README.md"],
        ["produce", "no-such-file", "--tenant", "acme"],
        ["produce", "README.md", "--tenant", "acme", "--max-characters", "100", "--overlap", "50"],
        ["quote"],
        ["quote", "README.md", "--overlap", "500"],
        ["quote", "README.md", "--from", "now"],
        ["results", "--new"],
        ["usage", "report", "--by", "tenant"],
        ["usage", "report", "--from", "2026-13"],
        ["usage", "report", "--to", "20261121"],
        ["usage", "report", "--from", "2026-11-22", "--to", "2026-11-21"],
        ["usage", "report", "--by", "month", "--from", "2026-11-21"],
        ["usage", "report", "--json", "--csv"],
        ["usage", "audit", "--invoice", "README.md"],
        ["usage", "audit", "--invoice", "no-such-file"],
        ["usage", "audit", "--store", "no-such-file"],
        ["usage", "audit", "--provider", "openai"],
        ["usage", "explain", "id", "--since", "soon"],
        ["usage", "explain", ""],
        ["usage", "explain", "\udcff"],
        ["worker", "--lane", "fast"],
        ["cache", "purge"],
        ["cache", "warm"],
        ["cache", "warm", "README.md", "--from-results"],
        ["cache", "warm", "no-such-file"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    """The reason is on standard error, and nothing was done."""
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stderr
    assert done.stdout == ""


def test_a_file_that_is_no_store_is_told_before_an_hour_of_reading() -> None:
    """And nobody is asked to delete it, as the aggregator's own would be."""
    done = cli("usage", "audit", "--store", "README.md")
    assert done.returncode == 1
    assert "--store: README.md" in done.stderr
    assert "delete" not in done.stderr


def test_wrong_settings_are_one_readable_error() -> None:
    """Every fault with its variable, no traceback, exit code 1; --debug shows where it came from."""
    wrong = {"EMBEDDING_CACHE_TTL_S": "soon", "EMBEDDING_LANE": "fast"}
    done = cli("usage", "report", **wrong)
    assert done.returncode == 1
    assert "EMBEDDING_CACHE_TTL_S" in done.stderr
    assert "EMBEDDING_LANE" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in cli("--debug", "usage", "report", **wrong).stderr


@pytest.mark.parametrize(
    "name,value,told",
    [
        ("EMBEDDING_LOG_LEVEL", "LOUD", "'DEBUG'"),
        ("EMBEDDING_LOG_FORMAT", "xml", "'console'"),
        ("EMBEDDING_PRODUCER_COMPRESSION", "rar", "'gzip'"),
        ("EMBEDDING_SECURITY_PROTOCOL", "TLS", "'SASL_SSL'"),
        ("EMBEDDING_SASL_MECHANISM", "GSSAPI", "'PLAIN'"),
        ("EMBEDDING_PROVIDER", "acme", "'local'"),
        ("EMBEDDING_PROVIDER_TIMEOUT_S", "inf", "finite number"),
        ("EMBEDDING_OPENAI_BASE_URL", "localhost:8000", "must begin with https://"),
        ("EMBEDDING_COHERE_BASE_URL", "https://me:secret@cohere.test", "must end after the path"),
        ("EMBEDDING_BOOTSTRAP_SERVERS", "", "at least 1 character"),
        ("EMBEDDING_DEFAULT_DIMENSIONS_BY_MODEL", "{oops", "must be a JSON object"),
        ("EMBEDDING_RETRY_INITIAL_S", "31", "at most EMBEDDING_RETRY_MAX_S"),
        ("EMBEDDING_HEARTBEAT_INTERVAL_S", "20", "at most a third of EMBEDDING_SESSION_TIMEOUT_S"),
    ],
)
def test_a_wrong_setting_is_told_by_its_variable(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one line about it begins with the variable and says what may stand there."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load(_env_file=None)
    _, line = str(caught.value).splitlines()
    assert line.strip().startswith(f"{name}: ")
    assert told in line


def test_a_variable_set_to_nothing_is_none_where_none_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Container files pass empty variables on; where nothing is a value of its own it stays one."""
    for name in ("PRODUCER_COMPRESSION", "OPENAI_API_KEY_FILE", "REDIS_URL", "REPLY_TOPICS"):
        monkeypatch.setenv(f"EMBEDDING_{name}", "")
    settings = load(_env_file=None)
    assert (settings.producer_compression, settings.openai_api_key_file, settings.redis_url) == (None, None, None)
    assert settings.reply_topics == ()


def test_names_in_brackets_are_shown_as_they_are() -> None:
    """Whatever a payer or a collection is called, the table prints it and does not take it for markup."""
    totals = {BucketKey("[bold]acme[/x]", "2026-11", "collection", "[/]"): UsageSums(requests=1)}
    printed = Console(file=StringIO(), width=200)
    printed.print(table(totals))
    shown = printed.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]acme[/x]" in shown
    assert "collection [/]" in shown


def test_the_settings_page_is_up_to_date() -> None:
    """docs/settings.md is what `embedding-processor settings` prints."""
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == markdown()
    assert cli("settings").stdout == markdown()


def test_every_setting_is_in_the_table_with_its_meaning() -> None:
    """One row each, none without help text, and no default of a secret but the documented one."""
    table = list(rows())
    assert len(table) == len(Settings.model_fields)
    assert all(meaning and meaning != "None" for *_, meaning in table)
    assert {name: unit for name, unit, *_ in table}["EMBEDDING_WINDOW_MAX_WAIT_MS"] == "ms"


TEXTS = st.text(st.sampled_from("ab .!?\n\té"), max_size=400)


@given(text=TEXTS, max_characters=st.integers(10, 80), overlap=st.integers(0, 4))
def test_no_word_is_lost_and_no_chunk_too_long(text: str, max_characters: int, overlap: int) -> None:
    """Without overlap the chunks hold every letter in order; with it none is over the limit either."""
    chunks = split_text(text, max_characters=max_characters)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    for chunk in [*chunks, *split_text(text, max_characters=max_characters, overlap_characters=overlap)]:
        assert 0 < len(chunk) <= max_characters
        assert chunk == " ".join(chunk.split())


def test_paragraphs_stay_together_while_they_fit() -> None:
    """Short ones are joined, a long one is cut at its sentences."""
    text = "One.\n\nTwo.\n\n" + "A sentence of words. " * 4
    assert split_text(text, max_characters=45) == [
        "One. Two. A sentence of words.",
        "A sentence of words. A sentence of words.",
        "A sentence of words.",
    ]


def test_an_overlap_repeats_the_last_whole_words() -> None:
    """Each chunk but the first begins with the end of the one before."""
    chunks = split_text("alpha beta gamma delta epsilon", max_characters=18, overlap_characters=6)
    assert chunks == ["alpha beta", "beta gamma delta", "delta epsilon"]
    with pytest.raises(ValueError, match="overlap_characters"):
        split_text("x", max_characters=10, overlap_characters=5)


def test_files_are_found_in_order_and_hidden_ones_left_out(tmp_path: Path) -> None:
    """A directory stands for the text files below it; one that is no text is refused by name and place."""
    for name in ("b.txt", "a/z.txt", ".git/config", "a/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("hello")
    assert [str(path.relative_to(tmp_path)) for path in text_files([tmp_path])] == ["a/z.txt", "b.txt"]
    (tmp_path / "b.txt").write_bytes(b"ok \xff")
    with pytest.raises(RequestRefused, match=r"b\.txt: byte 3 is not UTF-8"):
        read_text(tmp_path / "b.txt")


def test_the_demos_text_is_large_enough_and_holds_the_answers() -> None:
    """Over 1,000 chunks with ids of their own, and each question can be answered from them."""
    corpus = standard_library()
    ids = [chunk.chunk_id for chunks in corpus.documents.values() for chunk in chunks]
    assert 1_000 <= corpus.size == len(set(ids))
    assert all(question.answers & set(ids) for question in corpus.questions)
    assert corpus == standard_library()


def test_given_files_are_asked_for_their_own_beginnings(tmp_path: Path) -> None:
    """The questions of a demo over files are about what is in them."""
    (tmp_path / "a.txt").write_text("Alpha is first.\n\nBeta follows.")
    corpus = of_files([tmp_path / "a.txt"])
    (question,) = corpus.questions
    assert question.text.startswith("Alpha")
    assert corpus.size == 1


def test_a_figure_of_the_demo_that_is_not_met_is_named() -> None:
    """Each bar has its words; a good run has none."""
    good = {"chunks": 1000, "results": 1000, "errors": 0, "lost": 0, "second_pass_hits": 1000, "usage_tokens": 5}
    good |= {"ledger_tokens": 5, "residual_tokens": 0}
    report = Report(**good, questions_hit="5/5", seconds=1.0)
    assert report.faults(least_chunks=1000) == []
    for name in good:
        worse = Report(**good | {name: good[name] + (-1 if good[name] else 1)}, questions_hit="5/5", seconds=1.0)
        assert worse.faults(least_chunks=1000), name
    assert Report(**good, questions_hit="4/5", seconds=1.0).faults(least_chunks=1000) == ["every question answered"]


def test_money_loses_no_digit() -> None:
    """Cents always, more digits only where there are some."""
    assert [money(nanos) for nanos in (0, 43, 48_305, 10_000_000, 1_234_560_000_000)] == [
        "$0.00",
        "$0.000000043",
        "$0.000048305",
        "$0.01",
        "$1,234.56",
    ]
