"""Time to first token of a prompt that was read before, for each cache; and what a load disturbs.

The prompt is read once (cold); the cache has saved it; vLLM's own prefix cache is emptied; it is
read again. A hit is compared with vLLM's own prefix cache plus the prompt's KV bytes over the link.
Answers must be those of vLLM alone. Engines run one after the other: each has the GPU to itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from benchmarks.gpu.copies import Floors
from benchmarks.gpu.engines import (
    LLAMA_8B,
    SMALL,
    Contender,
    Size,
    contenders,
    missing,
    start,
    write_model,
)
from benchmarks.table import Outcome, Row
from lmkv_ray import connect
from tests.vllm.engine import EngineProcess

DOCUMENTS = 2
REPEATS = 5
BEYOND = 9
"""Tokens of a prompt beyond whole chunks, fewer than a block: so every cache serves the same tokens
as vLLM's own, and what is left to compute is the same."""
TOKENS = 8
"""Generated where answers are compared."""
STEPS = 100
"""Decode steps without a load."""

logger = logging.getLogger(__name__)

Cold = dict[int, float]
"""Seconds by prompt length."""
Answers = dict[tuple[int, int], tuple[int, ...]]
"""Tokens by prompt length and document."""


def run(floors: Floors, *, gpu: bool) -> Outcome:
    """All caches that can be had here."""
    size = LLAMA_8B if gpu else SMALL
    ray.init(address="local", num_cpus=2, configure_logging=False, include_dashboard=False)
    try:
        with TemporaryDirectory(prefix="lmkv-bench-") as directory:
            model = write_model(size, Path(directory))
            them = contenders(size, ray.get_runtime_context().gcs_address)
            return compare(them, size, floors, lambda each: start(each, size, model), gpu=gpu)
    finally:
        connect().stop()
        ray.shutdown()


def compare(
    them: Sequence[Contender],
    size: Size,
    floors: Floors,
    start: Callable[[Contender], EngineProcess],
    *,
    gpu: bool,
) -> Outcome:
    """One after the other."""
    outcome = Outcome([], [], [])
    reference = _Reference()
    for contender in them:
        if why := missing(contender, gpu=gpu):
            outcome.absent.append(f"{contender.name}: {why}")
            continue
        try:
            engine = start(contender)
            try:
                outcome.rows.extend(_measure(engine, contender, size, floors, reference))
            finally:
                engine.close()
        except Exception as error:  # one cache that fails must not cost the others
            logger.exception("%s failed", contender.name)
            outcome.failed.append(f"{contender.name}: {_first_line(error)}")
            if contender.transfer is None:
                break  # there is nothing to compare with
    return outcome


class _Reference:
    """What vLLM alone did."""

    def __init__(self) -> None:
        self.cold: Cold = {}
        self.own: Cold = {}
        self.answers: Answers = {}


def _measure(
    engine: EngineProcess,
    contender: Contender,
    size: Size,
    floors: Floors,
    reference: _Reference,
) -> list[Row]:
    alone = contender.transfer is None
    kv_bytes = _kv_bytes_per_token(size)
    rows: list[Row] = []
    _ask(engine, "first_token", tokens(size, 1, 600))  # kernels that are compiled at first use
    for length in size.lengths:
        colds, hits, equal = [], [], []
        for document in range(DOCUMENTS):
            prompt = tokens(size, 1000 * length + document, length + BEYOND)
            colds.append(_ask(engine, "first_token", prompt))
            for _ in range(REPEATS):
                if not alone:
                    _forget(engine)
                hits.append(_ask(engine, "first_token", prompt))
            if not alone:
                _forget(engine)
            answer = _ask(engine, "generate", [prompt], TOKENS)[0]
            key = (length, document)
            reference.answers.setdefault(key, answer.tokens)
            equal.append(answer.tokens == reference.answers[key] and answer.cached > 0)
        cold, hit = median(colds), median(hits)
        link = length * kv_bytes / floors.to_device
        if alone:
            reference.cold[length], reference.own[length] = cold, hit
        floor = reference.own[length] + (0 if alone else link)
        name = f"TTFT, {length:,} tokens, {contender.name}"
        rows += [
            Row(f"{name}, cold", 1e3 * cold, "ms", 1e3 * reference.cold[length],
                cold / reference.cold[length]),
            Row(f"{name}, hit", 1e3 * hit, "ms", 1e3 * floor, hit / floor),
            Row(f"{name}, hits that answer as vLLM alone", sum(equal), "of", DOCUMENTS,
                sum(equal) / DOCUMENTS),
        ]  # fmt: skip
    return rows + (_sensitivity(engine, size) if alone else _disturbance(engine, contender, size))


def _sensitivity(engine: EngineProcess, size: Size) -> list[Row]:
    """Whether equal answers prove anything: those to prompts that differ in the beginning only."""
    end = tokens(size, 2, size.lengths[0])
    prompts = [tokens(size, 3 + number, 16) + end for number in range(4)]
    answers = {answer.tokens for answer in _ask(engine, "generate", prompts, TOKENS)}
    name = "answers that differ when only the first 16 tokens do"
    return [Row(name, len(answers), "of", len(prompts), len(answers) / len(prompts))]


def _disturbance(engine: EngineProcess, contender: Contender, size: Size) -> list[Row]:
    """Decode steps of other requests while the longest prompt is loaded."""
    longest = size.lengths[-1]
    loaded = tokens(size, 1000 * longest, longest + BEYOND)
    _forget(engine)
    running = [tokens(size, 10 + number, 64) for number in range(size.running)]
    alone, beside = _ask(engine, "steps_beside", running, loaded, STEPS)
    if not beside:
        return []  # the load was over within one step
    name = f"decode step while {longest:,} tokens are loaded, {contender.name}"
    before, during = median(alone), median(beside)
    return [Row(name, 1e3 * during, "ms", 1e3 * before, during / before)]


def _forget(engine: EngineProcess) -> None:
    """Let the cache finish its saves, and empty vLLM's own."""
    _ask(engine, "settle")
    if not _ask(engine, "reset"):
        raise RuntimeError("vLLM's prefix cache could not be emptied: blocks are still in use")


def _ask(engine: EngineProcess, method: str, *args: Any) -> Any:
    engine.start(method, *args)
    return engine.result(600)


def tokens(size: Size, seed: int, n: int) -> list[int]:
    """A prompt."""
    made: list[int] = (
        np.random.default_rng(seed).integers(10, size.config["vocab_size"], n).tolist()
    )
    return made


def _kv_bytes_per_token(size: Size) -> int:
    shape, itemsize = size.config, 4 if size.options["dtype"] == "float32" else 2
    heads = shape["num_key_value_heads"] * shape["head_dim"]
    return int(2 * shape["num_hidden_layers"] * heads * itemsize)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
