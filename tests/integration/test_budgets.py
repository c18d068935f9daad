"""Budgets from end to end: the file, the aggregator, the topic, the workers, on a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from processor.accounts import BudgetState, month_of
from processor.adapters import topics
from processor.adapters.clock import SystemClock
from processor.cli.audit import run_audit
from processor.domain import Request, Usage
from processor.spending import LAG_S
from tests.integration.test_worker import Running
from tests.support.audit import Books
from tests.support.brokers import Broker
from tests.support.builders import a_request
from tests.support.overshoot import measure_overshoot
from tests.support.provider_server import ProviderProcess
from tests.support.stack import Child, Stack, until
from tests.support.world import PATIENT, environment_of

BUDGETS = """
budgets:
  hard: {tokens: 10}
  soft: {tokens: 10, hard: false}
"""
LARGEST_REQUEST_TOKENS = 21_000
TEST_TAKES_MS = 300_000
RAISED = """
budgets:
  hard: {tokens: 1_000_000}
  soft: {dollars: 1, hard: false}
"""


class Budgeted(Running):
    """A worker of each lane and an aggregator that has read the file of budgets."""

    @property
    def worker(self) -> Child:
        return self.children[0]

    async def outcome(self, *requests: Request, topic: str = "requests") -> dict[str, str]:
        """Correlation id -> "ok" or the error code of its one chunk."""
        results = await self.request(*requests, topic=topic)
        return {each.correlation_id: each.error.code if each.error else each.status for each in results}

    async def refused(self, payers: int) -> None:
        """Wait until the bulk worker's view refuses so many."""

        def seen() -> bool:
            health = self.worker.get("/health/detailed")
            return health is not None and health["budgets"]["refused"] == payers

        await until(seen, within_s=120, what=f"the worker refuses {payers} payers")

    async def states(self) -> list[BudgetState]:
        """Every record of a payer that has spent anything, each payer's in their order."""
        states = [state for _, state in await self.read("budgets", BudgetState) if state.billed_tokens]
        return sorted(states, key=lambda state: state.key)


@pytest.fixture
async def budgeted(kafka: Broker, redis_url: str, unique: str, tmp_path: Path) -> AsyncIterator[Budgeted]:
    budgets = tmp_path / "budgets.yaml"
    budgets.write_text(BUDGETS, encoding="utf-8")
    with ProviderProcess() as provider:
        environment = environment_of(provider) | {
            "EMBEDDING_REDIS_URL": redis_url,
            "EMBEDDING_BUDGETS_FILE": str(budgets),
        }
        with Stack(tmp_path, unique, kafka.bootstrap_servers, **environment) as stack:
            await topics.create(stack.settings(), partitions=2, replication=1)
            children = [
                stack.spawn("worker", **PATIENT),
                stack.spawn("worker", "--lane", "interactive", **PATIENT),
                stack.spawn("aggregator"),
            ]
            for child in children:
                await until(child.ready, within_s=300, what=f"{child.name} is ready")
            yield Budgeted(stack, children)


@pytest.fixture(autouse=True)
async def within_a_month() -> None:
    """What was spent is forgotten at its end: a test does not go over that."""

    def ends_later() -> bool:
        now_ms = SystemClock().now_ms()
        return month_of(now_ms) == month_of(now_ms + TEST_TAKES_MS)

    await until(ends_later, within_s=2 * TEST_TAKES_MS / 1000, what="the month is over", every_s=1)


def newest(states: Sequence[BudgetState]) -> list[BudgetState]:
    return list({state.key: state for state in states}.values())


def asks(payer_id: str, correlation_id: str, text: str | None = None, action: str = "generate") -> Request:
    """A request of one text, by default one that nobody has asked for."""
    return a_request(
        [text or f"{payer_id} {correlation_id} says something of a few words that nobody said before"],
        tenant_id=payer_id,
        correlation_id=f"{payer_id}-{correlation_id}",
        action=action,
        document_id=None,
    )


