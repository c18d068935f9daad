"""Redis as others run it: a Cluster of three nodes, and a server with TLS and users."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from processor.adapters.embedded import ChildServer, EmbeddedCache, answers_redis, redis_command
from tests.support.stack import free_port

HOST = "127.0.0.1"
SLOTS = 16384
NODES = 3


def program() -> str:
    """A redis-server on PATH, or the embedded Valkey."""
    return shutil.which("redis-server") or EmbeddedCache().program


@dataclass(frozen=True)
class Cluster:
    """Three primaries that share the slots."""

    nodes: list[ChildServer]
    urls: list[str]

    @property
    def url(self) -> str:
        return self.urls[0]


@contextmanager
def own_cluster() -> Iterator[Cluster]:
    """Started, joined, and with an owner for every slot."""
    with ExitStack() as stack:
        nodes, ports = [], []
        for _ in range(NODES):
            port, bus_port, folder = free_port(), free_port(), stack.enter_context(tempfile.TemporaryDirectory())
            command = [
                *redis_command(program(), port=port),
                *("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--dir", folder),
                *("--cluster-node-timeout", "30000", "--cluster-require-full-coverage", "no"),
            ]
            nodes.append(stack.enter_context(_server(command, port)))
            ports.append((port, bus_port))
        clients: list[Any] = [stack.enter_context(Redis(HOST, port)) for port, _ in ports]
        step = -(-SLOTS // NODES)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER ADDSLOTSRANGE", number * step, min(SLOTS, (number + 1) * step) - 1)
            client.execute_command("CLUSTER MEET", HOST, *map(str, ports[0]))
        _wait_until_joined(clients)
        yield Cluster(nodes, [f"redis://{HOST}:{port}/0" for port, _ in ports])


def _server(command: list[str], port: int) -> ChildServer:
    return ChildServer("a node", command, answers=lambda: answers_redis(HOST, port), start_timeout_s=15)


def _wait_until_joined(clients: list[Any]) -> None:
    deadline = time.monotonic() + 60
    for client in clients:
        while True:
            told = client.execute_command("CLUSTER INFO")
            if told["cluster_state"] == "ok" and told["cluster_slots_ok"] == str(SLOTS):
                break
            assert time.monotonic() < deadline, told
            time.sleep(0.05)


@dataclass(frozen=True)
class Guarded:
    """A server that speaks TLS alone, wants a certificate of its authority, and knows user `worker`."""

    url: str
    password: str
    ca_file: Path
    cert_file: Path
    key_file: Path


@contextmanager
def guarded_server(folder: Path, rules: str) -> Iterator[Guarded]:
    """`rules` are those of the user, as ACL SETUSER has them. LookupError when there is no such program."""
    redis_server, openssl = shutil.which("redis-server"), shutil.which("openssl")
    if redis_server is None or openssl is None:
        raise LookupError("needs redis-server and openssl on PATH: the embedded Valkey has no TLS")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", f"subjectAltName=DNS:localhost,IP:{HOST}"),
        ],
        check=True,
        capture_output=True,
    )
    port, password = free_port(), "canary-4c"
    command = [
        *redis_command(redis_server, port=0),
        *("--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(cert), "--tls-auth-clients", "yes"),
        *("--user", "worker", "on", f">{password}", *rules.split(), "--user", "default", "off"),
    ]

    def answers() -> bool:
        context = ssl.create_default_context(cafile=str(cert))
        context.load_cert_chain(cert, key)
        try:
            with (
                socket.create_connection((HOST, port), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname=HOST) as connection,
            ):
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"-NOAU"
        except OSError:
            return False

    with ChildServer("redis-server with TLS", command, answers=answers, start_timeout_s=15):
        yield Guarded(f"rediss://{HOST}:{port}/0", password, cert, cert, key)
