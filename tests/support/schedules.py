"""Random schedules of the whole protocol: some workers on one log, and everything that can go wrong between them.

A schedule is a seed: the same one runs the same way again. The steps, the codec, L1 before L2 and the aggregator with
its store are real, what they talk to is in `far_ends.py`, and what is left at the end is for the checker (`audit/`).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from processor.accounts import Budget, BudgetPlan, LedgerSummary, UsageTotal
from processor.domain import Chunk, ProviderCall, Request, Usage
from processor.errors import DeliveryFailed
from tests.support import aggregation, audit, ledgers
from tests.support.builders import a_request
from tests.support.far_ends import (
    BUDGETED,
    PARTITIONS,
    POISON,
    PRICES,
    Account,
    Emission,
    Ends,
    Group,
    Hazards,
    Luck,
    OutputLog,
    RequestLog,
    SharedCache,
    Spent,
    the_vector,
)
from tests.support.simulated import GroupLease, Process
from tests.support.steps import VirtualClock

DAY_S = 86_400
TOO_LONG = "endless " * 11
NONSENSE = "nonsense"

BUDGETS = BudgetPlan(
    named={BUDGETED: Budget(max_tokens=20, max_cost_nanos=None, hard=True)},
    default=Budget(max_tokens=40, max_cost_nanos=500, hard=False),
)
"""What the aggregator holds all of it against; the workers know of others."""

Sending = tuple[Request, int, float | None]
"""A request, the partition it is sent to, and the seconds that it may take."""

WILD = Hazards()
SHARED = Hazards(shared_cache=True)
CALM = Hazards(zombies=False, cache_loss=False, deadlines=False, budgets=False, months=False, tenants_roam=False)
"""U7: the cache kept, no zombies, no two workers on one key."""
STEADY = Hazards(crashes=False, zombies=False, cache_loss=False, months=False, tenants_roam=False)
"""Every record is read once, by who reads all of its tenant's."""


@dataclass(slots=True, repr=False)  # whoever prints a task would print it
class Ended:
    """What a schedule left behind, for the checker."""

    books: audit.Books
    ledger: LedgerSummary
    committed_early: Sequence[tuple[int, int]]
    """Partitions and offsets (law 2)."""
    happened: Mapping[str, int]
    unexplained: Sequence[object]
    """What `usage audit` finds of the same log (law: nothing)."""


