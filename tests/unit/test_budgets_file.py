"""The file of budgets: exact amounts, and every fault at once."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.accounts import Budget, BudgetPlan
from processor.adapters.budgets_file import MAX_LONG, read_budgets_file
from processor.errors import SettingsError


def read(path: Path, text: str) -> BudgetPlan:
    path.write_text(text, encoding="utf-8")
    return read_budgets_file(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budgets.yaml"


def test_payers_have_what_is_written(path: Path) -> None:
    """Tokens, dollars or both, hard unless said otherwise; the default is for whoever is not named."""
    plan = read(
        path,
        """
        budgets:
          acme: {tokens: 5_000_000, dollars: 12.50}
          "42": {dollars: "0.000000001", hard: false}
        default: {tokens: 10}
        """,
    )
    assert plan.of("acme") == Budget(max_tokens=5_000_000, max_cost_nanos=12_500_000_000, hard=True)
    assert plan.of("42") == Budget(max_tokens=None, max_cost_nanos=1, hard=False)
    assert plan.of("else") == Budget(max_tokens=10, max_cost_nanos=None, hard=True)


def test_without_a_file_nobody_has_a_budget(path: Path) -> None:
    """Nor has who is not named where there is no default."""
    assert read_budgets_file(None).of("acme") is None
    assert read(path, "budgets: {acme: {tokens: 1}}").of("else") is None


@given(nanos=st.integers(1, 10**15 - 1))
def test_dollars_are_exact(nanos: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Up to fifteen digits as a number, any amount in quotes: never a nano-dollar more or less."""
    path = tmp_path_factory.getbasetemp() / "exact.yaml"
    amount = f"{Decimal(nanos).scaleb(-9):f}"
    wanted = Budget(max_tokens=None, max_cost_nanos=nanos, hard=True)
    assert read(path, f"default: {{dollars: {amount}}}").default == wanted
    assert read(path, f'default: {{dollars: "{amount}"}}').default == wanted


@pytest.mark.parametrize(
    "fields, fault",
    [
        ("{tokens: 0}", "tokens: Input should be greater than 0"),
        ("{tokens: 1.5}", "tokens: Input should be a valid integer"),
        ("{tokens: '5'}", "tokens: Input should be a valid integer"),
        (f"{{tokens: {MAX_LONG + 1}}}", "tokens: Input should be less than or equal to"),
        ("{dollars: 0}", "dollars: must be greater than 0"),
        ("{dollars: -1}", "dollars: must be greater than 0"),
        ("{dollars: .nan}", "dollars: must be greater than 0"),
        ("{dollars: .inf}", "dollars: must be greater than 0"),
        ("{dollars: true}", "dollars: must be an amount such as 12.50"),
        ("{dollars: much}", "dollars: must be an amount such as 12.50"),
        ("{dollars: [1]}", "dollars: must be an amount such as 12.50"),
        ("{dollars: 1.0000000001}", "dollars: must have at most nine digits after the point"),
        ("{dollars: 123456789.123456789}", "dollars: has more than 15 digits; put it in quotes"),
        ("{dollars: 10000000000}", "dollars: must be at most 9223372036"),
        ("{dollars: '1e999999999'}", "dollars: must be at most 9223372036"),
        ("{dollars: '9223372036.854775808'}", "dollars: must be at most 9223372036"),
        ("{dollars: '1e-999999999'}", "dollars: must have at most nine digits after the point"),
        (f"{{dollars: '1.{'0' * 40}1'}}", "dollars: must have at most nine digits after the point"),
        (f"{{dollars: 0x{'f' * 9_999}}}", "dollars: must be at most 9223372036"),
        ("{hard: true}", "names no limit; give it tokens, dollars or both"),
        ("{}", "names no limit"),
        ("", "must be a mapping such as"),
        ("5", "must be a mapping such as"),
        ("{tokens: 5, euros: 5}", "euros: Extra inputs are not permitted"),
        ("{tokens: 5, hard: maybe}", "hard: Input should be a valid boolean"),
    ],
)
def test_what_can_not_be_meant_is_refused(path: Path, fields: str, fault: str) -> None:
    """By setting, file, payer and field."""
    with pytest.raises(SettingsError) as refused:
        read(path, f"budgets:\n  acme: {fields}\n")
    assert f"EMBEDDING_BUDGETS_FILE: {path}: budgets.acme" in str(refused.value)
    assert fault in str(refused.value)


def test_all_faults_are_told_together(path: Path) -> None:
    """One start shows every line to mend."""
    with pytest.raises(SettingsError) as refused:
        read(path, "budgets: {acme: {tokens: 0, dollars: x}, 7: {tokens: 1}}\ndefault: {}\nlimits: 1\n")
    lines = str(refused.value).splitlines()
    assert [line.removeprefix(f"EMBEDDING_BUDGETS_FILE: {path}: ").split(":")[0] for line in lines] == [
        "limits",
        "budgets.acme.tokens",
        "budgets.acme.dollars",
        "budgets.7",
        "default",
    ]


@pytest.mark.parametrize("text", ["", "{}", "- acme", "budgets: [acme]", "budgets:", "a: b: c"])
def test_a_file_of_no_budgets_is_a_mistake(path: Path, text: str) -> None:
    """Who names a file means some."""
    with pytest.raises(SettingsError, match="EMBEDDING_BUDGETS_FILE"):
        read(path, text)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("budgets:\n  acme: {tokens: 5}\n  acme: {tokens: 6}", "has acme twice, line 3"),
        ("default: {tokens: 5, tokens: 6}", "has tokens twice, line 1"),
        (f"default: {{tokens: {'1' * 5_000}}}", "is no YAML"),
        ("default: {dollars: 2026-13-45}", "is no YAML"),
        ("[" * 5_000, "is no YAML"),
        ("default: {tokens", "is no YAML, line 1"),
    ],
)
def test_what_yaml_itself_can_not_take_is_told(path: Path, text: str, fault: str) -> None:
    """Without a traceback, and no payer's second entry replaces the first unseen."""
    with pytest.raises(SettingsError) as refused:
        read(path, text)
    assert str(refused.value) == f"EMBEDDING_BUDGETS_FILE: {path}: {fault}"


def test_entries_can_be_taken_over(path: Path) -> None:
    """To merge a mapping and say some of it anew is not to say it twice."""
    plan = read(path, "default: &usual {tokens: 5, hard: false}\nbudgets: {a: &a {<<: *usual, tokens: 6}, b: {<<: *a}}")
    assert plan.of("a") == plan.of("b") == Budget(max_tokens=6, max_cost_nanos=None, hard=False)


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    """So that a mount that is missing does not lift every budget."""
    with pytest.raises(SettingsError, match="can't be read"):
        read_budgets_file(path)
