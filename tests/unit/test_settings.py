"""Settings: each has an effect, and what can't work together is refused at start."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest

import processor
from processor.errors import SettingsError
from processor.settings import DAY_S, Settings, load


def test_every_setting_has_an_effect() -> None:
    """A setting that nothing reads would promise what it does not keep."""
    read: set[str] = set()
    for path in Path(processor.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "secret":
                read |= {
                    word for each in node.args for word in (ast.literal_eval(each), f"{ast.literal_eval(each)}_file")
                }
    assert set(Settings.model_fields) <= read


def test_what_is_served_fits_into_a_record() -> None:
    """Else a request that is taken would make a result that can't be sent."""
    with pytest.raises(SettingsError, match="EMBEDDING_MAX_REQUEST_BYTES"):
        load(max_request_bytes=950_001)
    assert load(max_request_bytes=950_000).max_request_bytes == 950_000


def test_who_paid_is_forgotten_before_a_charge_is() -> None:
    """Else a request sent again would be charged once more to a call that was billed once."""
    with pytest.raises(SettingsError, match="EMBEDDING_CACHE_TTL_S"):
        load(horizon_days=36, cache_ttl_s=18 * DAY_S + 1)
    assert load(horizon_days=36, cache_ttl_s=18 * DAY_S).cache_ttl_s == 18 * DAY_S


@pytest.mark.parametrize(
    "types, taken", [("", False), ("input,output", False), ("input, embedding", True), ("*", True)]
)
def test_our_own_charges_are_always_totalled(types: str, taken: bool) -> None:
    """Else no budget would bind, and the ledger would call all that was billed a residual."""
    with nullcontext() if taken else pytest.raises(SettingsError, match="EMBEDDING_USAGE_TOKEN_TYPES: must name"):
        assert load(usage_token_types=types).usage_token_types == tuple(types.split(", "))


def test_no_secret_is_in_a_repr() -> None:
    """Law 7: an address may carry a user's password, and a traceback may quote the settings."""
    secrets = [name for name in Settings.model_fields if f"{name}_file" in Settings.model_fields]
    of_urls = {name: f"http://user:canary-{name}@host" for name in ("redis_url", "schema_registry_url")}
    settings = load(**dict.fromkeys(secrets, "canary"), **of_urls)
    assert len(secrets) > 4
    assert "canary" not in f"{settings!r}{settings}"


def test_every_tenant_has_a_share() -> None:
    """A weight of 0 would be a tenant that is never served."""
    with pytest.raises(SettingsError, match="EMBEDDING_TENANT_WEIGHTS"):
        load(tenant_weights={"acme": 0})
    assert load(tenant_weights={"acme": 3}).tenant_weights == {"acme": 3}
