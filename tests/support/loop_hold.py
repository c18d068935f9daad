"""Which pieces of a processor's work hold its main event loop, and for how long: its command line, watched.

    python -m tests.support.loop_hold REPORT worker

runs `embedding-processor worker` on asyncio's own loop and writes REPORT, JSON lines, when it ends: the pieces that
took LEAST_MS or more, by where their task waits next, and the collections of garbage within them. CPU time stands
beside the clock's: on a busy machine a piece of a millisecond may be put aside for ten.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

LEAST_MS = 2.0


class Hold(NamedTuple):
    """One kind of piece: how often it took LEAST_MS or more, and the longest of them."""

    times: int
    longest_ms: float
    longest_cpu_ms: float


class Holds:
    """Pieces of the main thread's loop that held it, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Hold] = {}
        self._run: Callable[[asyncio.Handle], None] = asyncio.Handle._run
        self._collection_began = (0.0, 0.0)

    def watch(self) -> None:
        """From here on, for the rest of the process."""
        mock.patch.object(asyncio.Handle, "_run", lambda handle: self._timed(handle)).start()  # noqa: PLW0108  (a bound method would not get the handle)

        gc.callbacks.append(self._collecting)

    def _timed(self, handle: asyncio.Handle) -> None:
        began = _times()
        self._run(handle)
        if threading.current_thread() is threading.main_thread():
            self._note(began, lambda: _name(handle))

    def _collecting(self, phase: str, about: Mapping[str, int]) -> None:
        if phase == "start":
            self._collection_began = _times()
        else:
            self._note(self._collection_began, lambda: f"garbage collection {about['generation']}")

    def _note(self, began: tuple[float, float], name: Callable[[], str]) -> None:
        took_ms, cpu_ms = ((now - then) * 1000 for now, then in zip(_times(), began, strict=True))
        if took_ms >= LEAST_MS:
            before = self.by_name.get(name(), Hold(0, 0.0, 0.0))
            self.by_name[name()] = Hold(
                before.times + 1, max(before.longest_ms, took_ms), max(before.longest_cpu_ms, cpu_ms)
            )

    def lines(self) -> list[str]:
        """The longest by CPU time first."""
        found = sorted(self.by_name.items(), key=lambda each: -each[1].longest_cpu_ms)
        return [
            json.dumps({"piece": name} | {key: round(value, 1) for key, value in hold._asdict().items()})
            for name, hold in found
        ]


def _times() -> tuple[float, float]:
    """Seconds of the clock, and of this thread's CPU."""
    return time.perf_counter(), time.thread_time()


def _name(handle: asyncio.Handle) -> str:
    """The callback, or the coroutines of its task from the outermost to where it waits."""
    callback: Any = handle._callback  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return repr(getattr(callback, "__qualname__", type(callback).__name__))
    names = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        code = getattr(awaited, "__qualname__", None)
        if code is not None:
            names.append(f"{code}:{frame.f_lineno}" if frame is not None else f"{code} ended")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(names)


if __name__ == "__main__":
    from processor.cli.commands import main

    report = Path(sys.argv.pop(1))
    holds = Holds()
    holds.watch()
    mock.patch("processor.app.uvloop.new_event_loop", asyncio.new_event_loop).start()
    atexit.register(lambda: report.write_text("\n".join(holds.lines()) + "\n"))
    main()
