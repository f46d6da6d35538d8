"""An OpenAI-compatible app of vLLM replicas that share one KV cache.

serve run serve_apps.llm:build_app model=PATH_OR_ID
serve run serve_apps/llm.yaml
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.llm import LLMConfig, build_openai_app

from lmkv_ray.config import load_settings

GIB = 1 << 30


class AppArgs(BaseModel):
    """What the app can be told. Only `model` is needed."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="Directory or Hugging Face id of the model.")
    model_id: str | None = Field(
        default=None,
        min_length=1,
        description="Name in requests; default: end of `model`.",
    )
    num_replicas: int = Field(default=1, ge=1, description="vLLM engines; all share the cache.")
    autoscaling_config: dict[str, Any] | None = Field(
        default=None,
        description="Ray Serve's, for instance {min_replicas: 0, max_replicas: 4}, instead of "
        "`num_replicas`: replicas come and go with the load, the cache stays.",
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Longest request in tokens; default: what the model allows."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="auto: gpu if a node of the cluster has one."
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of a replica on CPU; default: cores / most replicas.",
    )
    stream_interval_ms: float = Field(
        default=0,
        ge=0,
        description="Ray holds streamed tokens together this long; 0: none waits.",
    )
    cache: dict[str, Any] | Literal[False] = Field(
        default={},
        description="Settings of the cache (`lmkv config` lists them); false: no cache.",
    )
    engine_kwargs: dict[str, Any] = Field(default={}, description="More for vLLM's engine.")
    deployment: dict[str, Any] = Field(default={}, description="More for the Serve deployment.")
    env: dict[str, str] = Field(default={}, description="Environment variables of the replicas.")

    @field_validator("autoscaling_config")
    @classmethod
    def _understood_by_serve(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            unknown = sorted(value.keys() - AutoscalingConfig.model_fields.keys())
            if unknown:
                raise ValueError(f"Ray Serve knows no {', '.join(unknown)}")
            AutoscalingConfig.model_validate(value)
        return value

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> AppArgs:
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("give num_replicas or autoscaling_config, not both")
        return self

    @property
    def scaling(self) -> dict[str, Any]:
        """How many replicas there are, as a deployment of Serve is told."""
        given = self.autoscaling_config or self.deployment.get("autoscaling_config")
        if given is not None:
            return {"autoscaling_config": given}
        return {"num_replicas": self.num_replicas}

    @property
    def most_replicas(self) -> int:
        """Replicas that may run at once."""
        autoscaling = self.scaling.get("autoscaling_config")
        if autoscaling is None:
            return self.num_replicas
        return int(AutoscalingConfig.model_validate(autoscaling).max_replicas)

    @property
    def served_name(self) -> str:
        return self.model_id or self.model.rstrip("/").rsplit("/", 1)[-1]


def build_app(args: AppArgs | Mapping[str, Any]) -> Application:
    """The app for `serve.run`. Connects to Ray, or starts it, if that was not done.

    Raises pydantic.ValidationError for wrong arguments, ValueError for a model that is not there,
    lmkv_ray.errors.ConfigError for wrong settings of the cache.
    """
    args = AppArgs.model_validate(args)
    if args.model.startswith(("/", ".", "~")) and not Path(args.model).expanduser().is_dir():
        raise ValueError(
            f"model: no directory {args.model}. Give a directory with a config.json "
            "(the demo's: `python -m serve_apps.model`) or a Hugging Face id."
        )
    if not ray.is_initialized():
        ray.init(namespace="serve")
    on_cpu = args.accelerator == "cpu" or (
        args.accelerator == "auto" and not ray.cluster_resources().get("GPU")  # type: ignore[no-untyped-call]
    )
    config = llm_config(args, on_cpu=on_cpu, ray_address=ray.get_runtime_context().gcs_address)
    app: dict[str, Any] = {"llm_configs": [config]}
    if on_cpu:  # Ray's default, whole CPUs for ingresses, leaves no room on a small machine.
        app["ingress_deployment_config"] = {
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            "ray_actor_options": {"num_cpus": 0.25},
        }
    return build_openai_app(app)


def llm_config(args: AppArgs, *, on_cpu: bool, ray_address: str) -> LLMConfig:
    """Ray Serve's description of the replicas."""
    engine: dict[str, Any] = {"enable_prefix_caching": True}
    env: dict[str, str] = {}
    deployment = args.scaling
    placement: dict[str, Any] = {}
    model = Path(args.model).expanduser()
    if model.is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        threads = args.cpu_threads or max(1, (os.cpu_count() or 1) // args.most_replicas)
        # vLLM's own binding keeps cores back, and binds every replica to the same ones.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        engine |= {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "block_size": 32,  # the smallest that vLLM's fast CPU attention takes
            "kv_cache_memory_bytes": 2 * GIB,
        }
        placement = {"placement_group_config": {"bundles": [{"CPU": 0.5}]}}
        deployment["ray_actor_options"] = {"num_cpus": 0.25}
    if args.max_model_len is not None:
        engine["max_model_len"] = args.max_model_len
    if args.cache is not False:
        cache = {"ray_address": ray_address} | args.cache
        load_settings(cache)  # a wrong setting is an error here, not in a replica's log
        engine["kv_transfer_config"] = {
            "kv_connector": "LmkvConnector",
            "kv_connector_module_path": "lmkv_ray.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": cache,
        }
    return LLMConfig.model_validate(
        {
            "model_loading_config": {
                "model_id": args.served_name,
                "model_source": str(model.resolve()) if model.is_dir() else args.model,
            },
            "accelerator_config": {"kind": "cpu" if on_cpu else "gpu"},
            "engine_kwargs": engine | args.engine_kwargs,
            "deployment_config": deployment | args.deployment,
            "experimental_configs": {"stream_batching_interval_ms": args.stream_interval_ms},
            "runtime_env": {"env_vars": env | args.env},
        }
        | placement
    )
