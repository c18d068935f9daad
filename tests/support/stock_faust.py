"""Faust as it comes, for controls: `python -m tests.support.stock_faust MODE BOOTSTRAP_SERVERS TOPIC`.

The group is named like the topic. `take`: an agent whose body raises on every batch. `unsent`: an agent whose answers
the broker refuses; it sends each to TOPIC-out without waiting for it, as agents do.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import faust


def stock_app(mode: str, bootstrap_servers: str, topic: str) -> faust.App:
    app = faust.App(
        topic,
        broker=f"kafka://{bootstrap_servers}",
        broker_commit_interval=0.1,
        datadir=os.devnull,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        autodiscover=False,
    )
    records = app.topic(topic, value_serializer="raw")
    answers = app.topic(f"{topic}-out", value_serializer="raw")

    if mode == "take":

        @app.agent(records)
        async def take(stream: Any) -> None:
            async for _ in stream.take(10, within=0.5):
                raise RuntimeError("the body fails")

    else:

        @app.agent(records)
        async def answer(stream: Any) -> None:
            async for value in stream:
                await answers.send(value=bytes(5_000) + value)

    app._create_directories = lambda: None  # type: ignore[method-assign]
    return app


if __name__ == "__main__":
    from faust.worker import Worker

    Worker(stock_app(*sys.argv[1:4]), loglevel="WARN", daemon=True).execute_from_commandline()
