"""A worker process of nothing but an engine: `python -m tests.support.engine_process OPTIONS`.

OPTIONS is JSON: bootstrap_servers, topic, settings; `kind`: which engine; `hold`: finish nothing; `break_at`: raise at
that offset; `die_at`: end at once there; `undelivered_at`: its results are not acknowledged; `waiting`: claim a paused
dependency; `hang`: a stop hook that never ends. It prints a line of JSON for each event.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import uvloop

from processor.errors import DeliveryFailed
from processor.ports import Run
from tests.support.engines import ENGINES, Handler, engine_settings


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def main() -> int:
    options = json.loads(sys.argv[1])
    tasks = []

    async def on_run(run: Run) -> None:
        for record in run.records:
            if run.lethal:
                say(event="lethal", offset=record.source.offset)
            elif record.source.offset == options.get("die_at"):
                os._exit(9)
            if record.source.offset == options.get("break_at"):
                say(event="broken", offset=record.source.offset)
                raise RuntimeError("broken")
            if record.source.offset == options.get("undelivered_at"):
                raise DeliveryFailed("not acknowledged")
            if not options.get("hold"):
                run.lease.finish(record.source.offset)
        say(event="run", partition=run.lease.partition, records=len(run.records), generation=run.lease.generation)

    async def watch() -> None:
        """Say whether the first lease is held, whenever that changes or the process has been frozen."""
        before, looked_at = None, time.monotonic()
        while True:
            now = time.monotonic()
            lease = handler.runs[0].lease if handler.runs else None
            if lease is not None:
                held = lease.held()
                if held != before or now - looked_at > 1:
                    say(event="lease", held=held, revoked=lease.revoked, frozen_s=now - looked_at)
                before = held
            looked_at = now
            await asyncio.sleep(0.01)

    async def starting() -> None:
        say(event="starting")

    async def started() -> None:
        tasks.append(asyncio.create_task(watch()))
        say(event="started", loop=type(asyncio.get_running_loop()).__module__)

    async def stopping() -> None:
        if options.get("hang"):
            await asyncio.Event().wait()
        say(event="stopping")

    handler = Handler(on_run)
    handler.stands_still = bool(options.get("waiting"))
    engine = ENGINES[options.get("kind", "faust")](
        engine_settings(options["bootstrap_servers"], **options.get("settings", {})),
        app_id=options["topic"],
        topics=[options["topic"]],
        handler=handler,
        isolates=True,
        on_starting=[starting],
        on_started=[started],
        on_stopping=[stopping],
    )
    return engine.run(loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
