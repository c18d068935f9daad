"""What was charged, billed and totalled, to the token: every charge, every attempt, every sum."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from fractions import Fraction
from uuid import UUID, uuid5

from processor.accounts import BucketKey, LedgerSummary, UsageSums
from processor.domain import WHOLE_REQUEST, CallItem, CallKind, CallOutcome, ProviderCall, Record, Usage
from processor.identity import request_id
from tests.support.audit.books import EMBEDDING, Books, refuses

PASSING = ("deadline_exceeded", "budget_exceeded")
"""What a text may end as in one copy and not in another."""
SUMS = [field.name for field in fields(UsageSums)]
OF_THE_COPY = {"cached_texts", "completed_at_ms", "time_taken_ms"}
OF_THE_SOURCE = {"source", "charged_at_ms", "price_version", "price_nanos_per_million", "billed", "saved"}
CLASSES = ("waste", "rework", "late", "unclaimed", "unconfirmed")


@dataclass(slots=True)
class Residuals:
    """Tokens that were billed and are charged to nobody, by class (U6), and how many attempts have some of each.

    waste: an invalid answer; rework: its items are charged, but from another attempt or as saved; late: charged too
    late to count; unclaimed: not charged yet; unconfirmed: no receipt. A recovered attempt has no receipt and a charge
    that names it.
    """

    billed: int = 0
    attributed: int = 0
    waste: int = 0
    rework: int = 0
    late: int = 0
    unclaimed: int = 0
    unconfirmed: int = 0
    recovered_attempts: int = 0
    attempts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.waste + self.uncharged + self.unconfirmed

    @property
    def uncharged(self) -> int:
        """What the aggregator's own ledger can tell of an attempt with a good receipt."""
        return self.rework + self.late + self.unclaimed

    def add(self, kind: str, tokens: int) -> None:
        if tokens:
            setattr(self, kind, getattr(self, kind) + tokens)
            self.attempts[kind] += 1

    def table(self) -> str:
        """One line a class, for people."""
        rows = [("billed", self.billed), ("attributed", self.attributed)]
        rows += [(kind, getattr(self, kind)) for kind in CLASSES]
        lines = [f"{kind:<12}{tokens:>10} tokens{self.attempts[kind]:>6} attempts" for kind, tokens in rows]
        return "\n".join([*lines, f"{'recovered':<12}{'':>17}{self.recovered_attempts:>6} attempts"])


def check_charges(books: Books) -> None:
    """U4, U5, law 4: each accepted request is charged exactly once, at its time, to its payer, rightly summed.

    Or refused once, which charges nothing. Who was refused and sends it again has a charge beside that for what was
    paid for then.
    """
    accepted = books.accepted()
    charged = Counter((charge.usage.request_id, refuses(charge.usage)) for charge in books.charges())
    settled = {name for name, _ in charged}
    assert settled == set(accepted), (
        f"{len(set(accepted) - settled)} requests without charge, {len(settled - set(accepted))} invented"
    )
    free = {usage.request_id for _, usage in books.usage if usage.parts and (usage.request_id, False) not in charged}
    assert not free, f"{len(free)} requests were served at a cost and are charged as refused"
    again = {name: times for name, times in (charged - books.due()).items() if times}
    assert not again, f"{len(again)} requests charged more than once"
    sent = {(record.source[:3], request_id(request)): record.source.append_ms for record, request in books.requests}
    failed = _failed_texts(books)
    places: dict[str, int] = {}
    for record, usage in books.usage:
        request = accepted[usage.request_id]
        key = str(uuid5(UUID(usage.request_id), "refusal")) if refuses(usage) else usage.request_id
        assert usage.idempotency_key == key, "a key that is not its request's"
        place = record.source.partition
        assert places.setdefault(usage.payer_id, place) == place, "a payer's charges in two partitions, copies apart"
        said = (usage.request.agent_id, usage.request.collection, usage.operation, usage.token_type)
        assert said == (request.agent_id, request.collection, EMBEDDING[request.action], "embedding"), said
        assert usage.charged_at_ms == sent[usage.source[:3], usage.request_id], "not the time of its source record"
        assert usage.payer_id == (request.agent_owner_id or request.tenant_id)
        assert record.key == usage.payer_id.encode(), "a charge under the key of another payer"
        assert sum(part.tokens for part in usage.parts) == usage.billed.tokens
        assert usage.texts == len(request.chunks)
        assert 0 <= usage.cached_texts <= usage.billed.texts + usage.saved.texts
        assert usage.billed.texts + usage.saved.texts + usage.failed_texts == usage.texts
        always, ever = failed[usage.request_id]
        assert always <= usage.failed_texts <= ever, (usage.failed_texts, always, ever)
        characters = sum(len(chunk.text) for chunk in request.chunks)
        unfailed = usage.billed.characters + usage.saved.characters
        assert usage.characters == characters
        assert unfailed <= characters if usage.failed_texts else unfailed == characters
        for side in (usage.billed, usage.saved):
            price = usage.price_nanos_per_million
            exact = None if price is None else round(Fraction(side.tokens * price, 1_000_000))  # half to even
            assert side.cost_nanos == exact, (side, price)
        if not request.use_cache:
            assert usage.saved.texts == 0, "an item that refuses the cache was given somebody else's vector"


