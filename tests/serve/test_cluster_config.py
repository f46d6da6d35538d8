"""cluster_configs/ are what `ray up`, KubeRay and Kubernetes accept, with memory for the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ByteSize, TypeAdapter, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from lmkv_ray.config import Settings
from serve_apps.llm import AppArgs
from serve_apps.model import CHECKOUT
from tests.serve.kuberay import RayCluster, RayService

DIRECTORY = CHECKOUT / "cluster_configs"
CONFIGS = sorted(DIRECTORY.glob("*.yaml"))
KUBERNETES = "1.31"
SIZE = TypeAdapter(ByteSize)

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
each_manifest = pytest.mark.parametrize("kind", [RayCluster, RayService])


def manifest(name: str) -> Any:
    return yaml.safe_load((DIRECTORY / "kuberay" / f"{name}.yaml").read_text())


def checked(kind: type[RayCluster | RayService]) -> Any:
    name = {"RayCluster": "ray_cluster", "RayService": "ray_service"}[kind.__name__]
    return kind.model_validate(manifest(name))


def groups(kind: type[RayCluster | RayService]) -> list[Any]:
    spec = checked(kind).spec
    cluster = spec if kind is RayCluster else spec.rayClusterConfig
    return [cluster.headGroupSpec, *cluster.workerGroupSpecs]


@each_config
def test_ray_accepts_it(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))


@each_config
@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_gets_a_cache_that_the_settings_know(path: Path, role: str) -> None:
    start = start_command(path, role)
    given = {name.lower(): value for name, value in re.findall(r"LMKV_(\w+)=(\S+)", start)}
    settings = Settings(**given)
    assert settings.capacity is not None
    assert settings.capacity >= 1 << 30


@each_config
@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_asks_for_a_token_and_uses_the_ports_of_the_readme(path: Path, role: str) -> None:
    config = yaml.safe_load(path.read_text())
    assert "~/.ray/auth_token" in config["file_mounts"]
    start = start_command(path, role)
    assert "RAY_AUTH_MODE=token" in start
    readme = (DIRECTORY / "README.md").read_text()
    ports = re.findall(r"port=(\d+)", start)
    assert len(ports) >= 4
    assert all(port in readme for port in ports)


@each_manifest
def test_kuberay_and_kubernetes_accept_it(kind: type[RayCluster | RayService]) -> None:
    for group in groups(kind):
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group.template}
        kubernetes_validate.validate(pods, KUBERNETES, strict=True)


@each_manifest
def test_its_pods_have_shared_memory_for_the_cache(kind: type[RayCluster | RayService]) -> None:
    for group in groups(kind):
        spec = group.template["spec"]
        (container,) = spec["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        settings = Settings(capacity=env["LMKV_CAPACITY"])
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        (shm,) = (v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        size = SIZE.validate_python(shm["sizeLimit"] + "B")
        store = int(group.rayStartParams["object-store-memory"])
        assert settings.capacity is not None
        assert settings.capacity + store <= size
        assert size < SIZE.validate_python(container["resources"]["limits"]["memory"] + "B")


def test_the_service_runs_the_app() -> None:
    content = yaml.safe_load(checked(RayService).spec.serveConfigV2)
    (app,) = ServeDeploySchema.model_validate(content).applications
    assert app.import_path == "serve_apps.llm:build_app"
    AppArgs.model_validate(app.args)


@each_manifest
def test_a_misspelt_field_is_an_error(kind: type[RayCluster | RayService]) -> None:
    made = checked(kind).model_dump(exclude_none=True)
    spec = made["spec"].get("rayClusterConfig", made["spec"])
    spec["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(ValidationError, match="maxReplica"):
        kind.model_validate(made)


@each_manifest
@pytest.mark.parametrize("count", [-1, 1 << 31])
@pytest.mark.parametrize("field", ["replicas", "minReplicas", "maxReplicas", "numOfHosts"])
def test_a_count_kuberay_has_no_room_for_is_an_error(
    kind: type[RayCluster | RayService], field: str, count: int
) -> None:
    made = checked(kind).model_dump(exclude_none=True)
    spec = made["spec"].get("rayClusterConfig", made["spec"])
    spec["workerGroupSpecs"][0][field] = count
    with pytest.raises(ValidationError, match=field):
        kind.model_validate(made)


def test_kubernetes_accepts_the_network_policy() -> None:
    kubernetes_validate.validate(manifest("network_policy"), KUBERNETES, strict=True)


def start_command(path: Path, role: str) -> str:
    commands = yaml.safe_load(path.read_text())[f"{role}_start_ray_commands"]
    (start,) = (command for command in commands if "ray start" in command)
    assert isinstance(start, str)
    return start
