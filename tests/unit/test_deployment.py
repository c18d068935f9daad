"""Dockerfile, compose file and Kubernetes base agree with the settings, with each other and with known schemas."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import AliasChoices

from processor.accounts import BudgetPlan
from processor.adapters.budgets_file import read_budgets_file
from processor.settings import PREFIX, Settings, load

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
MANIFESTS: list[tuple[str, dict[str, Any]]] = [
    (path.name, manifest)
    for path in sorted((ROOT / "k8s").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if path.name != "kustomization.yaml"
]
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((ROOT / "k8s/kustomization.yaml").read_text(encoding="utf-8"))
OURS = {name: service for name, service in COMPOSE["services"].items() if "embedding-processor" in service["image"]}
WORKLOADS = [manifest for _, manifest in MANIFESTS if manifest["kind"] in {"Deployment", "StatefulSet", "Job"}]
KUBERNETES = ("1.30", "1.32", "1.34")


def environment_names() -> set[str]:
    """Every environment variable that the settings read."""
    names = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names.update(str(choice) for choice in field.validation_alias.choices)
    return names


def manifests(kind: str) -> list[dict[str, Any]]:
    return [manifest for _, manifest in MANIFESTS if manifest["kind"] == kind]


SETTINGS = next(each for each in manifests("ConfigMap") if each["metadata"]["name"] == "embedding-processor")


def pod(workload: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def named(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("manifest", [manifest for _, manifest in MANIFESTS], ids=named)
def test_a_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    """Strictly by the schemas of each release: no unknown field, no wrong type."""
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_is_no_valid_manifest() -> None:
    """The control: the schemas do refuse what Kubernetes does not know."""
    broken = manifests("PodDisruptionBudget")[0]
    broken = broken | {"spec": broken["spec"] | {"maxUnavailble": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[-1], strict=True)


def test_every_manifest_is_part_of_the_base() -> None:
    """All files but the example of a secret are applied together."""
    files = {name for name, _ in MANIFESTS}
    assert set(KUSTOMIZATION["resources"]) == files - {"secret.example.yaml"}


def variables() -> Iterator[tuple[str, str]]:
    """(where, name) of each variable that is set for a process of ours."""
    for name, service in OURS.items():
        yield from ((f"docker-compose.yml {name}", variable) for variable in service["environment"])
    for manifest in [*manifests("ConfigMap"), *manifests("Secret")]:
        data: dict[str, str] = manifest.get("data") or manifest["stringData"]
        yield from ((named(manifest), key) for key in data if not key.endswith(".yaml"))  # else it is a file
    for workload in WORKLOADS:
        for container in pod(workload)["containers"]:
            yield from ((named(workload), variable["name"]) for variable in container.get("env", ()))
    yield from (("Dockerfile", name) for name in re.findall(r"\b(EMBEDDING_\w+)", DOCKERFILE))


@pytest.mark.parametrize("where, variable", sorted(set(variables())))
def test_what_is_set_is_a_setting(where: str, variable: str) -> None:
    """A variable that no setting reads would be ignored in silence."""
    assert variable in environment_names(), where


def test_the_settings_of_the_containers_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose file and base each set values that a process accepts at start."""
    compose = {name: str(value) for name, value in OURS["worker"]["environment"].items() if value is not None}
    for environment in ({**compose, "EMBEDDING_PROVIDER": "local"}, SETTINGS["data"]):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            settings = load(_env_file=None)
            assert settings.provider == "local"
            assert settings.http_host == "0.0.0.0", "probes and scrapers come from outside of the container"
            assert settings.redis_url


def test_the_budgets_of_the_base_are_read_by_the_aggregator(tmp_path: Path) -> None:
    """The file that is mounted lies where the setting says, and an aggregator accepts it."""
    (aggregator,) = manifests("StatefulSet")
    (container,) = pod(aggregator)["containers"]
    place = next(each["value"] for each in container["env"] if each["name"] == "EMBEDDING_BUDGETS_FILE")
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volume = next(each for each in pod(aggregator)["volumes"] if each["name"] == mounted[str(Path(place).parent)])
    base = next(each for each in manifests("ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"])
    (tmp_path / "budgets.yaml").write_text(base["data"][Path(place).name], encoding="utf-8")
    assert read_budgets_file(tmp_path / "budgets.yaml") == BudgetPlan()


def test_a_shutdown_ends_before_it_is_ended() -> None:
    """The grace of each container is longer than the processor's own watchdog, with 10 s to spare."""
    compose_s = float(OURS["worker"]["environment"]["EMBEDDING_SHUTDOWN_TIMEOUT_S"])
    for name, service in OURS.items():
        assert float(service["stop_grace_period"].removesuffix("s")) >= compose_s + 10, name
    base_s = float(SETTINGS["data"]["EMBEDDING_SHUTDOWN_TIMEOUT_S"])
    for workload in WORKLOADS:
        if workload["kind"] != "Job":
            assert pod(workload)["terminationGracePeriodSeconds"] >= base_s + 10, named(workload)


