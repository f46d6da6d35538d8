"""The app's arguments, and what ray.serve.llm is told."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from lmkv_ray.errors import ConfigError
from serve_apps import measure
from serve_apps.llm import AppArgs, build_app, llm_config
from serve_apps.model import CHECKOUT

ADDRESS = "192.0.2.1:6379"


def config(on_cpu: bool = True, **args: Any) -> Any:
    return llm_config(AppArgs(**{"model": "org/name"} | args), on_cpu=on_cpu, ray_address=ADDRESS)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({}, "model"),
        ({"model": ""}, "model"),
        ({"model": "m", "num_replicas": 0}, "num_replicas"),
        ({"model": "m", "accelerator": "tpu"}, "accelerator"),
        ({"model": "m", "cache": True}, "cache"),
        ({"model": "m", "replicas": 2}, "replicas"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=f"(?m)^{field}"):
        build_app(args)


def test_a_directory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no directory \./nowhere"):
        build_app({"model": "./nowhere"})


def test_a_wrong_setting_of_the_cache_is_an_error() -> None:
    with pytest.raises(ConfigError, match="capacty"):
        config(cache={"capacty": "1GiB"})


def test_arguments_of_the_command_line_are_strings() -> None:
    args = AppArgs.model_validate({"model": "m", "num_replicas": "2", "max_model_len": "512"})
    assert (args.num_replicas, args.max_model_len) == (2, 512)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"model": "org/name"}, "name"),
        ({"model": "/models/name/"}, "name"),
        ({"model": "org/name", "model_id": "mine"}, "mine"),
    ],
)
def test_the_name_in_requests(args: dict[str, str], name: str) -> None:
    assert AppArgs(**args).served_name == name


def test_the_connector_gets_the_cluster_and_the_settings() -> None:
    transfer = config(cache={"capacity": "1GiB"}).engine_kwargs["kv_transfer_config"]
    assert transfer == {
        "kv_connector": "LmkvConnector",
        "kv_connector_module_path": "lmkv_ray.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"ray_address": ADDRESS, "capacity": "1GiB"},
    }


def test_without_a_cache_there_is_no_connector() -> None:
    assert "kv_transfer_config" not in config(cache=False).engine_kwargs


def test_a_cpu_gets_what_vllm_needs_on_one() -> None:
    made = config(num_replicas=2, cpu_threads=3)
    assert made.engine_kwargs["block_size"] == 32
    assert made.engine_kwargs["dtype"] == "bfloat16"
    assert made.runtime_env["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert made.runtime_env["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    cpus = made.placement_group_config["bundles"][0]["CPU"]
    assert 2 * (cpus + made.deployment_config["ray_actor_options"]["num_cpus"]) < 2
    assert config().runtime_env["env_vars"]["OMP_NUM_THREADS"] == str(os.cpu_count())


def test_a_gpu_is_left_to_vllm() -> None:
    made = config(on_cpu=False)
    assert made.accelerator_config.kind == "gpu"
    assert set(made.engine_kwargs) == {"enable_prefix_caching", "kv_transfer_config"}
    assert made.placement_group_config is None


def test_what_the_user_gives_wins(tmp_path: Path) -> None:
    made = config(
        model=str(tmp_path),
        engine_kwargs={"block_size": 64},
        deployment={"num_replicas": 5},
        env={"HF_HUB_OFFLINE": "0", "MY": "1"},
    )
    assert made.engine_kwargs["block_size"] == 64
    assert made.deployment_config["num_replicas"] == 5
    assert made.runtime_env["env_vars"]["HF_HUB_OFFLINE"] == "0"
    assert made.runtime_env["env_vars"]["MY"] == "1"


def test_the_yaml_is_one_that_serve_and_the_app_accept() -> None:
    content = yaml.safe_load((CHECKOUT / "serve_apps" / "llm.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    (app,) = schema.applications
    assert app.import_path == "serve_apps.llm:build_app"
    args = AppArgs.model_validate(app.args)
    llm_config(args, on_cpu=True, ray_address=ADDRESS)


def test_the_demo_is_an_app(smollm2: Path) -> None:
    made = llm_config(measure.app_args(smollm2, cache=True), on_cpu=True, ray_address=ADDRESS)
    assert made.deployment_config["num_replicas"] == 2
    # Whole blocks and a rest, so that vLLM's own hit and ours end at the same token.
    assert all(n % made.engine_kwargs["block_size"] for n in measure.LENGTHS)
    assert max(measure.LENGTHS) + measure.ANSWER_TOKENS <= 32 * measure.ENGINE_BLOCKS
    assert 2 * sum(measure.LENGTHS) - max(measure.LENGTHS) > 32 * measure.ENGINE_BLOCKS


def test_replicas_come_and_go_by_the_load() -> None:
    scaling = {"min_replicas": 0, "max_replicas": 4}
    made = config(on_cpu=True, autoscaling_config=scaling)
    assert made.deployment_config["autoscaling_config"] == scaling
    assert "num_replicas" not in made.deployment_config
    given = config(deployment={"autoscaling_config": scaling})
    assert "num_replicas" not in given.deployment_config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"autoscaling_config": {"max": 3}}, "Ray Serve knows no max"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas"),
        ({"autoscaling_config": {}, "num_replicas": 2}, "not both"),
    ],
)
def test_wrong_autoscaling_is_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AppArgs(model="m", **args)