class World:
    """One schedule. `run` plays it to its end, at which everything sent is done and folded."""

    def __init__(self, seed: int, hazards: Hazards = WILD, emission: Emission | None = None) -> None:
        self.clock = VirtualClock()
        luck = self.luck = Luck(seed, hazards, self.clock)
        requests, output = RequestLog(), OutputLog()
        self.group = Group(requests, output)
        self.ends = Ends(
            luck, requests, output, self.group, SharedCache(luck), Account(luck), Spent(luck), emission or Emission()
        )
        self.processes: list[Process] = []
        self._broken: list[BaseException] = []
        self._dying: list[Process] = []
        self._moves: dict[int, asyncio.Task[None]] = {}
        """By partition: no other begins before it is over."""
        self._months = luck.dice.choice([0, 0, 0, 0, 2]) if hazards.months else 0
        self._incarnations = itertools.count()
        self._unsent = list(_traffic(luck.dice, hazards))
        self._sent: list[Sending] = []

    async def run(self) -> Ended:
        try:
            self.processes = [self._started(f"w{n}") for n in range(self.luck.dice.randint(2, 3))]
            for partition in range(PARTITIONS):
                self._assign(partition)
            for _ in range(self.luck.dice.randint(60, 160)):
                await self._step()
            await self._finish()
        finally:
            for move in self._moves.values():
                move.cancel()
            for process in self.processes:
                await process.crash()
        return await self._closed()

    def _started(self, name: str) -> Process:
        return Process(self.ends, name, next(self._incarnations), self._ended)

    def _ended(self, process: Process, error: BaseException) -> None:
        """A worker ends its process: for a broker that does not acknowledge, or for a bug."""
        if not isinstance(error, DeliveryFailed):
            self._broken.append(error)
        self._dying.append(process)

    async def _step(self) -> None:
        hazards, dice = self.luck.hazards, self.luck.dice
        weights = {
            "send": 30.0,
            "turns": 40,
            "time": 20,
            "commit": 5,
            "late": 1,
            "crash": 2 if hazards.crashes else 0,
            "move": 2 if hazards.tenants_roam else 0,
            "steal": 2 if hazards.zombies else 0,
            "forget": 2 if hazards.cache_loss else 0,
            "budget": 2 if hazards.budgets else 0,
            "months": self._months,
        }
        action = dice.choices(list(weights), list(weights.values()))[0]
        self.luck.happened[action] += 1
        match action:
            case "send":
                self._send(dice.randint(1, 3))
            case "turns":
                for _ in range(dice.randint(1, 15)):
                    await asyncio.sleep(0)
            case "time":
                self.clock.wake_next()
            case "commit":
                for lease in dice.choice(self.processes).leases.values():
                    lease.commit()
            case "late":
                for lease in dice.choice(self.processes).leases.values():
                    lease.late_until = self.clock.monotonic() + 0.3
            case "crash":
                await self._crash(dice.choice(self.processes))
            case "move" | "steal":
                self._move(dice.randrange(PARTITIONS), told=action == "move")
            case "forget":
                for key in list(self.ends.cache.entries):
                    if dice.random() < 0.5:
                        del self.ends.cache.entries[key]
            case "budget":
                self.ends.spent.all_spent = not self.ends.spent.all_spent
                if not self.ends.spent.all_spent:  # it was raised: perhaps they were refused, and send it again
                    theirs = [sending for sending in self._sent if sending[0].agent_owner_id == BUDGETED]
                    self._unsent[:0] = dice.sample(theirs, min(2, len(theirs)))
            case "months":
                self.clock.now_s += dice.choice([36, 36, 71]) * DAY_S
                self._unsent[:0] = dice.sample(self._sent, min(3, len(self._sent)))  # somebody sends his archive again
        await self._bury()

    def _send(self, count: int) -> None:
        for _ in range(min(count, len(self._unsent))):
            self._sent.append(self._unsent.pop(0))
            request, partition, due_s = self._sent[-1]
            now_ms = self.clock.now_ms()
            if due_s is not None:
                request = replace(request, deadline_ms=now_ms + int(1000 * due_s))
            self.ends.requests.append(request, partition, now_ms)
        for process in self.processes:
            process.more.set()

    def _assign(self, partition: int) -> None:
        """To anybody that does not hold it, or thinks so."""
        self.group.generations[partition] += 1
        process = self.luck.dice.choice([each for each in self.processes if partition not in each.leases])
        process.leases[partition] = GroupLease(self.group, self.clock, partition)
        process.more.set()

    def _move(self, partition: int, *, told: bool) -> None:
        """Give the partition to another one; without being `told` the one that had it goes on for a while."""
        owner = next((each for each in self.processes if partition in each.leases), None)
        if owner is not None and partition not in self._moves:
            work = self._told(owner, partition) if told else self._stolen(owner, partition)
            move = self._moves[partition] = asyncio.ensure_future(work)
            move.add_done_callback(lambda _: self._moves.pop(partition))

    async def _told(self, owner: Process, partition: int) -> None:
        await owner.let_go(partition, self.luck.dice.choice([0.0, 1.0, 5.0]))
        self._assign(partition)

    async def _stolen(self, owner: Process, partition: int) -> None:
        self._assign(partition)
        await self.clock.sleep(self.luck.dice.choice([0.1, 1.0, 5.0]))
        if not owner.dead:
            await owner.let_go(partition, 0.0)

    async def _crash(self, process: Process) -> None:
        """And start another one, which may get its partitions or not."""
        if not self.luck.hazards.cache_loss and process.unstored:
            return  # the cache is kept: nothing that was paid for is lost on the way there
        await process.crash()
        self.processes[self.processes.index(process)] = self._started(process.name)
        for partition, lease in process.leases.items():
            if lease.current:
                self._assign(partition)

    async def _bury(self) -> None:
        """Those whose worker has ended them."""
        if self._broken:
            raise AssertionError("a task of a worker broke") from self._broken[0]
        dying, self._dying = self._dying, []
        for process in dying:
            if process in self.processes:
                self.luck.happened["died"] += 1
                await self._crash(process)
                if not process.dead:
                    self._dying.append(process)

    async def _finish(self) -> None:
        """All is sent, nothing more goes wrong: everything is done in the end."""
        self.luck.over = True
        self._send(len(self._unsent))
        for _ in range(3_000):
            for _ in range(10):
                await asyncio.sleep(0)
            await self._bury()
            for process in self.processes:
                for lease in process.leases.values():
                    lease.commit()
            if self.group.all_committed:
                return
            self.clock.wake_next()
        raise AssertionError(f"stuck: only {self.group.committed} are committed")

    async def _closed(self) -> Ended:
        """The books once the aggregator, killed here and there, has folded everything."""
        output = self.ends.output
        with aggregation.a_bench(output) as bench:
            bench.budgets = BUDGETS
            now_ms = max(output.now_ms, self.clock.now_ms())
            unexplained: list[object] = []
            for _ in range(self.luck.dice.choice([0, 0, 1, 2])):
                await bench.run(crash_at=self.luck.dice.randint(0, 30), run_length=self.luck.dice.randint(1, 9))
                unexplained += ledgers.unexplained(await ledgers.audited(output, now_ms=now_ms))
            ledger = await bench.run(run_length=self.luck.dice.randint(1, 50))
            unexplained += ledgers.unexplained(await ledgers.audited(output, now_ms=now_ms))
        assert ledger is not None
        emission = self.ends.emission
        books = audit.Books(
            requests=[pair for sent in self.ends.requests.partitions for pair in sent],
            results=await output.received(),
            usage=await output.contents("usage", Usage),
            calls=await output.contents("calls", ProviderCall),
            totals=emission.totals({total.key: total for _, total in await output.contents("totals", UsageTotal)}),
            bills=list(self.ends.account.bills),
            key_of=emission.key_of,
            shared_cache=self.luck.hazards.shared_cache,
        )
        return Ended(books, ledger, self.group.committed_early, self.luck.happened, unexplained)


