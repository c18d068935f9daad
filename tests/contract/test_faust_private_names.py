"""What we rely on inside faust and aiokafka, so that an upgrade fails here and not in production.

When one of these breaks: read the upstream change, then what of ours the failure names (`look_at` of
`processor/adapters/private_names.py`), and run tests/integration/test_engine.py before anything is believed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from aiokafka.consumer import fetcher, group_coordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from faust.app.base import App
from faust.tables.recovery import Recovery
from faust.transport import consumer as faust_consumer
from faust.transport.drivers import aiokafka as driver

from processor.adapters.faust_engine.consumer import Consumer, Producer
from processor.adapters.faust_engine.thread import ConsumerThread, Listener
from processor.adapters.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]
NAMES = [(owner, name) for owner, relied in PRIVATE_NAMES.items() for name in relied.names]
PUBLIC = {"aiokafka", "aiokafka.admin", "aiokafka.admin.config_resource", "aiokafka.errors", "aiokafka.structs"}
"""What aiokafka documents. Its partitioner is used as the judge of ours, faust's types and drivers as bases."""

BASES = {"aiokafka.partitioner", "faust", "faust.transport.drivers", "faust.types", "mode.types"}


def resolve(owner: str) -> Any:
    module, _, name = owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def has(owner: Any, name: str) -> bool:
    """As an attribute of the class, an annotation, or something that its __init__ sets."""
    if hasattr(owner, name) or any(name in inspect.get_annotations(base) for base in getattr(owner, "__mro__", ())):
        return True
    body = inspect.getsource(owner.__init__) if inspect.isclass(owner) else ""
    return f"self.{name} =" in body or f"self.{name}:" in body


@pytest.mark.parametrize("owner, name", NAMES)
def test_a_private_name_is_still_there(owner: str, name: str) -> None:
    """Each name that is overridden or used exists in the pinned version."""
    assert has(resolve(owner), name), f"{owner} has no {name} any more; look at {PRIVATE_NAMES[owner].look_at}"


def test_a_name_that_is_gone_is_noticed() -> None:
    """Control case of the one above."""
    assert not has(resolve("faust.transport.consumer:Consumer"), "_no_such_name")


def test_the_versions_are_the_ones_that_were_read() -> None:
    """A new version is not adopted without reading it: change this line last."""
    assert (version("faust-streaming"), version("aiokafka")) == ("0.15.3", "0.14.0")


@pytest.mark.parametrize(
    "ours, theirs",
    [(Consumer, driver.Consumer), (ConsumerThread, driver.AIOKafkaConsumerThread), (Producer, driver.Producer)],
)
def test_overrides_take_what_the_originals_take(ours: Any, theirs: Any) -> None:
    """A changed signature upstream would be called in the upstream way."""
    for name, method in vars(ours).items():
        original = getattr(theirs, name, None)
        if inspect.isfunction(method) and inspect.isfunction(original) and not name.startswith("__"):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(original).parameters), name


def source(function: Any) -> str:
    return dedent(inspect.getsource(function))


def test_the_listener_is_called_before_the_group_is_joined() -> None:
    """Partitions are given up between the beginning of a reassignment and the JoinGroup request."""
    prepare = source(group_coordinator.GroupCoordinator._on_join_prepare)
    assert prepare.index("begin_reassignment") < prepare.index("listener.on_partitions_revoked")
    active = source(group_coordinator.GroupCoordinator.ensure_active_group)
    assert active.index("_on_join_prepare") < active.index("_do_rejoin_group")
    assert not inspect.iscoroutinefunction(Listener.on_partitions_revoked)


def test_heartbeats_and_joins_pass_through_one_function() -> None:
    """The session is watched there: a request that goes another way would not renew it."""
    assert "self._send_req(request)" in source(group_coordinator.GroupCoordinator._do_heartbeat)
    assert "self._coordinator._send_req(request)" in source(
        group_coordinator.CoordinatorGroupRebalance._send_sync_group_request
    )


def test_a_seek_discards_what_was_fetched_for_another_position() -> None:
    """Seeking back is enough: neither buffered records nor a response under way are returned afterwards."""
    assert "position != self._partition_records.next_fetch_offset" in source(fetcher.FetchResult.check_assignment)
    assert "tp_state.position != fetch_offset" in source(fetcher.Fetcher._proc_fetch_request)


