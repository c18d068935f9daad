"""The table of every setting as Markdown, made from the settings themselves."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo

from processor.settings import PREFIX, Settings

UNITS = {"_ms": "ms", "_s": "s", "_bytes": "bytes", "_days": "days", "_tokens": "tokens", "_texts": "texts"}

INTRODUCTION = """\
# Settings

Environment variables, also read from a file `.env` in the working directory. Lists are separated by commas. A wrong
one stops the start, and all of them are reported together; `embedding-processor doctor` checks them too.

This page is made by `embedding-processor settings`.
"""


def environment_names(name: str, field: FieldInfo) -> list[str]:
    """The variables that set it, ours first."""
    if isinstance(field.validation_alias, AliasChoices):
        return [str(choice) for choice in field.validation_alias.choices]
    return [PREFIX + name.upper()]


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(variable, unit, default, meaning) of each setting, in the order of the code."""
    for name, field in Settings.model_fields.items():
        ours, *others = environment_names(name, field)
        unit = next((word for suffix, word in UNITS.items() if name.endswith(suffix)), "")
        also = f" Also `{'`, `'.join(others)}`." if others else ""
        yield ours, unit, _default(field), f"{field.description}{also}"


def markdown() -> str:
    """The page docs/settings.md."""
    lines = [INTRODUCTION, "| variable | unit | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {unit} | {default} | {meaning} |" for name, unit, default, meaning in rows()]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    match value:
        case SecretStr():
            value = value.get_secret_value()
        case bool():
            value = str(value).lower()
        case tuple():
            value = ",".join(value)
    return f"`{value}`" if value not in (None, "", {}) else ""
