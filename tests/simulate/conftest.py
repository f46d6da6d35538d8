from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lmkv_ray.simulate import Trace, TracedRequest


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """Conversations of three turns that share a system prompt, one request a second."""
    path = tmp_path / "trace.jsonl"
    lines = []
    for conversation in range(40):
        ids = [0, 1, *(1_000 * (conversation + 1) + i for i in range(12))]
        for turn in range(3):
            n = 4 + 4 * turn
            lines.append(
                {
                    "timestamp": 1_000 * (conversation + 20 * turn),
                    "input_length": 512 * n,
                    "output_length": 10,
                    "hash_ids": ids[:n],
                }
            )
    lines.sort(key=lambda line: line["timestamp"])  # type: ignore[arg-type, return-value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trace_of(*prompts: list[int], every: float = 1.0) -> Trace:
    """Prompts of chunks, one after the other; a chunk is 10 tokens."""
    return Trace(
        [
            TracedRequest(i * every, 10 * len(ids), [n.to_bytes(16, "little") for n in ids])
            for i, ids in enumerate(prompts)
        ],
        chunk_tokens=10,
    )


@pytest.fixture
def skewed() -> Trace:
    """Prompts of four chunks behind a few popular heads."""
    rng = random.Random(0)
    prompts = []
    for _ in range(1_500):
        head = int(rng.paretovariate(0.7)) % 200
        tail = int(rng.paretovariate(0.7)) % 20
        prompts.append(
            [head, 1_000 + head, 10_000 + 100 * head + tail, 100_000 + 100 * head + tail]
        )
    return trace_of(*prompts)
