"""The demo as a stranger runs it: its figures, and that an interrupted one leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from processor.client import Client
from processor.settings import load
from tests.support.stack import until

pytestmark = pytest.mark.demo


async def start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    """The demo in a session of its own, its temporary files below the folder, in a shell with settings of its own."""
    foreign = {"EMBEDDING_PROVIDER": "openai", "EMBEDDING_TOPIC_PREFIX": "other.", "REDIS_URL": "redis://nowhere"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "processor", "demo", *arguments),
        env=os.environ | foreign | {"TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        # A shell that runs us in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def children(pid: int) -> set[int]:
    """The processes that this one started: broker, cache, workers, aggregator."""
    found = set()
    for path in Path("/proc").iterdir():
        try:
            # After the name in parentheses: state, then the parent.
            if path.name.isdigit() and int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.name))
        except OSError:
            continue
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def line_with(demo: asyncio.subprocess.Process, text: bytes) -> bytes:
    """Read what it prints up to a line with the text, and return that."""
    assert demo.stdout is not None
    async with asyncio.timeout(240):
        while text not in (line := await demo.stdout.readline()):
            assert line, "it ended early"
    return line


async def test_the_demos_figures_are_as_they_must_be(tmp_path: Path) -> None:
    """At least 1,000 chunks, each with a vector and then a cache hit, and three books that agree to the token."""
    demo = await start(tmp_path, "--json")
    out, err = await asyncio.wait_for(demo.communicate(), 600)
    assert demo.returncode == 0, err.decode()
    figures = json.loads(out.decode().splitlines()[-1])
    assert figures["chunks"] == figures["results"] == figures["second_pass_hits"] >= 1_000
    assert figures["errors"] == figures["lost"] == figures["residual_tokens"] == 0
    assert figures["usage_tokens"] == figures["ledger_tokens"] > 0
    hit, asked = figures["questions_hit"].split("/")
    assert hit == asked
    assert b"datetime.datetime.strptime" in err
    assert out.count(b"\n") == 1
    assert files(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_demo_leaves_no_process_and_no_file(number: signal.Signals, tmp_path: Path) -> None:
    """In the middle of its work a signal, and another one while it stops."""
    demo = await start(tmp_path, "--keep")  # what is slow to interrupt it finds it up all the same
    try:
        await line_with(demo, b"first pass")
        started = children(demo.pid)
        assert len(started) == 5
        assert files(tmp_path)
        demo.send_signal(number)
        demo.send_signal(number)
        _, err = await asyncio.wait_for(demo.communicate(), 90)
    finally:
        if demo.returncode is None:
            demo.kill()
    assert demo.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert files(tmp_path) == []
    assert alive(started) == set()


async def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    """Nobody can catch SIGKILL, and yet broker, cache and workers die with their parent."""
    demo = await start(tmp_path)
    await line_with(demo, b"ready after")
    started = children(demo.pid)
    assert len(started) == 5
    demo.kill()
    await demo.communicate()
    await until(lambda: not alive(started), within_s=30, what="no process is left")


async def test_a_demo_over_files_asks_about_them_and_stays_up_when_told(tmp_path: Path) -> None:
    """The texts given are embedded and found again, and what is printed lets a client in until Ctrl-C."""
    (tmp_path / "temporary").mkdir()
    for name in ("frogs", "ships"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"Fact {i} about {name}. " * 8 for i in range(6)))
    demo = await start(tmp_path / "temporary", str(tmp_path / "frogs.txt"), str(tmp_path / "ships.txt"), "--keep")
    try:
        await line_with(demo, b"residual 0")
        await line_with(demo, b"stays up")
        assert len(children(demo.pid)) == 5
        exported = (await line_with(demo, b"  export ")).decode().split()[1:]
        variables = dict(word.split("=", 1) for word in exported)
        async with Client(
            load(_env_file=None, **{name[10:].lower(): value for name, value in variables.items()})
        ) as client:
            assert (await client.embed_query("ships", tenant_id="another shell")).ok
        demo.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(demo.communicate(), 90)
    finally:
        if demo.returncode is None:
            demo.kill()
    assert demo.returncode == 130
    assert b"NOT MET" not in err
    assert files(tmp_path / "temporary") == []