def _failed_texts(books: Books) -> Mapping[str, tuple[int, int]]:
    """By request id how many texts fail in every copy, and how many in any.

    A charge can be all that is left of a copy, when its worker was killed before all its results were out: what failed
    for a deadline or a budget may not have failed in that one, and other texts of the request may have.
    """
    codes: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for _, result in books.results:
        begin = result.first_chunk_index if result.chunk_index == WHOLE_REQUEST else result.chunk_index
        for index in range(begin, begin + result.length):
            codes[result.request_id, index].add("" if result.error is None else result.error.code)
    refused = {name for (name, _), of_text in codes.items() if not of_text.isdisjoint(PASSING)}
    found: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (name, _), of_text in codes.items():
        always, ever = found[name]
        found[name] = always + of_text.isdisjoint({"", *PASSING}), ever + (of_text != {""} or name in refused)
    return found


def check_attempts(books: Books) -> Residuals:
    """U1, U3, U6 and law 3 per attempt against the provider's own bill: bill = attributed + residual, none negative."""
    intents, receipts = _ledger_records(books.calls)
    billed: dict[str, int] = {}
    for bill in books.bills:
        assert bill["attempt_id"] in intents, "a call without an intent before it"
        assert bill["attempt_id"] not in billed, "two calls under one intent"
        billed[bill["attempt_id"]] = bill["tokens"] if bill["billed"] else 0
    on_time = _parts(charge.usage for charge in books.charges() if not charge.late)
    late = _parts(charge.usage for charge in books.charges() if charge.late)
    charged = {charge.usage.request_id for charge in books.charges()}
    assert set(on_time) | set(late) <= set(intents), "a charge names an attempt that nobody intended"
    residuals = Residuals()
    for attempt_id, intent in intents.items():
        bill_tokens, receipt = billed.get(attempt_id, 0), receipts.get(attempt_id)
        if receipt is not None:
            assert receipt.billed_tokens == bill_tokens, "a receipt that is not the provider's bill"
        named, named_late = on_time[attempt_id], late[attempt_id]
        attributed = sum(named.values())
        shares = _shares_by_request(intent.items, bill_tokens)
        assert set(named) | set(named_late) <= set(shares), "a charge names an attempt that did not embed its text"
        for name, tokens in named.items():
            assert tokens <= sum(shares[name]), f"attempt {attempt_id} is attributed more than its bill"
            assert tokens in _subset_sums(shares[name]), f"attempt {attempt_id}: {tokens} is no share of {shares[name]}"
        residuals.add("billed", bill_tokens)
        residuals.add("attributed", attributed)
        if receipt is None:
            residuals.recovered_attempts += attributed > 0
            residuals.add("unconfirmed", bill_tokens - attributed)
        elif receipt.outcome is CallOutcome.OK:
            left = {name: sum(of_request) - named[name] for name, of_request in shares.items()}
            of_late = {name: min(named_late[name], tokens) for name, tokens in left.items()}
            rest = {name: tokens - of_late[name] for name, tokens in left.items()}
            residuals.add("late", sum(of_late.values()))
            residuals.add("rework", sum(tokens for name, tokens in rest.items() if name in charged))
            residuals.add("unclaimed", sum(tokens for name, tokens in rest.items() if name not in charged))
        else:
            assert not named, f"a charge names the {receipt.outcome} attempt {attempt_id}"
            assert not named_late, f"a charge names the {receipt.outcome} attempt {attempt_id}"
            residuals.add("waste", bill_tokens)
    assert residuals.billed == residuals.attributed + residuals.total
    return residuals


