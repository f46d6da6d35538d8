"""A small real vLLM engine on the CPU, in this process or in one of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests import calls
from tests.vllm import model_runner_v2

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One thread, not bound: the same arithmetic in every engine, whatever else the machine does.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

if model_runner_v2.wanted():
    model_runner_v2.give_triton_a_driver()


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int
    """Prompt tokens that were not computed."""
    prompt: tuple[float, ...] = ()
    """Log probabilities of the prompt's tokens after the first, if they were asked for."""


class Engine:
    """A vLLM engine in this process.

    Args:
        connector: ``kv_connector_extra_config`` of our connector; None: vLLM alone.
        node_id: join the shard of this node, one of several on this machine.
    """

    def __init__(
        self,
        model: str,
        *,
        connector: dict[str, Any] | None = None,
        node_id: str | None = None,
        **options: Any,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import torch

        # Where torch was imported before, OMP_NUM_THREADS comes too late; and how attention is
        # split over threads decides the last bits.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if model_runner_v2.wanted():
            model_runner_v2.schedule_asynchronously()
        if node_id is not None:
            _join(node_id)
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LmkvConnector",
                kv_connector_module_path="lmkv_ray.vllm",
                kv_role="kv_both",
                kv_connector_extra_config=connector,
            )
        defaults = {
            "dtype": _dtype(model),
            "block_size": 32,
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 8,
        }
        self._llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            disable_log_stats=False,
            seed=0,
            **(defaults | options),
        )
        if options.get("pipeline_parallel_size", 1) > 1:
            self._llm.collective_rpc(_take_in)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 4,
        lora: Any = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Greedy answers; with ``prompt_logprobs=1`` or whatever else vLLM is to be asked.

        Args:
            prompts: in tokens.
            max_tokens: of an answer.
            lora: vLLM's LoRARequest, if an adapter is to be used.
            sampling: more parameters.
        """
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0,
                detokenize=False,
                logprobs=1,
                ignore_eos=True,
                **sampling,
            ),
            use_tqdm=False,
            lora_request=lora,
        )
        self.drain()
        return [
            Answer(
                tuple(o.outputs[0].token_ids),
                tuple(
                    d[t].logprob
                    for d, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
                ),
                o.num_cached_tokens,
                tuple(
                    d[t].logprob
                    for d, t in zip(o.prompt_logprobs or (), o.prompt_token_ids, strict=False)
                    if d is not None
                ),
            )
            for o in outputs
        ]

    def ask(self, prompt: Sequence[int], params: dict[str, Any], *, drain: bool = True) -> Any:
        """One request with ``kv_transfer_params``; vLLM's output."""
        from vllm import SamplingParams

        [output] = self._llm.generate(
            [{"prompt_token_ids": list(prompt)}],
            SamplingParams(
                max_tokens=2, detokenize=False, extra_args={"kv_transfer_params": params}
            ),
            use_tqdm=False,
        )
        if drain:
            self.drain()
        return output

    def seconds(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        """How long ``generate`` takes."""
        from vllm import SamplingParams

        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, detokenize=False, ignore_eos=True
        )
        began = time.perf_counter()
        self._llm.generate(asked, params, use_tqdm=False)
        taken = time.perf_counter() - began
        self.drain()
        return taken

    def first_token(self, prompt: Sequence[int]) -> float:
        """Seconds to the first token."""
        return self.seconds([prompt], max_tokens=1)

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """Keys of a prompt's chunks, as a request is told them."""
        output = self.ask(prompt, {"lmkv": {"keys": True}})
        return [bytes.fromhex(key) for key in output.kv_transfer_params["lmkv_keys"]]

    def wait_attached(self) -> None:
        """Until the connector, if there is one, has slots to save into."""
        if (connector := self.core().scheduler.connector) is not None:
            connector._content._thread.join(60)
            connector._scheduler._adopt()
            _wait_for(lambda: connector._link.attachment and connector._link.slots)

    def wait_peers(self) -> None:
        """Until the engine has heard that other nodes hold chunks."""
        _wait_for(lambda: self.connector()._link.peers > 0)

    def wait_saved(self) -> None:
        """Until every save is visible in the arena."""
        links = self.connector()._links
        _wait_for(lambda: all(link.slots.settled for link in links))

    def stop_in(self, copy: str) -> None:
        """Let this process stop (SIGSTOP) in the middle of its next "load" or "save", once."""
        from lmkv_ray.transfer.host_copier import HostCopier
        from lmkv_ray.transfer.targets import BlockTargets

        whole = getattr(HostCopier, copy)

        def halves(copier: HostCopier, targets: BlockTargets) -> None:
            setattr(HostCopier, copy, whole)
            half = len(targets.chunks) // 2
            first = (targets.chunks[:half], targets.indices[:half], targets.blocks[:half])
            whole(copier, BlockTargets(*first))
            os.kill(os.getpid(), signal.SIGSTOP)
            whole(copier, targets)

        setattr(HostCopier, copy, halves)

    def counted(self) -> dict[str, float]:
        """Our counters on vLLM's Prometheus endpoint; missed tokens by reason."""
        return {
            metric.labels.get("reason") or metric.name.removeprefix("vllm:lmkv_"): metric.value
            for metric in self._llm.get_metrics()
            if metric.name.startswith("vllm:lmkv_")
        }

    def copy_seconds(self, nbytes: int) -> float:
        """Median seconds in which one thread copies ``nbytes`` between ordinary buffers."""
        source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        taken = []
        for _ in range(7):
            began = time.perf_counter()
            np.copyto(target, source)
            taken.append(time.perf_counter() - began)
        return median(taken)

    def drain(self) -> None:
        """Step until saves are reported, as vLLM's own loop does outside of in-process mode."""
        core = self.core()
        connector = core.scheduler.connector
        deadline = time.monotonic() + 60
        while core.batch_queue or (connector is not None and connector.has_pending_push_work()):
            assert time.monotonic() < deadline, "it would step for ever"
            self._llm.llm_engine.step()

    def reset(self, *, connector: bool = False) -> bool:
        """Empty vLLM's own prefix cache (and ours)."""
        return bool(self._llm.reset_prefix_cache(reset_connector=connector))

    def connector(self) -> Any:
        """The scheduler's connector."""
        return self.core().scheduler.connector

    def core(self) -> Any:
        """VLLM's EngineCore."""
        return self._llm.llm_engine.engine_core.engine_core

    def llm(self) -> Any:
        """VLLM's LLM."""
        return self._llm

    def close(self) -> None:
        """Shut down, so that another engine can be made in this process."""
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self._llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()


