"""The checker: what the topics and the provider's own books say, held against the laws.

It shares no code with the processor but the codec: outcomes, charges, bills and totals are computed here again, from
the records alone, whether a broker or a test's memory holds them.
"""

from tests.support.audit.books import HORIZON_MS, Books, read_books, read_topic, refuses
from tests.support.audit.money import (
    CLASSES,
    SUMS,
    Residuals,
    amounts,
    buckets,
    check_attempts,
    check_charges,
    check_decided_once,
    check_ledger,
    check_nothing_paid_twice,
    check_shares,
    check_totals,
    totals_cover,
)
from tests.support.audit.outcomes import check_outcomes

__all__ = [
    "CLASSES",
    "HORIZON_MS",
    "SUMS",
    "Books",
    "Residuals",
    "amounts",
    "buckets",
    "check_attempts",
    "check_charges",
    "check_decided_once",
    "check_ledger",
    "check_nothing_paid_twice",
    "check_outcomes",
    "check_shares",
    "check_totals",
    "read_books",
    "read_topic",
    "refuses",
    "totals_cover",
]
