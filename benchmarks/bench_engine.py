"""What a hit costs beyond vLLM's own, and what a miss costs at all.

In process, SmolLM2-135M in bfloat16, both cores bound for computing in every engine:

    hit    time to first token when the chunks come from the arena, minus that of vLLM's own
           prefix cache, for prompts of 1k to 7k tokens. Floor: the prompt's KV bytes over the copy
           bandwidth of one thread, measured beside it. Goal: 1.25 floors + 3 ms.
    miss   throughput and time to first token of prompts nobody has read, over those of vLLM
           without a connector, in pairs, Ray running beside both. Goal: within 2%.

Run as ``python -m benchmarks.bench_engine``.
"""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import Any

import numpy as np
import ray

from benchmarks.table import Row, show
from lmkv_ray import connect
from serve_apps.model import smollm2
from tests.vllm.engine import EngineProcess

LENGTHS = [1_024, 2_048, 4_096, 7_168]
BEYOND = 17
"""Tokens by which a prompt ends inside a block."""
KV_BYTES_PER_TOKEN = 23_040
DOCUMENTS = 3
REPEATS = 15
PAIRS = 15
LONG_PAIRS = 5
VOCABULARY = 49_152
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0,1",
    "OMP_NUM_THREADS": "2",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 8192,
    "max_num_batched_tokens": 2048,
    "environment": ENVIRONMENT,
}


def run() -> list[Row]:
    """Rows of both measurements."""
    model = str(smollm2())
    # Ray first, from here: what an engine starts would share the cores it is bound to.
    ray.init(address="local", num_cpus=2, configure_logging=False, include_dashboard=False)
    address = ray.get_runtime_context().gcs_address
    engine = EngineProcess(model, connector={"capacity": "1GiB", "ray_address": address}, **OPTIONS)
    alone = EngineProcess(model, **OPTIONS)
    try:
        engine.call("wait_attached")
        alone.call("wait_attached")
        return [*hits(engine), *misses(engine, alone)]
    finally:
        alone.close()
        engine.close()
        connect().stop()
        ray.shutdown()


def hits(engine: EngineProcess) -> list[Row]:
    """Extra milliseconds of a hit through the arena."""
    seeds, rows = itertools.count(), []
    for length in LENGTHS:
        own, ours, cold, floors = [], [], [], []
        for _ in range(DOCUMENTS):
            prompt = tokens(next(seeds), length + BEYOND)
            cold.append(engine.call("first_token", prompt))
            engine.call("wait_saved")
            floors.append(engine.call("copy_seconds", length * KV_BYTES_PER_TOKEN))
            for _ in range(REPEATS):
                own.append(engine.call("first_token", prompt))
                assert engine.call("reset")
                # After a reset the weights are looked at, once: no hit pays for that.
                engine.call("first_token", tokens(next(seeds), BEYOND))
                ours.append(engine.call("first_token", prompt))
        floor = 1e3 * median(floors)
        extra = 1e3 * median(a - b for a, b in zip(ours, own, strict=True))
        name = f"hit, {length} tokens"
        rows += [
            Row(f"{name}: more than vLLM's own prefix cache", extra, "ms", floor, extra / floor),
            Row(
                f"{name}: the same, over 1.25 floors + 3 ms",
                extra,
                "ms",
                1.25 * floor + 3,
                extra / (1.25 * floor + 3),
            ),
            Row(
                f"{name}: time to first token, over vLLM's own",
                1e3 * median(ours),
                "ms",
                1e3 * median(own),
                median(ours) / median(own),
            ),
            Row(
                f"{name}: cold, over the hit",
                1e3 * median(cold),
                "ms",
                1e3 * median(ours),
                median(cold) / median(ours),
            ),
        ]
    return rows


def misses(engine: EngineProcess, alone: EngineProcess) -> list[Row]:
    """Prompts without any reuse, with and without the connector, in turns."""
    first: dict[EngineProcess, list[float]] = {engine: [], alone: []}
    whole: dict[EngineProcess, list[float]] = {engine: [], alone: []}
    many: dict[EngineProcess, list[float]] = {engine: [], alone: []}
    for pair in range(PAIRS):
        for each in (engine, alone) if pair % 2 else (alone, engine):
            time.sleep(0.3)  # the other engine's threads stop spinning
            first[each].append(each.call("first_token", tokens(10_000 + pair, 1_100)))
            prompts = [tokens(20_000 + 8 * pair + i, 520) for i in range(4)]
            whole[each].append(each.call("seconds", prompts, max_tokens=16))
            if pair < LONG_PAIRS:
                prompts = [tokens(30_000 + 16 * pair + i, 1_024) for i in range(16)]
                many[each].append(each.call("seconds", prompts, max_tokens=16))
    return [
        Row(
            f"miss: {name}, over vLLM without connector",
            1e3 * median(times[engine]),
            "ms",
            1e3 * median(times[alone]),
            median(a / b for a, b in zip(times[engine], times[alone], strict=True)),
        )
        for name, times in (
            ("time to first token of 1,100 tokens", first),
            ("4 requests", whole),
            ("16 requests of 1,024 tokens, 16 out", many),
        )
    ]


def tokens(seed: int, n: int) -> list[int]:
    """A prompt that nobody has read."""
    made: list[int] = np.random.default_rng(seed).integers(1000, VOCABULARY, n).tolist()
    return made


if __name__ == "__main__":
    show(run())
