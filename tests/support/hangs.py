"""An end for what waits without a deadline of its own: a test that hangs must not take the whole run with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HANGS_AFTER_S = 900.0
AGAIN_S = 60.0


@contextmanager
def ended_if_it_hangs(after_s: float = HANGS_AFTER_S) -> Iterator[None]:
    """Fail what is still under way then, wherever the main thread is."""

    def fail(*_: object) -> None:
        pytest.fail(f"it hangs: not over within {after_s:g} s")

    handler = signal.signal(signal.SIGALRM, fail)
    # Again: in the turn of another task than the one that hangs, the failure ends only that task.
    timer = signal.setitimer(signal.ITIMER_REAL, after_s, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