async def test_a_hard_budget_refuses_a_soft_one_tells_and_both_follow_the_log(budgeted: Budgeted) -> None:
    """Over a hard limit bulk texts end as `budget_exceeded`, hits and queries pass; a restart recomputes the same; a
    raised limit releases."""
    known = "hard is allowed to say this sentence of more than ten tokens, and it costs all that there is"
    assert await budgeted.outcome(asks("hard", "1", known), asks("soft", "1"), asks("free", "1")) == {
        "hard-1": "ok",
        "soft-1": "ok",
        "free-1": "ok",
    }
    await budgeted.refused(1)
    assert await budgeted.outcome(
        asks("hard", "2"), asks("hard", "known", known), asks("soft", "2"), asks("free", "2")
    ) == {"hard-2": "budget_exceeded", "hard-known": "ok", "soft-2": "ok", "free-2": "ok"}
    query = asks("hard", "query", action="generate_query")
    assert await budgeted.outcome(query, topic="queries") == {"hard-query": "ok"}

    async def counted() -> bool:
        charges = [charge.usage for charge in Books(usage=await budgeted.read("usage", Usage)).charges()]
        charged = sum(usage.billed.tokens for usage in charges if usage.payer_id != "free")
        return charged == sum(state.billed_tokens for state in newest(await budgeted.states()))

    await until(counted, within_s=120, what="the states count every charge", every_s=0.3)
    before = await budgeted.states()
    assert {state.key.payer_id: state.reached_percent for state in newest(before)} == {"hard": 100, "soft": 100}

    aggregator = budgeted.children.pop()
    aggregator.kill()
    for path in budgeted.stack.folder.glob("aggregator.sqlite*"):
        path.unlink()
    aggregator = budgeted.stack.spawn("aggregator")
    await until(aggregator.ready, within_s=300, what="the aggregator is ready again")
    assert await budgeted.outcome(asks("hard", "3")) == {"hard-3": "budget_exceeded"}

    async def folded_anew() -> bool:
        report = await run_audit(budgeted.stack.settings())
        assert report.clean, report.fields()
        return report.budgets.compared and report.budgets.states >= 2 and report.ledger_differences is not None

    await until(folded_anew, within_s=300, what="the new store is at the end of the log", every_s=0.5)
    assert aggregator.stop() == 0, aggregator.tail()
    assert await budgeted.states() == before, "made again from the log, a state was another one"
    (budgeted.stack.folder / "budgets.yaml").write_text(RAISED, encoding="utf-8")
    aggregator = budgeted.stack.spawn("aggregator")
    await until(aggregator.ready, within_s=300, what="the aggregator is ready with its new file")
    await budgeted.refused(0)
    assert await budgeted.outcome(asks("hard", "4")) == {"hard-4": "ok"}

    async def both_are_within() -> bool:
        after = newest(await budgeted.states())
        return {state.key.payer_id: state.reached_percent for state in after} == {"hard": 0, "soft": 0}

    await until(both_are_within, within_s=120, what="both states are of the raised limits", every_s=0.3)


@pytest.mark.parametrize(
    "workers, read_ahead_bytes",
    [(1, 128 * 2**20), (1, 2**20), (3, 2**20)],
    ids=["in one burst", "a little at a time", "three workers"],
)
async def test_a_backlog_of_many_budgets_hardly_overshoots(
    kafka: Broker, tmp_path: Path, tell: Callable[[str], None], workers: int, read_ahead_bytes: int
) -> None:
    """What is in work counts before it is charged: each worker may spend what is left, with the request that reaches
    the limit, and again where no state comes for as long as it waits for one."""
    with ProviderProcess("--base-ms", "50", "--per-text-ms", "1") as provider:
        found = await measure_overshoot(
            kafka,
            provider,
            tmp_path,
            texts=6_000,
            budget_tokens=50_000,
            workers=workers,
            EMBEDDING_SESSION_TIMEOUT_S="30",
            EMBEDDING_READ_AHEAD_BYTES=str(read_ahead_bytes),
        )
        billed = provider.admin("ledger")["billed_tokens"]
    tell(f"{workers} workers: {found}, beyond the budget {found.tokens}")
    # Those that join while others work may do again what these have been billed for.
    assert found.charged_tokens == billed if workers == 1 else found.charged_tokens <= billed
    rounds = 1 + found.told_s // LAG_S
    assert 0 <= found.tokens < workers * (rounds * found.budget_tokens + LARGEST_REQUEST_TOKENS)
    assert found.refused_texts > 0