def check_shares(books: Books) -> None:
    """U1, U3: the tokens of every vector, billed or saved, are a share that was once paid for this very text."""
    accepted = books.accepted()
    intents, _ = _ledger_records(books.calls)
    billed = {bill["attempt_id"]: bill["tokens"] for bill in books.bills if bill["billed"]}
    paid: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    for attempt_id, intent in intents.items():
        for item, share in zip(intent.items, _split(billed.get(attempt_id, 0), intent.items), strict=True):
            request = accepted[item.request_id]
            assert item.payer_id == (request.agent_owner_id or request.tenant_id)
            chunk = request.chunks[item.index - request.first_chunk_index]
            paid[_whose(books, request.tenant_id), intent.vector_space, chunk.text].add(share)
    for _, result in books.results:
        if result.vector is not None:
            request = accepted[result.request_id]
            chunk = request.chunks[result.chunk_index - request.first_chunk_index]
            of_text = paid[_whose(books, result.tenant_id), result.vector_space, chunk.text]
            assert result.token_count in of_text, result.token_count
    for _, usage in books.usage:
        request = accepted[usage.request_id]
        if usage.failed_texts == 0:
            whose = _whose(books, request.tenant_id)
            of_texts = [paid[whose, usage.vector_space, chunk.text] for chunk in request.chunks]
            tokens = usage.billed.tokens + usage.saved.tokens
            assert sum(map(min, of_texts)) <= tokens <= sum(map(max, of_texts)), (tokens, of_texts)


def _whose(books: Books, tenant_id: str) -> str:
    return "everybody's" if books.shared_cache else tenant_id


def check_nothing_paid_twice(books: Books, residuals: Residuals) -> None:
    """U7, with the cache kept, no zombies, no two workers on one key: copies agree, good answers are charged.

    A request that was sent twice is charged at the time, and so at the price, of either record.
    """
    assert residuals.uncharged == 0, residuals.table()
    first: dict[str, Usage] = {}
    for _, usage in books.usage:
        known = first.setdefault(usage.idempotency_key, usage)
        for field_ in fields(Usage):
            may_differ = field_.name in OF_THE_COPY or (usage.source != known.source and field_.name in OF_THE_SOURCE)
            same = getattr(usage, field_.name) == getattr(known, field_.name)
            assert same or may_differ, f"copies that differ in {field_.name}"
        for one, other in ((usage.billed, known.billed), (usage.saved, known.saved)):
            assert (one.texts, one.tokens, one.characters) == (other.texts, other.tokens, other.characters)


def check_decided_once(books: Books) -> None:
    """Where every record is read once: deadline and budget refuse all that a request would pay for, or nothing."""
    refused = {result.source_version for _, result in books.results if result.error and result.error.code in PASSING}
    charges = [charge.usage for charge in books.charges() if charge.usage.billed.texts]
    halves = [usage.request_id for usage in charges if usage.source.version in refused]
    assert not halves, f"{len(halves)} requests paid for a part and were refused the rest"


def check_totals(books: Books) -> None:
    """Law 5: published totals are those of a recomputation with a set, first copy wins; no bucket is invented."""
    expected: defaultdict[BucketKey, Counter[str]] = defaultdict(Counter)
    for _, usage, late in books.charges():
        if late:
            continue
        for key in buckets(usage):
            expected[key].update(amounts(usage))
    assert set(books.totals) == set(expected), (
        f"{len(set(expected) - set(books.totals))} buckets missing, {len(set(books.totals) - set(expected))} invented"
    )
    for key, sums in expected.items():
        for name in SUMS:
            published = sum(getattr(part, name) for _, part in books.totals[key].partitions.values())
            assert published == sums[name], (key, name, published, sums[name])


