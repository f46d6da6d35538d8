"""What a prompt costs whose chunks are below memory.

In process, SmolLM2-135M in bfloat16, one shard with a disk tier (on the file system of --directory)
and one with a remote tier (a directory, through the same code as S3):

    cold   nobody has read the prompt
    disk   its chunks were evicted from memory and from the engine, and are on disk. Goal: at least
           5 times quicker than cold at 4k tokens.

Run as ``python -m benchmarks.bench_tiers [TIER...]``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import ray

from benchmarks.bench_engine import BEYOND, OPTIONS, tokens
from benchmarks.table import Row, show, write
from lmkv_ray import Cache, connect
from lmkv_ray.config import load_settings
from serve_apps.model import smollm2
from tests.vllm.engine import EngineProcess

TIERS = ("disk", "remote")
LENGTHS = [1_024, 2_048, 4_096, 7_168]
DOCUMENTS = 3
REPEATS = 3
OUTPUT = Path("build/tiers.json")


def run(names: Sequence[str] = TIERS) -> list[Row]:
    """Rows of these tiers; written to ``OUTPUT`` after each."""
    model = str(smollm2())
    ray.init(address="local", num_cpus=2, configure_logging=False, include_dashboard=False)
    address = ray.get_runtime_context().gcs_address
    rows: list[Row] = []
    try:
        for name in names:
            directory = Path(tempfile.mkdtemp(prefix="lmkv-bench-", dir="/tmp"))
            place = {
                "disk": {"disk_dir": str(directory / "chunks")},
                "remote": {"remote_url": f"file://{directory}"},
            }[name]
            settings = {
                "capacity": "2GiB",  # all documents: what is evicted unwritten is not stored
                "ray_address": address,
                "ray_namespace": f"bench-{name}",
                "tier_admission": "all",
                "stage_seconds": 30.0,
                **place,
            }
            cache = connect(settings=load_settings(settings))
            engine = EngineProcess(model, connector=settings, **OPTIONS)
            try:
                engine.call("wait_attached")
                rows += measure(name, engine, cache)
                write(rows, OUTPUT)
            finally:
                engine.close()
                cache.stop()
                shutil.rmtree(directory)
    finally:
        ray.shutdown()
    return rows


def measure(name: str, engine: EngineProcess, cache: Cache) -> list[Row]:
    """Times to first token, cold and from one tier."""
    rows, chunks = [], 0
    for length in LENGTHS:
        cold, warm = [], []
        for document in range(DOCUMENTS):
            prompt = tokens(30_000 + 100 * document + length, length + BEYOND)
            cold.append(engine.call("first_token", prompt))
            engine.call("wait_saved")
            keys = engine.call("keys", prompt)
            chunks += len(keys)
            _wait_until_stored(cache, chunks)
            engine.call("wait_peers")  # it asks for nothing before it knows of the tier
            for _ in range(REPEATS):
                cache.evict(keys)
                assert engine.call("reset")
                staged = cache.status().nodes[0].counters["staged"]
                warm.append(engine.call("first_token", prompt))
                staged = cache.status().nodes[0].counters["staged"] - staged
                assert staged == len(keys), f"{staged} of {len(keys)} chunks came from {name}"
        rows.append(
            Row(
                f"{length} tokens from {name}: how many times quicker than cold",
                1e3 * median(warm),
                "ms",
                1e3 * median(cold),
                median(cold) / median(warm),
            )
        )
    return rows


def _wait_until_stored(cache: Cache, chunks: int) -> None:
    """Until so many chunks were written to the tier."""
    give_up = time.monotonic() + 60
    while (tier := cache.status().nodes[0].tiers[0]).counters["stored"] < chunks:
        assert time.monotonic() < give_up, tier
        time.sleep(0.05)


if __name__ == "__main__":
    show(run(sys.argv[1:] or TIERS))
