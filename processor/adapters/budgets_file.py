"""The file of budgets: what each payer may spend in a month (`docs/budgets.md`)."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from processor.accounts import Budget, BudgetPlan
from processor.adapters.yaml_files import read_yaml
from processor.errors import SettingsError

SETTING = "EMBEDDING_BUDGETS_FILE"
MAX_LONG = 2**63 - 1
NANOS = 1_000_000_000
ONE_NANO = Decimal("1e-9")
TOO_MUCH = f"must be at most {MAX_LONG // NANOS}"
EXACT_DIGITS = 15
"""A number with a point that has more of them may not be the one that was written."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens: int | None = Field(None, gt=0, le=MAX_LONG)
    dollars: int | None = None
    """In nano-dollars from here on."""
    hard: bool = True

    @field_validator("dollars", mode="before")
    @classmethod
    def _in_nanos(cls, value: Any) -> int | None:
        return None if value is None else _nanos(value)

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.tokens is None and self.dollars is None:
            raise ValueError("names no limit; give it tokens, dollars or both")
        return self

    def budget(self) -> Budget:
        return Budget(max_tokens=self.tokens, max_cost_nanos=self.dollars, hard=self.hard)


def read_budgets_file(path: Path | None) -> BudgetPlan:
    """The budgets; none without a file. SettingsError with every fault, by payer and field."""
    if path is None:
        return BudgetPlan()
    content = read_yaml(path, SETTING)
    if not isinstance(content, dict) or not isinstance(content.get("budgets", {}), dict):
        raise SettingsError(f"{SETTING}: {path}: must be a mapping with `budgets`, `default` or both")
    faults = [f"{key}: is neither `budgets` nor `default`" for key in content if key not in {"budgets", "default"}]
    if not content:
        faults.append("holds no budget; unset the setting, or name one under `budgets` or `default`")
    named: dict[str, Budget] = {}
    for payer_id, fields in content.get("budgets", {}).items():
        if not isinstance(payer_id, str) or not payer_id:
            faults.append(f"budgets.{payer_id}: a payer is a text that is not empty; put it in quotes")
        elif (budget := _budget(f"budgets.{payer_id}", fields, faults)) is not None:
            named[payer_id] = budget
    default = _budget("default", content["default"], faults) if "default" in content else None
    if faults:
        raise SettingsError("\n".join(f"{SETTING}: {path}: {fault}" for fault in faults))
    return BudgetPlan(named=named, default=default)


def _budget(name: str, fields: Any, faults: list[str]) -> Budget | None:
    try:
        return _Entry.model_validate(fields).budget()
    except ValidationError as error:
        faults += (f"{name}{what}" for what in _faults(error))
        return None


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False):
        field = "".join(f".{part}" for part in fault["loc"])
        said = "must be a mapping such as {dollars: 12.50}" if fault["type"] == "model_type" else fault["msg"]
        yield f"{field}: {said.removeprefix('Value error, ')}"


def _nanos(dollars: Any) -> int:
    """Exactly what is written; ValueError says what is wrong."""
    if isinstance(dollars, bool) or not isinstance(dollars, int | float | str):
        raise ValueError("must be an amount such as 12.50")
    try:
        amount = Decimal(dollars if isinstance(dollars, int) else str(dollars))
    except InvalidOperation:
        raise ValueError("must be an amount such as 12.50") from None
    if not amount.is_finite() or amount <= 0:
        raise ValueError("must be greater than 0")
    if isinstance(dollars, float) and len(amount.as_tuple().digits) > EXACT_DIGITS:
        raise ValueError(f"has more than {EXACT_DIGITS} digits; put it in quotes")
    if amount > MAX_LONG // NANOS + 1:  # before it is made exact: 1e999999999 would take all memory
        raise ValueError(TOO_MUCH)
    nanos = Fraction(amount) * NANOS if amount >= ONE_NANO else Fraction(0)
    if nanos > MAX_LONG:
        raise ValueError(TOO_MUCH)
    if nanos < 1 or nanos.denominator != 1:
        raise ValueError("must have at most nine digits after the point")
    return int(nanos)