def test_one_image_and_one_version() -> None:
    """Package, compose file and base name the same release of the same image."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {service["image"] for service in OURS.values()} == {f"embedding-processor:{version}"}
    (image,) = KUSTOMIZATION["images"]
    assert (image["name"], image["newTag"]) == ("embedding-processor", version)
    assert {container["image"] for workload in WORKLOADS for container in pod(workload)["containers"]} == {
        image["name"]
    }


def test_both_run_the_same_processes() -> None:
    """Each process of the compose file has its workload in the base, with the same arguments."""
    composed = {name: service["command"] for name, service in OURS.items()}
    assert composed == {
        workload["metadata"]["name"]: container["args"]
        for workload in WORKLOADS
        for container in pod(workload)["containers"]
    }


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_a_pod_may_do_little(workload: dict[str, Any]) -> None:
    """The image's own user, no privilege, a read-only root with room in /tmp, a bounded memory, no API token."""
    spec = pod(workload)
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user is not None
    assert [spec["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == [int(id_) for id_ in user.groups()]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("manifest", [*WORKLOADS, *manifests("Service"), *manifests("PodDisruptionBudget")], ids=named)
def test_a_selector_selects_the_pods_of_its_name(manifest: dict[str, Any]) -> None:
    """Workload, service and budget of one name mean the pods of that workload and of no other."""
    name = manifest["metadata"]["name"]
    selector = manifest["spec"].get("selector", {"matchLabels": {"app.kubernetes.io/component": name}})
    labels = selector.get("matchLabels", selector)
    selected = [
        workload["metadata"]["name"]
        for workload in WORKLOADS
        if labels.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert selected == [name]


def test_probes_ask_the_port_and_paths_that_are_served() -> None:
    """Port and paths of probes, services and policy are those of the internal server."""
    served = set(re.findall(r'add_get\("([^"]+)"', (ROOT / "processor/adapters/http.py").read_text(encoding="utf-8")))
    port = int(SETTINGS["data"]["EMBEDDING_HTTP_PORT"])
    for workload in WORKLOADS:
        if workload["kind"] == "Job":
            continue
        for container in pod(workload)["containers"]:
            assert container["ports"] == [{"name": "http", "containerPort": port}]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["path"] in served
                assert container[probe]["httpGet"]["port"] == "http"
    assert {service["spec"]["ports"][0]["targetPort"] for service in manifests("Service")} == {"http"}
    (policy,) = manifests("NetworkPolicy")
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port}]
    (path,) = re.findall(r"'(/health/\w+)'", DOCKERFILE)
    assert path in served


def test_each_aggregator_has_a_store_of_its_own() -> None:
    """Two processes on one store would take it from each other."""
    (workload,) = manifests("StatefulSet")
    (container,) = pod(workload)["containers"]
    (template,) = workload["spec"]["volumeClaimTemplates"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    store = next(v["value"] for v in container["env"] if v["name"] == "EMBEDDING_AGGREGATOR_STORE")
    assert store.startswith(mounts[template["metadata"]["name"]] + "/")
    assert workload["spec"]["replicas"] == 2, "one active, one standing by"


def test_the_image_is_built_from_the_locks_alone() -> None:
    """Every package comes with a hash, none from a host that the file names, and no feature of BuildKit is needed."""
    installs = [line for line in DOCKERFILE.splitlines() if " install " in line and " pip " in line]
    assert installs
    assert all("--require-hashes" in line or "--no-index" in line for line in installs), installs
    assert "://" not in DOCKERFILE.replace("http://127.0.0.1", "")
    assert "--mount" not in DOCKERFILE
    for lock in ("requirements/image.txt", "requirements/build.txt"):
        text = (ROOT / lock).read_text(encoding="utf-8")
        assert "--hash=sha256:" in text
        assert "index-url" not in text


def test_workers_know_how_many_they_are() -> None:
    """Without Redis each keeps to its fraction of the provider's limits: one of as many as there are replicas."""
    sharers: dict[str, tuple[str, int]] = {}
    for workload in WORKLOADS:
        (container,) = pod(workload)["containers"]
        if container["args"][0] == "worker":
            environment = {each["name"]: each["value"] for each in container["env"]}
            name = workload["metadata"]["name"]
            sharers[name] = environment["EMBEDDING_LIMIT_SHARERS"], workload["spec"]["replicas"]
    assert len(sharers) == 2
    assert all(said == str(replicas) for said, replicas in sharers.values())
