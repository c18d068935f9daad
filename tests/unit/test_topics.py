"""What is demanded of topics, and how clients connect: by description alone, without a broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from processor.adapters.avro_records import WIRE_NAME
from processor.adapters.kafka import connection
from processor.adapters.topics import DAY_MS, Live, Severity, judge, subjects, topics
from processor.errors import SettingsError
from processor.settings import Settings, load

ALL = sorted(topics())


def findings(topic: str, config: dict[str, Any] | None = None, **settings: Any) -> list[tuple[str, str]]:
    """(severity, what) of a topic that is as described but for `config` (None: the setting is not reported)."""
    described = topics()[topic]
    merged = dict[str, Any](described.config) | (config or {})
    live = Live(described.partitions, {name: str(value) for name, value in merged.items() if value is not None})
    return [(finding.severity.value, finding.what) for finding in judge(described, live, Settings(**settings))]


@pytest.mark.parametrize("topic", ALL)
def test_a_topic_as_described_is_right(topic: str) -> None:
    """What `topics create` makes passes the check with default settings."""
    assert findings(topic) == []


@pytest.mark.parametrize("topic", ALL)
def test_a_missing_topic_is_an_error_with_its_command(topic: str) -> None:
    """The finding names the full topic and how to make it."""
    (finding,) = judge(topics()[topic], None, Settings(topic_prefix="dev-"))
    assert finding.topic == f"dev-{topics()[topic].name}"
    assert (finding.severity, "topics create" in finding.fix) == (Severity.ERROR, True)


@pytest.mark.parametrize("topic", ALL)
def test_the_wrong_cleanup_policy_is_an_error(topic: str) -> None:
    """Compaction would lose requests and charges; deletion would lose state."""
    ours = topics()[topic].config["cleanup.policy"]
    for other in ({"delete", "compact"} - {ours}) | {"compact,delete"}:
        assert [severity for severity, _ in findings(topic, {"cleanup.policy": other})] == ["error"]


@pytest.mark.parametrize("topic", ["requests", "queries", "usage", "calls"])
@pytest.mark.parametrize("stamp", ["CreateTime", None])
def test_a_clients_clock_is_refused_unless_relaxed(topic: str, stamp: str | None) -> None:
    """Times of charge are the broker's; the embedded broker's user is told that they are not."""
    config = {"message.timestamp.type": stamp}
    assert [severity for severity, _ in findings(topic, config)] == ["error"]
    assert [severity for severity, _ in findings(topic, config, require_log_append_time=False)] == ["warning"]


@pytest.mark.parametrize("topic", ["usage", "calls"])
@pytest.mark.parametrize("days,severities", [(99, ["error"]), (100, []), (5_000, [])])
def test_the_ledger_is_kept_twice_the_horizon_and_a_month(topic: str, days: int, severities: list[str]) -> None:
    """A copy within the horizon must find the charge that it repeats, and audits need what they add up."""
    assert [severity for severity, _ in findings(topic, {"retention.ms": days * DAY_MS})] == severities


def test_a_longer_horizon_needs_a_longer_log() -> None:
    """The demand follows the setting."""
    assert [severity for severity, _ in findings("usage", horizon_days=36)] == ["error"]
    assert findings("usage", {"retention.ms": -1}, horizon_days=3_600) == []


@pytest.mark.parametrize("topic", ["usage", "calls"])
def test_the_ledger_is_not_bounded_in_bytes(topic: str) -> None:
    """A log that forgets by size forgets charges on a busy day."""
    assert [severity for severity, _ in findings(topic, {"retention.bytes": 10**9})] == ["error"]
    assert findings(topic, {"retention.bytes": -1}) == []


@pytest.mark.parametrize("topic", sorted(set(ALL) - {"requests", "queries"}))
def test_what_we_write_must_fit(topic: str) -> None:
    """A record of the largest allowed size is accepted, or the start is refused."""
    assert [severity for severity, _ in findings(topic, {"max.message.bytes": 1_000_000})] == ["error"]
    assert findings(topic, {"max.message.bytes": 1_048_588}) == []
    assert [severity for severity, _ in findings(topic, max_record_bytes=3_000_000)] == ["error"]


def test_manifests_outlive_an_absent_aggregator() -> None:
    """The lag before compaction must not be cut short."""
    assert [severity for severity, _ in findings("documents", {"min.compaction.lag.ms": 0})] == ["error"]


def test_a_short_retention_elsewhere_is_only_said() -> None:
    """How long results are kept is the operator's choice."""
    assert [severity for severity, _ in findings("results", {"retention.ms": 1_000})] == ["warning"]


def test_values_are_records_of_ours() -> None:
    """Each topic but the dead letters' names the schema of its values."""
    assert {record for _, record in subjects(Settings())} == set(WIRE_NAME.values())
    assert {topic.id for topic in topics().values()} - {"dlq"} == {
        topic.id for topic in topics().values() if topic.name in dict(subjects(Settings()))
    }


def test_a_topic_prefix_is_part_of_every_subject() -> None:
    """Two installations that share a registry keep apart."""
    assert all(name.startswith("dev-") for name, _ in subjects(Settings(topic_prefix="dev-")))


def test_a_plain_connection_names_brokers_alone() -> None:
    """Without security settings there is nothing to hand over."""
    options = connection(Settings(bootstrap_servers="a:1,b:2"))
    assert options == {"bootstrap_servers": "a:1,b:2", "security_protocol": "PLAINTEXT"}


def test_sasl_takes_its_password_from_a_file(tmp_path: Path) -> None:
    """A mounted secret is read, its line end cut."""
    (tmp_path / "password").write_text("secret\n")
    options = connection(
        Settings(
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="SCRAM-SHA-512",
            sasl_username="user",
            sasl_password_file=tmp_path / "password",
        )
    )
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("user", "secret")


def test_tls_checks_the_brokers_name_and_certificate() -> None:
    """Encryption without verification is never offered."""
    context = connection(Settings(security_protocol="SSL"))["ssl_context"]
    assert (context.check_hostname, context.verify_mode.name) == (True, "CERT_REQUIRED")


@pytest.mark.parametrize(
    "options,named",
    [
        ({"security_protocol": "TLS"}, "SECURITY_PROTOCOL"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI"}, "SASL_MECHANISM"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "u"}, "SASL_PASSWORD"),
        ({"security_protocol": "SSL", "ssl_ca_file": "/nowhere"}, "SSL_CA_FILE"),
        ({"security_protocol": "SSL", "ssl_cert_file": "/nowhere"}, "SSL_CERT_FILE"),
        ({"security_protocol": "SSL", "ssl_key_file": "/nowhere"}, "SSL_CERT_FILE"),
    ],
)
def test_a_connection_that_can_not_work_names_its_setting(options: dict[str, Any], named: str) -> None:
    """The operator reads which setting to mend."""
    with pytest.raises(SettingsError, match=f"EMBEDDING_{named}"):
        connection(load(**options))
