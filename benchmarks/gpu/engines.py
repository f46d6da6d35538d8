"""The engines under measurement: vLLM alone, and with each cache that can be had here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tests.vllm.engine import Engine, EngineProcess

GAIN = 3.0
"""Of every matrix of the random models: standard deviation times the root of its columns. So wide
that queries and keys select tokens, and one wrong byte of KV changes what is generated. (vLLM's own
dummy weights give constant logits.)"""

START_SECONDS = 1200


class Size(NamedTuple):
    """A model of random weights, and what is asked of it."""

    config: dict[str, Any]
    options: dict[str, Any]
    """Of the engine."""
    lengths: list[int]
    """Prompts, in tokens."""
    cache_gib: int
    """Host memory for each cache."""
    running: int
    """Requests that decode while another one loads."""


LLAMA_8B = Size(
    config={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
    },
    options={
        "dtype": "bfloat16",
        "block_size": 16,
        "enforce_eager": False,
        "max_model_len": 36_864,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.85,
        "max_num_seqs": 64,
    },
    lengths=[2_048, 8_192, 32_768],
    cache_gib=24,
    running=16,
)
"""Llama 3.1 8B's shape: 128 KiB of KV a token."""

SMALL = Size(
    config={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
    },
    options={"dtype": "float32"},
    lengths=[512, 1024],
    cache_gib=1,
    running=2,
)
"""For machines without a GPU: proves the measurement, says nothing of speed."""


class Contender(NamedTuple):
    """A cache for vLLM."""

    name: str
    transfer: dict[str, Any] | None
    """``KVTransferConfig``'s arguments; None: vLLM alone."""
    environment: dict[str, str]
    needs: str = "vllm"
    """The module it needs."""
    gpu_only: bool = False


def contenders(size: Size, ray_address: str) -> list[Contender]:
    """Who is measured; the first one is what the others are compared with."""
    nbytes = size.cache_gib << 30
    ours = {"capacity": nbytes, "ray_address": ray_address}
    return [
        Contender("vLLM alone", None, {}),
        Contender(
            "lmkv_ray",
            {
                "kv_connector": "LmkvConnector",
                "kv_connector_module_path": "lmkv_ray.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": ours,
                "kv_load_failure_policy": "recompute",
            },
            {},
        ),
        Contender(
            "OffloadingConnector",
            {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": nbytes},
            },
            {},
            gpu_only=True,
        ),
        Contender(
            "LMCache",
            {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
            {
                "LMCACHE_CHUNK_SIZE": "256",
                "LMCACHE_LOCAL_CPU": "True",
                "LMCACHE_MAX_LOCAL_CPU_SIZE": str(size.cache_gib),
            },
            needs="lmcache",
        ),
    ]


def missing(contender: Contender, *, gpu: bool) -> str:
    """Why a contender cannot be measured here; empty if it can."""
    if contender.gpu_only and not gpu:
        return "it runs on GPUs only"
    return "" if find_spec(contender.needs) else f"{contender.needs} is not installed"


def start(contender: Contender, size: Size, model: Path) -> EngineProcess:
    """Its engine, in a process of its own, ready."""
    options = dict(size.options)
    if contender.transfer is not None:
        options["kv_transfer_config"] = contender.transfer
    engine = EngineProcess(
        str(model),
        kind=WideEngine,
        environment=contender.environment,
        load_format=LOAD_FORMAT,
        **options,
    )
    try:
        engine.start("settle")
        engine.result(START_SECONDS)
    except BaseException:
        engine.close()
        raise
    return engine


def write_model(size: Size, directory: Path) -> Path:
    """A model directory that holds a configuration and no weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **size.config)
    config.save_pretrained(directory)
    return directory


LOAD_FORMAT = "lmkv_wide_random"


def register_wide_weights() -> None:
    """Make vLLM in this process know ``LOAD_FORMAT``: random weights, the same in each engine."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(LOAD_FORMAT)
    class WideLoader(DummyModelLoader):
        def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
            torch.manual_seed(0)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, GAIN / parameter.shape[-1] ** 0.5)
                else:
                    parameter.data.fill_(1)  # norms


class WideEngine(Engine):
    """An engine with wide random weights."""

    def __init__(self, model: str, **options: Any) -> None:
        register_wide_weights()
        super().__init__(model, **options)

    def settle(self) -> None:
        """Until what was computed is saved: steps go on, as they would in a server."""
        if (connector := self.core().scheduler.connector) is None:
            return
        if hasattr(connector, "_link"):
            self.wait_attached()
        for _ in range(3):  # a cache may put its saves off to later steps
            self.seconds([[1, 2, 3]], max_tokens=4)
        if hasattr(connector, "_link"):
            self.wait_saved()

    def steps_beside(
        self, running: Sequence[Sequence[int]], loaded: Sequence[int], steps: int
    ) -> tuple[list[float], list[float]]:
        """Seconds of decode steps of ``running``: alone, and while ``loaded`` is being loaded.

        The last step before ``loaded`` has its first token computes for it, and is left out.
        """
        from vllm import SamplingParams

        engine = self.llm().llm_engine

        def add(name: str, prompt: Sequence[int], tokens: int) -> None:
            params = SamplingParams(
                max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True
            )
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

        def step() -> tuple[float, set[str]]:
            began = time.perf_counter()
            outputs = engine.step()
            taken = time.perf_counter() - began
            return taken, {output.request_id for output in outputs}

        names = {f"running-{number}" for number in range(len(running))}
        for name, prompt in zip(sorted(names), running, strict=True):
            add(name, prompt, 8 * steps)
        seen: set[str] = set()
        while not names <= seen:
            seen |= step()[1]
        alone = [step()[0] for _ in range(steps)]
        add("loaded", loaded, 1)
        beside: list[float] = []
        while len(beside) < 4 * steps:
            taken, answered = step()
            if "loaded" in answered:
                break
            beside.append(taken)
        while engine.has_unfinished_requests():
            engine.step()
        self.drain()
        return alone, beside[:-1]
