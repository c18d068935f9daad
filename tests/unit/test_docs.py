"""The pages of docs/ are in step with the code, and what they promise has its test."""

from __future__ import annotations

import ast
import re
from enum import StrEnum
from pathlib import Path

import pytest

from processor import domain, errors
from processor.domain import ACTION_ALIASES, CHUNK_ERRORS, ErrorCode
from processor.errors import ProviderError
from tests.support.docs import DOCS, pages

ROOT = DOCS.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
SETS: dict[str, type[StrEnum]] = {
    "Actions": domain.Action,
    "Operations": domain.Operation,
    "Statuses": domain.Status,
    "Error codes": domain.ErrorCode,
    "Dead-letter classes": domain.DlqClass,
    "Cache levels": domain.CacheLevel,
    "Input types": domain.InputType,
    "Truncate policies": domain.Truncate,
    "Estimators of a call": domain.CallEstimator,
    "Token sources": domain.TokenSource,
    "Token types": domain.TokenType,
    "Kinds of ledger records": domain.CallKind,
    "Outcomes of a receipt": domain.CallOutcome,
    "Lanes": domain.Lane,
}


@pytest.mark.parametrize("name", pages())
def test_a_generated_page_is_in_step(name: str) -> None:
    """It equals what its sources give now."""
    assert PAGES[f"docs/{name}"] == pages()[name], "run `python -m tests.support.docs`"


def words_of(heading: str) -> list[list[str]]:
    """The rows of the table under this heading of docs/words.md, head left out."""
    _, _, rest = PAGES["docs/words.md"].partition(f"\n## {heading}\n")
    rows = [line.strip("| ").split(" | ") for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return rows[2:]


@pytest.mark.parametrize("heading", SETS)
def test_every_word_of_an_open_set_is_explained(heading: str) -> None:
    """The table has the words of the code, in its order, and no others."""
    assert [row[0].strip("`") for row in words_of(heading)] == [str(word) for word in SETS[heading]]


def test_every_set_of_words_has_its_table() -> None:
    """A new open set of the domain is explained as well."""
    sets = {each for each in vars(domain).values() if isinstance(each, type) and issubclass(each, StrEnum)}
    assert sets - {StrEnum, domain.Word} == set(SETS.values())


def test_aliases_and_the_reach_of_errors_are_as_in_the_code() -> None:
    """Each other spelling of an action is named, and each code says whether a chunk or the request fails."""
    for word, _, *_ in words_of("Actions"):
        row = next(" ".join(row) for row in words_of("Actions") if row[0] == word)
        named = set(re.findall(r"`([a-z._]+)`", row))
        aliases = {alias for alias, action in ACTION_ALIASES.items() if f"`{action}`" == word}
        assert aliases <= named, word
    for word, fails, *_ in words_of("Error codes"):
        assert fails == ("chunk" if ErrorCode(word.strip("`")) in CHUNK_ERRORS else "request"), word


def test_every_code_of_a_dead_letter_is_explained() -> None:
    """The codes are those that the code gives."""
    sources = (
        ROOT / "processor/adapters/avro.py",
        ROOT / "processor/adapters/avro_records.py",
        ROOT / "processor/pipeline.py",
    )
    given = {
        code
        for source in sources
        for code in re.findall(r'Undecodable\(DlqClass\.\w+, "(\w+)"\)', source.read_text(encoding="utf-8"))
    }
    assert given
    assert {code for row in words_of("Dead-letter classes") for code in re.findall(r"`(\w+)`", row[1])} == given


def test_every_word_for_a_fault_of_the_provider_is_explained() -> None:
    """Each code that an operator may meet in metrics and health says what the worker does about it."""
    classes = {
        name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, ProviderError)
    }
    explained = {word for row in words_of("Provider faults") for word in re.findall(r"`(\w+)(?:\.\.\.)?`", row[0])}
    found = set()
    for path in [ROOT / "processor/answers.py", *(ROOT / "processor/adapters").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
                match node.args[0]:
                    case ast.Constant(value=str(code)) | ast.JoinedStr(values=[ast.Constant(value=str(code)), *_]):
                        found.add(code)
    assert len(found) > 12
    assert found <= explained


NAMED_TESTS = sorted(
    {(page, test) for page, text in PAGES.items() for test in re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)}
)


@pytest.mark.parametrize("page, test", NAMED_TESTS)
def test_a_test_that_is_named_exists(page: str, test: str) -> None:
    """A guarantee whose test is gone is no guarantee."""
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions, page


def test_every_guarantee_names_its_test() -> None:
    """Each row of the tables of docs/guarantees.md ends in a test."""
    promises = PAGES["docs/guarantees.md"].partition("\n## What is not promised")[0]
    rows = [
        line for line in promises.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| promise"))
    ]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row), row


LINKS = sorted(
    {
        (page, target)
        for page, text in {**PAGES, "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in target
    }
)


@pytest.mark.parametrize("page, target", LINKS)
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    """File and heading of every link between our pages exist."""
    file, _, heading = target.partition("#")
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists()
    if heading:
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


NAMED_FILES = sorted(
    {
        (page, name)
        for page, text in PAGES.items()
        for name in re.findall(r"`((?:processor|tests|schemas|k8s|docs)/[\w/.-]+\.\w+)`", text)
    }
)


@pytest.mark.parametrize("page, name", NAMED_FILES)
def test_a_file_that_is_named_exists(page: str, name: str) -> None:
    """The map of the code is no older than the code."""
    assert (ROOT / name).is_file(), page


@pytest.mark.parametrize("page", PAGES)
def test_a_setting_that_is_named_exists(page: str) -> None:
    """Each EMBEDDING_ variable in the docs is one of settings.md."""
    known = set(re.findall(r"`(EMBEDDING_\w+)`", PAGES["docs/settings.md"]))
    assert set(re.findall(r"EMBEDDING_[A-Z0-9_]+", PAGES[page])) - {"EMBEDDING_"} <= known


def test_paths_are_relative() -> None:
    """No page knows the machine that it was written on."""
    for page, text in PAGES.items():
        assert str(Path.home()) not in text, page