def test_an_automatic_position_never_overrides_a_seek() -> None:
    """aiokafka's own search for a position looks again after each wait whether there is one by now."""
    update = source(fetcher.Fetcher._update_fetch_positions)
    assert update.count("tp_state.has_valid_position or tp_state.awaiting_reset") == 2
    assert "if tp_state.awaiting_reset:" in update


def test_faust_waits_for_us_between_stopping_the_flow_and_the_rebalance() -> None:
    """`wait_empty` is where leases are released; it is awaited with the flow stopped and the queues cleared."""
    revoked = source(App._on_partitions_revoked)
    order = ["(consumer.stop_flow)", "(self.flow_control.suspend)", "(self.flow_control.clear)", "_consumer_wait_empty"]
    assert [revoked.index(name) for name in order] == sorted(revoked.index(name) for name in order)


def test_faust_resumes_the_flow_without_looking_at_the_generation_again() -> None:
    """Why the flow alone is no leave to fetch but `_assigned_generation` is: if this fails, that may be simplified."""
    resume = source(Recovery._resume_streams)
    assert resume.index("consumer_generation_id != generation_id") < resume.index("perform_seek")
    assert "generation" not in resume[resume.index("perform_seek") :]


def test_the_reassignment_flag_is_a_property() -> None:
    """It is read in the consumer's thread to tell whether a rebalance has begun."""
    assert isinstance(inspect.getattr_static(SubscriptionState, "reassignment_in_progress"), property)


def trees() -> list[ast.Module]:
    """Every module that imports faust, mode or aiokafka."""
    parsed = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "processor").rglob("*.py")]
    return [tree for tree in parsed if any(theirs(tree))]


def theirs(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of what is imported of them."""
    froms = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return [
        (node.module, alias.name)
        for node in froms
        if node.module and node.module.split(".")[0] in {"aiokafka", "faust", "mode"}
        for alias in node.names
    ]


def test_every_private_name_in_use_is_listed() -> None:
    """A new dependence on an internal can't slip in: what begins with an underscore on others is in the list."""
    listed = {name for relied in PRIVATE_NAMES.values() for name in relied.names}
    used = set[str]()
    own = set[str]()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own.add(node.name)
    assert used - own - listed <= {"_exit", "_asdict", "_replace"}  # of os, of named tuples


def test_every_import_beyond_the_documented_ones_is_listed() -> None:
    """What is imported from inside aiokafka or faust is in the list, whatever it is called."""
    deep = {each for tree in trees() for each in theirs(tree) if each[0] not in PUBLIC | BASES}
    listed = {(owner, name) for owner, name in NAMES if ":" not in owner}
    assert deep - listed == set()


def test_nothing_is_listed_that_nobody_uses() -> None:
    """The list stays as short as the dependence is."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "processor" / "adapters").rglob("*.py")]
    code = "".join(text for text in texts if "PRIVATE_NAMES: Mapping" not in text)
    assert [name for _, name in NAMES if name not in code] == []


def table() -> list[str]:
    """The rows of the ADR."""
    return [
        f"| `{owner}` | {', '.join(f'`{name}`' for name in relied.names)} | {relied.look_at} |"
        for owner, relied in PRIVATE_NAMES.items()
    ]


def test_the_adr_shows_the_list() -> None:
    """Who decides about an upgrade reads what it touches; the rows are those of `table`."""
    adr = (ROOT / "docs" / "adr" / "0001-faust.md").read_text(encoding="utf-8")
    _, _, promised_by_nobody = adr.partition("| of | names | look at |\n| --- | --- | --- |\n")
    assert promised_by_nobody.splitlines() == table()


def test_the_way_out_stays_as_short_as_the_adr_says() -> None:
    """Less than 300 lines stand between this and plain aiokafka; the engine's integration suites run on them."""
    assert len((ROOT / "tests" / "support" / "plain_engine.py").read_text(encoding="utf-8").splitlines()) < 300


def test_faust_asks_for_a_commit_at_each_interval() -> None:
    """`force_commit` is ours; the timer and the guard around it are Faust's."""
    assert "self.commit()" in source(inspect.getattr_static(faust_consumer.Consumer, "_commit_handler").fun)
    assert "self.force_commit(" in source(faust_consumer.Consumer.commit)