def check_ledger(books: Books, summary: LedgerSummary, residuals: Residuals) -> None:
    """U6: what the aggregator knows without the provider's books: equal where a receipt exists, else an interval."""
    intents, receipts = _ledger_records(books.calls)
    sums = summary.sums
    assert sums.attempts == len(intents)
    assert sums.billed_tokens == sum(receipt.billed_tokens or 0 for receipt in receipts.values())
    assert sums.attributed_tokens == residuals.attributed
    assert (sums.waste_tokens, sums.uncharged_tokens) == (residuals.waste, residuals.uncharged)
    assert sums.over_attributed_attempts == sums.unmatched_tokens == 0
    assert sums.unconfirmed_attempts + summary.in_flight_attempts == len(set(intents) - set(receipts))


def totals_cover(books: Books) -> bool:
    """Whether the published monthly totals count every charge (used as a condition to wait for)."""
    counted = sum(
        sums.requests
        for key, total in books.totals.items()
        if key.dimension == "all" and len(key.bucket) == len("2026-11")
        for _, sums in total.partitions.values()
    )
    return counted >= sum(not charge.late for charge in books.charges())


def _ledger_records(
    calls: Iterable[tuple[Record, ProviderCall]],
) -> tuple[dict[str, ProviderCall], dict[str, ProviderCall]]:
    """Intents and receipts by attempt; no attempt has two of either."""
    found: dict[CallKind, dict[str, ProviderCall]] = {CallKind.INTENT: {}, CallKind.RECEIPT: {}}
    for _, call in calls:
        assert call.attempt_id not in found[call.kind], f"attempt {call.attempt_id} has two {call.kind}s"
        found[call.kind][call.attempt_id] = call
    intents, receipts = found[CallKind.INTENT], found[CallKind.RECEIPT]
    assert set(receipts) <= set(intents), "a receipt without an intent before it"
    return intents, receipts


def _parts(charges: Iterable[Usage]) -> defaultdict[str, Counter[str]]:
    """Tokens by attempt and request."""
    parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for usage in charges:
        for part in usage.parts:
            parts[part.attempt_id][usage.request_id] += part.tokens
    return parts


def _split(bill: int, items: Sequence[CallItem]) -> list[int]:
    """Largest remainder of the local counts, ties by lower position."""
    weights = [item.local_tokens for item in items]
    if not any(weights):
        weights = [1] * len(items)
    exact = [Fraction(bill * weight, sum(weights)) for weight in weights]
    shares = [int(part) for part in exact]
    in_turn = sorted(range(len(items)), key=lambda i: (shares[i] - exact[i], i))
    for i in in_turn[: bill - sum(shares)]:
        shares[i] += 1
    return shares


def _shares_by_request(items: Sequence[CallItem], bill: int) -> dict[str, list[int]]:
    shares: defaultdict[str, list[int]] = defaultdict(list)
    for item, share in zip(items, _split(bill, items), strict=True):
        shares[item.request_id].append(share)
    return dict(shares)


def _subset_sums(shares: Sequence[int]) -> set[int]:
    sums = {0}
    for share in shares:
        sums |= {known + share for known in sums}
    return sums


def buckets(usage: Usage) -> Iterator[BucketKey]:
    """Where a charge counts."""
    at = datetime.fromtimestamp(usage.charged_at_ms / 1000, UTC)
    values = {
        "all": "",
        "model": usage.model,
        "operation": str(usage.operation),
        "agent": usage.request.agent_id,
        "collection": usage.request.collection,
    }
    for bucket in (f"{at:%Y-%m-%d}", f"{at:%Y-%m}"):
        for dimension, value in values.items():
            if value is not None:
                yield BucketKey(usage.payer_id, bucket, dimension, value)


def amounts(usage: Usage) -> Counter[str]:
    """What a charge adds to a bucket, by the names of UsageSums."""
    sums = Counter(requests=1, failed_texts=usage.failed_texts, cached_texts=usage.cached_texts)
    for side, known in (("billed", usage.billed), ("saved", usage.saved)):
        for name in ("texts", "tokens", "characters", "cost_nanos"):
            sums[f"{side}_{name}"] = getattr(known, name) or 0
    if usage.billed.cost_nanos is None:
        sums["unpriced_tokens"] = usage.billed.tokens
    return sums
