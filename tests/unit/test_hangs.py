"""What the suite does about a test that hangs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from tests.support.hangs import AGAIN_S, HANGS_AFTER_S, ended_if_it_hangs


@pytest.mark.parametrize(
    "hang",
    [lambda: asyncio.run(asyncio.Event().wait()), lambda: time.sleep(30)],
    ids=["in a loop", "in a call"],
)
def test_what_hangs_fails(hang: Callable[[], object]) -> None:
    """Whether it waits in an event loop or in a call of the system; and every test is watched."""
    with pytest.raises(pytest.fail.Exception, match="it hangs"), ended_if_it_hangs(0.1):
        hang()
    left_s, _ = signal.getitimer(signal.ITIMER_REAL)
    assert AGAIN_S < left_s <= HANGS_AFTER_S, "the guard of this very test"