class EngineProcess(calls.Caller):
    """An engine in a process of its own; calls the same methods through a pipe.

    Args:
        kind: its class.
        environment: variables on top of ``ENVIRONMENT``.
    """

    def __init__(
        self,
        model: str,
        *,
        kind: type[Engine] = Engine,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        super().__init__(ours)
        self.process = context.Process(
            target=_serve,
            args=(theirs, kind, model, ENVIRONMENT | (environment or {}), options),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def wait_stopped(self) -> None:
        """Until the process has stopped (see ``Engine.stop_in``)."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        _wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def resume(self) -> None:
        """Let a stopped process go on."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _dtype(model: str) -> str:
    """A model's own; vLLM would make bfloat16 of float32."""
    config = json.loads((Path(model) / "config.json").read_text())
    return str(config.get("dtype") or config["torch_dtype"])


def _take_in(worker: Any) -> None:
    """Give a later pipeline stage the buffers for what the stage before it sends.

    vLLM makes them in its warm-up, which it skips on the CPU in eager mode (0.32): without a
    connector, too, it fails its first step then.
    """
    from vllm.distributed import get_pp_group

    if not get_pp_group().is_first_rank:
        runner = worker.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


def _join(node_id: str) -> None:
    """A driver joins the first raylet of its machine; a test cluster has several."""
    from lmkv_ray.courier import client

    os.environ["TEST_NODE_ID"] = node_id
    client.PROGRAM = "tests.vllm.courier_of_node"


def _wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def _serve(
    pipe: Connection,
    kind: type[Engine],
    model: str,
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    os.environ.update(environment)
    calls.serve(pipe, lambda: kind(model, **options))
