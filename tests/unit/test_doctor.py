"""What the doctor says of files that a process reads at start."""

from __future__ import annotations

from pathlib import Path

from processor.cli.doctor import examine
from processor.settings import load


async def test_a_secret_that_can_not_be_read_is_named() -> None:
    """A worker would not start with it, with Redis or without; nothing else is looked at then."""
    for name in ("cache_secret_file", "cache_secret_former_file"):
        checks = [check async for check in examine(load(**{name: Path("no-such-file")}))]
        assert [(check.name, check.state) for check in checks] == [("settings", "error")]
        assert f"EMBEDDING_{name.upper()}" in checks[0].what


async def test_budgets_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    """An aggregator would not start with them."""
    path = tmp_path / "budgets.yaml"
    for content, state in (("budgets: {acme: {tokens: 5}}", "ok"), ("budgets: {acme: {tokens: -5}}", "error")):
        path.write_text(content)
        async for check in examine(load(budgets_file=path)):
            if check.name == "budgets":
                break
        assert check.state == state
        assert ("budgets.acme.tokens" in check.what) is (state == "error")
