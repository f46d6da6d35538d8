"""What a cache with nothing to do takes of the processor, beside a Ray cluster without one.

Two runs of a Ray cluster of this machine: in the first, two actors that do nothing and a process
that does nothing; in the second, the cache (shard and directory) and an engine's link with its
courier, attached and idle. Processor time of each kind of process over a minute, as a share of one
core, and the difference. Goal: 1 % in all. Run as ``python -m benchmarks.bench_idle``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

SECONDS = 60.0
SETTLE_SECONDS = 20.0
RESULTS = Path(__file__).parent / "results" / "idle.json"

NOTHING = """
import ray, sys, time
ray.init(include_dashboard=False, num_cpus=2, object_store_memory=80 << 20)
@ray.remote(num_cpus=0)
class Idle:
    async def ready(self): return 1
actors = [Idle.remote() for _ in range(2)]
ray.get([actor.ready.remote() for actor in actors])
import subprocess
driver = "import ray, time; ray.init(address='auto'); input()"
other = subprocess.Popen([sys.executable, "-c", driver], stdin=subprocess.PIPE)
time.sleep(10)
print("ready", flush=True)
input()
other.kill()
"""
CACHE = """
import ray, time
ray.init(include_dashboard=False, num_cpus=2, object_store_memory=80 << 20)
from lmkv_ray.actors import connect
from lmkv_ray.config import load_settings
settings = load_settings({"capacity": 64 << 20})
cache = connect(settings=settings)
from lmkv_ray.arena import this_process
from lmkv_ray.courier import Courier
from lmkv_ray.messages import Hello
from lmkv_ray.vllm.link.shard_link import ShardLink
courier = Courier(settings)
hello = Hello(engine_id="idle", owner=this_process(), space=1 << 32, model="none", slot_bytes=65536,
              held=[])
link = ShardLink(lambda: courier.shard(start=True), hello, want_slots=16,
                 period=settings.exchange_seconds)
while link.attachment is None:
    time.sleep(0.1)
print("ready", flush=True)
input()
link.stop()
courier.close()
cache.stop()
"""


def kind_of(line: str) -> str:
    """What a process is, by its command line."""
    for word, kind in (
        ("ShardActor", "shard"),
        ("DirectoryActor", "directory"),
        ("ray::Idle", "idle actors"),
        ("gcs_server", "GCS"),
        ("raylet", "raylet"),
        ("courier", "courier, or a driver"),
        ("ray.init(address", "courier, or a driver"),
        ("agent", "Ray's agents"),
        ("log_monitor", "Ray's agents"),
        ("ray::", "Ray's workers"),
        (" -c", "engine, or a driver"),
    ):
        if word in line:
            return kind
    return "other"


def measure(program: str) -> dict[str, float]:
    """Percent of a core by kind of process, while a program does nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        command = [sys.executable, "-c", f"exec(open({file.name!r}).read())"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as driver:
            assert driver.stdout is not None
            while "ready" not in driver.stdout.readline():
                if driver.poll() is not None:
                    raise RuntimeError("the program ended")
            time.sleep(SETTLE_SECONDS)
            before = times()
            began = time.monotonic()
            time.sleep(SECONDS)
            after, taken = times(), time.monotonic() - began
            driver.communicate("\n")
    used: defaultdict[str, float] = defaultdict(float)
    for pid, (kind, seconds) in after.items():
        used[kind] += seconds - before.get(pid, (kind, 0.0))[1]
    return {kind: 100 * seconds / taken for kind, seconds in used.items()}


def times() -> dict[int, tuple[str, float]]:
    """Processor seconds of the other processes of this session, and of what Ray started."""
    found = {}
    tick = os.sysconf("SC_CLK_TCK")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            values = (process / "stat").read_text().rpartition(")")[2].split()
            if os.getsid(int(process.name)) != os.getsid(0) and "ray" not in line:
                continue
        except OSError:
            continue
        used = (int(values[11]) + int(values[12])) / tick
        found[int(process.name)] = kind_of(line), used
    return found


def main() -> None:
    """Measure both, print a table and write the results."""
    without, cache = measure(NOTHING), measure(CACHE)
    table = Table("process", "without", "with the cache", "difference")
    kinds = sorted(without.keys() | cache.keys())
    rows = [(kind, without.get(kind, 0.0), cache.get(kind, 0.0)) for kind in kinds]
    rows.append(("all", sum(without.values()), sum(cache.values())))
    for kind, one, other in rows:
        table.add_row(kind, f"{one:.2f} %", f"{other:.2f} %", f"{other - one:+.2f}")
    Console(width=100).print(table)
    result = [
        {"process": kind, "without_percent": round(one, 2), "with_percent": round(other, 2)}
        for kind, one, other in rows
    ]
    RESULTS.write_text(json.dumps({"seconds": SECONDS, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
