"""What the audit keeps of a call's intent, and whether what charges name of the call are shares of its bill."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from processor.answers import split
from processor.domain import ProviderCall

Key = bytes | str
LARGEST_SUM = 10**7
"""No request has so many tokens in one call. What a foreign writer makes up beyond is only held against its bound."""


class Intent(NamedTuple):
    """An attempt that has no receipt yet. `owners[i]` is the place in `requests` of the item with `local_tokens[i]`.

    `debtors` are the `debtor` of each of `requests`.
    """

    attempt_id: str
    at_ms: int
    confirm_by_ms: int
    estimated_tokens: int
    price: int | None
    provider: str
    requests: tuple[Key, ...]
    debtors: tuple[int, ...]
    owners: array[int]
    local_tokens: array[int]


def intent_of(call: ProviderCall, append_ms: int) -> Intent:
    places: dict[str, int] = {}
    owners, local_tokens = array("I"), array("q")
    payers: list[str] = []
    for request_id, _, payer_id, tokens in call.items:
        place = places.setdefault(request_id, len(places))
        if place == len(payers):
            payers.append(payer_id)
        owners.append(place)
        local_tokens.append(tokens)
    requests = tuple(map(packed, places))
    return Intent(
        call.attempt_id,
        append_ms,
        append_ms if call.confirm_by_ms is None else call.confirm_by_ms,
        call.estimated_tokens,
        call.price_nanos_per_million,
        call.provider,
        requests,
        tuple(map(debtor, requests, payers)),
        owners,
        local_tokens,
    )


def debtor(request: Key, payer_id: str) -> int:
    """Stands for a request and who pays for it."""
    return hash((request, payer_id))


def shares_of(intent: Intent, billed: int) -> list[tuple[int, int]]:
    """Of each item the place of its request, and its share of the bill."""
    return list(zip(intent.owners, split(billed, intent.local_tokens), strict=True))


def tokens_of(named: array[int]) -> int:
    """What charges name of a call in all; `named` is debtor, tokens, debtor, tokens and so on."""
    return sum(named[1::2])


def beside_shares(intent: Intent, named: array[int], paid: Iterable[tuple[int, int]] | None) -> int:
    """The tokens that charges name of the call for a request (and who pays for it) no items of which add up to them.

    `paid`: each item's owner and share of the bill; None: nobody knows the bill, and only the requests are looked at.
    """
    by_debtor: Counter[int] = Counter()
    for request, tokens in zip(named[::2], named[1::2], strict=True):
        by_debtor[request] += tokens
    shares: defaultdict[int, list[int]] = defaultdict(list)
    for owner, share in paid or ():
        shares[intent.debtors[owner]].append(share)
    known = set(intent.debtors)
    return sum(
        tokens
        for request, tokens in by_debtor.items()
        if (request not in known if paid is None else not _is_sum(tokens, shares[request]))
    )


def _is_sum(tokens: int, shares: Sequence[int]) -> bool:
    """Whether some of the shares, or none, add up to it."""
    left = sum(shares) - tokens
    if tokens <= 0 or left <= 0:
        return tokens == 0 or left == 0
    wanted = min(tokens, left)  # what is in and what is left out are sums alike
    if wanted > LARGEST_SUM:
        return True
    mask, sums = (1 << wanted + 1) - 1, 1  # bit n: n is a sum
    for share in shares:
        if share <= wanted:
            sums |= sums << share & mask
    return bool(sums >> wanted & 1)


def packed(name: str) -> Key:
    """A UUID in its usual spelling as its 16 bytes; any other text as it is."""
    if len(name) == 36 and name[8] == name[13] == name[18] == name[23] == "-":
        digits = name.replace("-", "")
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            return name
        if raw.hex() == digits:
            return raw
    return name


def unpacked(key: Key) -> str:
    if isinstance(key, str):
        return key
    digits = key.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