def check(ended: Ended) -> audit.Residuals:
    """Hold a schedule against the laws, as the fault tests do with a broker's topics."""
    books = ended.books
    refused = {POISON: "provider_rejects", "endless": "text_too_long"}
    audit.check_outcomes(
        books,
        vector_of=the_vector,
        dimensions=4,
        refused=refused,
        refused_models={NONSENSE: "unknown_model"},
        budgeted=[BUDGETED],
    )
    audit.check_charges(books)
    residuals = audit.check_attempts(books)
    audit.check_shares(books)
    audit.check_totals(books)
    audit.check_ledger(books, ended.ledger, residuals)
    for _, usage in books.usage:
        if usage.model:
            price = PRICES[usage.charged_at_ms >= PRICES[1].effective_ms]
            assert (usage.price_version, usage.price_nanos_per_million) == (price.version, price.nanos_per_million)
    assert not ended.committed_early, f"committed before the outcomes: {ended.committed_early}"
    assert not ended.unexplained, f"the audit calls what is right unexplained: {ended.unexplained}"
    return residuals


def _traffic(dice: random.Random, hazards: Hazards) -> Iterator[Sending]:
    texts = [" ".join(dice.choices(["one", "two", "three"], k=dice.randint(1, 6))) for _ in range(dice.randint(2, 8))]
    sent: list[Sending] = []
    for number in range(dice.randint(4, 14)):
        if sent and dice.random() < 0.2:
            request, partition, due_s = dice.choice(sent)  # the same again
            if due_s is not None:
                due_s = dice.choice([due_s, 60.0, None])  # perhaps refused, and now in time
        else:
            request, due_s = _a_request(dice, number, texts), None
            partition = ("acme", "globex").index(request.tenant_id)
            if hazards.deadlines and dice.random() < 0.1:
                due_s = dice.choice([0.0, 0.1, 2.0])
        if hazards.tenants_roam:
            partition = dice.randrange(PARTITIONS)
        sent.append((request, partition, due_s))
        yield sent[-1]


def _a_request(dice: random.Random, number: int, texts: Sequence[str]) -> Request:
    chunks = []
    for index in range(dice.randint(1, 4)):
        kind = dice.random()
        text = f"{POISON} {dice.randint(1, 2)}" if kind < 0.04 else TOO_LONG if kind < 0.06 else dice.choice(texts)
        chunks.append(Chunk(f"c{index}", " " if 0.06 < kind < 0.08 else text))
    return a_request(
        chunks=tuple(chunks),
        tenant_id=dice.choice(["acme", "globex"]),
        correlation_id="constant" if dice.random() < 0.2 else f"corr-{number}",
        action=dice.choice(["generate", "batch_process", "embedding.generate"]),
        model=NONSENSE if dice.random() < 0.04 else None,
        use_cache=dice.random() < 0.8,
        collection=dice.choice(["docs", None]),
        document_id=dice.choice([None, "doc-1", f"doc-{number}"]),
        agent_id=dice.choice([None, "bob"]),
        agent_owner_id=BUDGETED if dice.random() < 0.2 else None,
        task_id=dice.choice([None, "task"]),
        first_chunk_index=dice.choice([0, 0, 7]),
        metadata={"number": str(number)},
    )
