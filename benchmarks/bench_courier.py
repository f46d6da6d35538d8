"""What the courier costs: the process through which an engine talks to its shard.

    exchange   from an engine's question to the shard's answer, through a courier, over a direct
               call of the actor by a driver; 50th and 99th percentile
    start      seconds until an engine can be asked, with the connector, over vLLM alone
    memory     of an engine with the connector and its courier, over vLLM alone (PSS: pages that
               several processes share count by their part); the arena is not counted

The model is tiny and the machine does nothing else: a start is mostly imports. Run as
``python -m benchmarks.bench_courier [--output FILE]``.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray

from benchmarks.table import Row, show, write
from lmkv_ray.actors import Cache, connect
from lmkv_ray.arena import this_process
from lmkv_ray.config import load_settings
from lmkv_ray.courier import Courier
from lmkv_ray.messages import Exchange, Hello, encode, encode_exchange
from tests.vllm.engine import Engine, EngineProcess
from tests.vllm.models import make_model

BATCHES, CALLS = 20, 100
STARTS = 2
ATTACHMENT = 1


class Observed(Engine):
    """An engine that says which process its courier is."""

    def courier(self) -> int:
        """The pid; 0: there is none."""
        connector = self.connector()
        return 0 if connector is None else int(connector._courier.pid)


def run() -> list[Row]:
    """All rows."""
    ray.init(address="local", num_cpus=2, configure_logging=False, include_dashboard=False)
    address = ray.get_runtime_context().gcs_address
    settings = {"ray_address": address, "capacity": "64MiB"}
    cache = connect(settings=load_settings(settings))
    try:
        return [*exchanges(cache, Courier(load_settings(settings))), *engines(settings)]
    finally:
        cache.stop()
        ray.shutdown()


def exchanges(cache: Cache, courier: Courier) -> list[Row]:
    """Rows of exchanges in which there is nothing to say."""
    shard = courier.shard(start=False)
    hello = Hello(
        engine_id="bench",
        owner=this_process(),
        space=1,
        model="m",
        slot_bytes=64 << 10,
        held=[],
        attachment=ATTACHMENT,
    )
    shard.call("hello", encode(hello)).result(10)
    message = encode_exchange(Exchange(engine_id="bench", attachment=ATTACHMENT))
    through, direct = [], []
    for _ in range(BATCHES):  # in turns, as the machine's mood changes
        through += _seconds(lambda: shard.call("exchange", message).result(10))
        direct += _seconds(lambda: ray.get(cache.shard.exchange.remote(message)))
    courier.close()
    rows = []
    for percent in (50, 99):
        value, floor = (
            1e6 * float(np.percentile(seconds, percent)) for seconds in (through, direct)
        )
        rows.append(Row(f"exchange, p{percent}", value, "us", floor, value / floor))
    return rows


def engines(settings: dict[str, str]) -> list[Row]:
    """Rows of starts and of memory; the median of a few engines of each kind."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    memory: dict[bool, list[float]] = {False: [], True: []}
    couriers: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory), "bfloat16")
        for _ in range(STARTS):
            for cached in (False, True):
                began = time.perf_counter()
                engine = EngineProcess(model, kind=Observed, connector=settings if cached else None)
                engine.wait_made()
                seconds[cached].append(time.perf_counter() - began)
                engine.call("wait_attached")
                engine.call("generate", [list(range(300))])
                courier = engine.call("courier")
                couriers += [_pss(courier)] if courier else []
                memory[cached].append(_pss(engine.pid) + (couriers[-1] if courier else 0))
                engine.close()
    alone, whole = (float(np.median(memory[cached])) for cached in (False, True))
    without, with_it = (float(np.median(seconds[cached])) for cached in (False, True))
    process = float(np.median(couriers))
    return [
        Row("start of an engine", with_it, "s", without, with_it / without),
        Row("memory of an engine and its courier", whole, "MiB", alone, whole / alone),
        Row("memory of the courier in it", process, "MiB", whole - alone, process / alone),
    ]


def _seconds(call: Callable[[], object]) -> list[float]:
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken


def _pss(pid: int) -> float:
    """MiB of a process, without memory files (the arena)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    parts = dict(re.findall(r"^(Pss\w*):\s+(\d+) kB", text, re.MULTILINE))
    return (int(parts["Pss"]) - int(parts["Pss_Shmem"])) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("build/courier.json"))
    arguments = parser.parse_args()
    rows = run()
    show(rows)
    write(rows, arguments.output)
