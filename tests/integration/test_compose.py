"""The compose file for real: the image is built, the stack comes up, answers, is charged, and is gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from processor.cli.totals import add, read_totals
from processor.client import Client
from processor.settings import Settings, load
from tests.support.brokers import answers_docker
from tests.support.stack import free_port, until

ROOT = Path(__file__).parents[2]
UP_WITHIN_S = 420
PROCESSES = ("worker", "worker-interactive", "aggregator")


class Compose:
    """The project's compose file under a project name and a Kafka port of its own."""

    def __init__(self, command: Sequence[str], project: str) -> None:
        self.kafka_port = free_port()
        self._command = [*command, "--project-name", project, "--file", str(ROOT / "docker-compose.yml")]
        # The image must build without BuildKit; neither key nor provider of this shell may slip in.
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("EMBEDDING_", "OPENAI_"))},
            "KAFKA_PORT": str(self.kafka_port),
            "DOCKER_BUILDKIT": "0",
            "COMPOSE_DOCKER_CLI_BUILD": "0",
        }

    def run(self, *arguments: str, within_s: float = 90) -> str:
        """What it prints; AssertionError with all of that when it fails."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, f"compose {' '.join(arguments)}: {done.returncode}\n{said}"
        return done.stdout

    def inside(self, service: str, *command: str) -> str:
        return self.run("exec", "-T", service, *command)

    def report(self, path: str, service: str) -> Mapping[str, object]:
        """A JSON document of a process's internal port, as asked for from inside of its container."""
        ask = f"import urllib.request as http; print(http.urlopen('http://127.0.0.1:8080{path}').read().decode())"
        document: Mapping[str, object] = json.loads(self.inside(service, "python", "-c", ask))
        return document


def _compose_command() -> list[str]:
    """`docker-compose` or `docker compose`; the test skips where no engine answers or neither is there."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not answers_docker(host):
        pytest.skip(f"NOT RUN, the compose file needs a Docker engine: none answers at {host}")
    if standalone := shutil.which("docker-compose"):
        return [standalone]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    pytest.skip("NOT RUN, an engine answers, but there is neither docker-compose nor docker compose")


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    """The stack, up and healthy."""
    compose = Compose(_compose_command(), f"embedding-test-{os.getpid()}")
    try:
        compose.run("up", "--build", "--detach", within_s=UP_WITHIN_S)
        yield compose
    finally:
        compose.run("down", "--volumes", "--timeout", "60", within_s=180)
    assert compose.run("ps", "--quiet").strip() == "", "every container is gone"


def settings_of(compose: Compose) -> Settings:
    """Of a client on this machine."""
    host = urllib.parse.urlsplit(os.environ.get("DOCKER_HOST", "")).hostname or "127.0.0.1"
    return load(_env_file=None, bootstrap_servers=f"{host}:{compose.kafka_port}")


async def test_a_request_is_answered_and_charged_through_the_compose_file(compose: Compose) -> None:
    """Texts from this machine become vectors of the local model on either lane, and the totals name their payer."""
    settings = settings_of(compose)
    async with Client(settings) as client:
        outcomes = await client.embed(
            ["The cat sat on the mat.", "Interest rates rose again.", " "],
            tenant_id="acme",
            collection="docs",
            document_id="doc-1",
            timeout_s=120,
        )
        query = await client.embed_query("Where is the cat?", tenant_id="acme", timeout_s=120)
    cat, rates, blank = outcomes
    assert cat.ok, cat
    assert rates.ok, rates
    assert query.ok, query
    assert not blank.ok
    assert blank.error is not None
    assert blank.error.code == "empty_text"
    assert cat.vector is not None
    assert rates.vector is not None
    assert query.vector is not None
    assert np.dot(query.vector, cat.vector) > np.dot(query.vector, rates.vector) + 0.2, "the vectors mean something"

    async def charged() -> bool:
        totals = await read_totals(settings)
        buckets = {key: sums for key, sums in totals.items() if (key.payer_id, key.dimension) == ("acme", "all")}
        days = add(sums for key, sums in buckets.items() if len(key.bucket) == len("2026-11-22"))
        months = add(sums for key, sums in buckets.items() if len(key.bucket) == len("2026-11"))
        return all((s.requests, s.billed_texts, s.failed_texts) == (2, 3, 1) for s in (days, months))

    async def balanced() -> bool:
        ledger = compose.report("/ledger", "aggregator")
        return ledger["billed_tokens"] == ledger["attributed_tokens"] != 0 == ledger["residual_tokens"]

    await until(charged, within_s=60, what="days and months of acme: 2 requests, 3 texts billed, 1 failed", every_s=1)
    await until(balanced, within_s=60, what="the ledger has all receipts, and each is charged", every_s=1)


async def test_the_command_line_works_inside_of_a_container(compose: Compose) -> None:
    """`doctor` finds nothing wrong, and files that are produced from inside have their results."""
    checks = [
        json.loads(line) for line in compose.inside("worker", "embedding-processor", "doctor", "--json").splitlines()
    ]
    assert checks
    assert [check for check in checks if check["state"] == "error"] == []
    script = "printf 'One paragraph.\\n\\nAnother one.\\n' > /tmp/a.txt && exec embedding-processor produce /tmp/a.txt"
    printed = compose.inside("worker", "sh", "-c", f"{script} --tenant globex --wait --json")
    assert json.loads(printed.splitlines()[-1])["failed"] == 0


async def test_every_process_is_healthy_and_may_write_nothing_but_its_store(compose: Compose) -> None:
    """Health says ready; the user is not root, the root file system is read-only, no installer is left."""
    for service in PROCESSES:

        async def ready(service: str = service) -> bool:
            return compose.report("/health/detailed", service)["ready"] is True

        await until(ready, within_s=60, what=f"{service} is ready", every_s=1)
        assert compose.inside(service, "id", "-u").strip() == "10001"
        attempt = "touch /opt/processor/x 2>/dev/null || touch /usr/x 2>/dev/null || command -v pip || echo refused"
        assert compose.inside(service, "sh", "-c", attempt).strip() == "refused"
    assert "aggregator.sqlite" in compose.inside("aggregator", "ls", "/data")
