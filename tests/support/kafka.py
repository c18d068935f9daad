"""Apache Kafka 4.1 as a child process: one KRaft node from Maven artifacts on the machine's own Java."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from processor.adapters.embedded import ChildServer, answers_kafka
from processor.errors import EmbeddedUnavailable
from tests.support.stack import held_port

VERSION = "4.1.0"
_OLDEST_JAVA = 17

_POM = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId>
  <artifactId>kafka-for-tests</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <!-- Without a binding a broker that fails to start says nothing. -->
    <dependency>
      <groupId>org.apache.logging.log4j</groupId>
      <artifactId>log4j-slf4j-impl</artifactId>
      <version>2.24.3</version>
    </dependency>
  </dependencies>
</project>
"""


class ApacheKafka(ChildServer):
    """One broker and controller in one process; `bootstrap_servers` is "127.0.0.1:<port>".

    `kill()` and `start()` model a crash: port and data stay until the object is left. `properties` override
    the server's. Raises `EmbeddedUnavailable` when Java 17+, Maven or the artifacts are not to be had.
    """

    def __init__(self, properties: Mapping[str, str] | None = None) -> None:
        java, libs = _java(), _libs()
        self._held = ExitStack()  # a busy machine takes long to start it, and others look for ports meanwhile
        port, controller_port = (self._held.enter_context(held_port()).getsockname()[1] for _ in range(2))
        self.bootstrap_servers = f"127.0.0.1:{port}"
        self._state = tempfile.TemporaryDirectory(prefix="kafka-")
        config = Path(self._state.name) / "server.properties"
        settings = {
            "node.id": "1",
            "process.roles": "broker,controller",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
            "log.dirs": f"{self._state.name}/logs",
            "auto.create.topics.enable": "false",
            # One broker, and a group's first member does not wait for others.
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            # Tests of lost leases use sessions below the default minimum of 6 s.
            "group.min.session.timeout.ms": "1000",
            # How long a broker that was killed stays fenced after it is back (default 9 s).
            "broker.session.timeout.ms": "4000",
            "broker.heartbeat.interval.ms": "500",
            "log.cleaner.dedupe.buffer.size": "8388608",
            # Benchmarks bound the disk that they fill.
            "log.retention.check.interval.ms": "2000",
            "log.segment.delete.delay.ms": "1000",
            **(properties or {}),
        }
        config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        run = [
            java,
            "-Xms128m",
            "-Xmx512m",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            "-cp",
            f"{libs}/*",
        ]
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        try:
            _run(
                [*run, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(config)],
                "formatting Kafka's log directory",
            )
        except EmbeddedUnavailable:
            self._held.close()
            raise
        super().__init__(
            f"Apache Kafka {VERSION}",
            [*run, "kafka.Kafka", str(config)],
            answers=lambda: answers_kafka("127.0.0.1", port),
            start_timeout_s=60,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its data is thrown away, so there is no reason to wait for an orderly end.
        self.kill()
        self._held.close()
        self._state.cleanup()


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None) or shutil.which("java")
    if java is None:
        raise EmbeddedUnavailable(f"no java on PATH: install a JRE, version {_OLDEST_JAVA} or newer")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < _OLDEST_JAVA:
        raise EmbeddedUnavailable(f"java is older than {_OLDEST_JAVA}: install a newer JRE, or set JAVA_HOME")
    return java


def _libs() -> Path:
    """The directory of Kafka's jars: fetched once with Maven, then kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedding-processor"
    home = cache / f"kafka-{VERSION}"
    home.mkdir(parents=True, exist_ok=True)
    libs = home / "libs"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once fetch it once
        if not libs.is_dir():
            maven = shutil.which("mvn")
            if maven is None:
                raise EmbeddedUnavailable("no mvn on PATH: install Maven, it fetches Kafka's jars")
            (home / "pom.xml").write_text(_POM)
            fresh = home / "libs.partial"
            shutil.rmtree(fresh, ignore_errors=True)
            _run(
                [
                    *(maven, "-q", "-B", "-f", str(home / "pom.xml"), "dependency:copy-dependencies"),
                    *("-DincludeScope=runtime", f"-DoutputDirectory={fresh}"),
                ],
                "fetching Kafka's jars with Maven",
            )
            fresh.rename(libs)
    return libs


def _run(command: list[str], purpose: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise EmbeddedUnavailable(f"{purpose} failed: {done.stdout[-1000:].strip()}")
