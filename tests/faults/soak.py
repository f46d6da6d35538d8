"""``make soak``: mixed traffic with random faults, for as long as you like; nothing may grow.

What is watched are sums over all processes of the hosts that run our code, the cache's and the
engines': whatever a killed process leaves behind is in them. Ray's own are shown beside them: its
log monitor keeps a file of each worker that has died, and its head remembers it. The result is
written as JSON, with a sample a minute, and as a page beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path as File
from statistics import median

from benchmarks.table import Row, show
from tests.faults.lab import Lab
from tests.hosts import Host, Path

DOCUMENTS, CHUNKS = 48, 8
"""What is asked for: more than one arena holds, so that chunks are evicted all the time."""
FAULT_SECONDS = (4.0, 12.0)
"""Between two faults."""
SAMPLE_SECONDS = 5.0
HEALTHY_SECONDS = 60.0
WARM_UP = 0.2
"""Share of the time after which nothing may grow any more."""
GROWTH = 1.1
"""Allowed of a median, late over early: restarted processes are young or old by chance."""

HEAD = """# Soak of {minutes:.0f} minutes

Made by `make soak`, {when}, seed {seed}: two hosts with Ray, a cache and an engine each
(`tests/hosts`), requests without pause, a random fault every few seconds. Every answer had the
right bytes and came in time, and the cache was healthy at the end. Sums are over the processes of
both hosts that run our code, and over Ray's own; medians of early and late samples. None of ours
may grow by more than {growth:.0%}.

| | value | compared with | ratio |
|---|---:|---:|---:|"""

OURS = "[S]hardActor|[D]irectoryActor|[l]mkv_ray|[t]ests.hosts.remote"
"""What command lines of our processes have in them; no command that looks for it has it."""
SUMS = f"""
sums() {{
    cat $(echo "$1" | sed 's|$|/status|') 2> /dev/null |
        awk '/^RssAnon/ {{sum += $2}} END {{print sum * 1024}}'
    ls $(echo "$1" | sed 's|$|/fd|') 2> /dev/null | grep -c '^[0-9]'
}}
ours=$(grep -alE '{OURS}' /proc/[0-9]*/cmdline 2> /dev/null | sed 's|/cmdline||')
others=$(ls -d /proc/[0-9]* | grep -vxF "$ours")
sums "$ours"
echo "$ours" | wc -l
df --output=used -B1 /dev/shm | tail -n 1
sums "$others"
"""


@dataclass(frozen=True)
class Sample:
    """Sums over the processes of all hosts: ours, and Ray's own."""

    at: float
    """Seconds since the begin."""
    rss: float
    """Bytes, without shared memory."""
    files: float
    processes: float
    shared_memory: float
    """Bytes in /dev/shm."""
    ray_rss: float
    ray_files: float


def grown(samples: Sequence[Sample]) -> list[Row]:
    """Of each sum the median late over the median early; what it does at first does not count."""
    settled = samples[int(len(samples) * WARM_UP) :]
    third = max(len(settled) // 3, 1)
    rows = []
    for i, field in enumerate(fields(Sample)[1:], 1):
        early, late = (
            median(astuple(sample)[i] for sample in part)
            for part in (settled[:third], settled[-third:])
        )
        rows.append(Row(f"soak: {field.name}, late", late, "", early, late / early))
    return rows


def leaking(samples: Sequence[Sample]) -> list[Row]:
    """What of ours has grown too much."""
    return [row for row in grown(samples) if row.ratio > GROWTH and " ray_" not in row.name]


class Soak:
    """Args: what to try it on, and the seed of all that is random."""

    def __init__(self, lab: Lab, seed: int = 0) -> None:
        self._lab = lab
        self._random = random.Random(seed)
        self._documents = [lab.new_document() for _ in range(DOCUMENTS)]
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self.faults: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self._began = 0.0
        self.requests = self.chunks = self.hits = 0
        self.slowest = 0.0

    def run(self, seconds: float) -> None:
        """Ask and break things for so long; then all must be well again.

        Raises:
            AssertionError: an answer was wrong or late, or the cache did not get well again.
        """
        self._began = fault = sample = time.monotonic()
        end = self._began + seconds
        while (now := time.monotonic()) < end:
            if now >= fault:
                self._break_something()
                fault = now + self._random.uniform(*FAULT_SECONDS)
            if now >= sample:
                self.samples.append(self._sample())
                sample = now + SAMPLE_SECONDS
            self._mend(now)
            self._ask_all()
        self._mend(float("inf"))
        self._lab.wait_healthy(HEALTHY_SECONDS)
        self._lab.eventually(lambda: not self._lab.left_behind())

    def rows(self) -> list[Row]:
        """What was asked, answered and broken, and what grew."""
        rows = [
            Row("soak: requests", self.requests, "", self.requests, 1.0),
            Row("soak: chunks hit, of all", self.hits, "chunks", self.chunks, self._hit_rate),
            Row("soak: slowest answer", self.slowest, "s", self._deadline, self._lateness),
        ]
        rows += [Row(f"soak: {name}", n, "times", n, 1.0) for name, n in self.faults.items()]
        return rows + grown(self.samples)

    def check(self) -> None:
        """Nothing grew.

        Raises:
            AssertionError: something did.
        """
        leaks = leaking(self.samples)
        assert not leaks, f"these grew: {leaks}"

    @property
    def _hit_rate(self) -> float:
        return self.hits / max(self.chunks, 1)

    @property
    def _deadline(self) -> float:
        return float(self._lab.settings["stage_seconds"])

    @property
    def _lateness(self) -> float:
        return self.slowest / self._deadline

    def _ask_all(self) -> None:
        """One request on each engine, at the same time; some documents are asked for often."""
        for engine in self._lab.engines:
            rank = min(int(self._random.paretovariate(0.7)) - 1, DOCUMENTS - 1)
            engine.start("request", self._documents[rank], CHUNKS)
        for engine in self._lab.engines:
            answer = self._lab.check(engine.result())
            self.requests += 1
            self.chunks += CHUNKS
            self.hits += answer.hits
            self.slowest = max(self.slowest, answer.seconds)

    def _break_something(self) -> None:
        number = self._random.randrange(len(self._lab.engines))
        host = self._lab.hosts[number]
        match self._random.choice(["shard", "directory", "freeze", "engine", "cut", "line"]):
            case "shard":
                self._kill(host, "ShardActor")
            case "directory":
                self._kill(*self._where_directory(host))
            case "freeze":
                self._freeze(host)
            case "engine":
                self._lab.replace_engine(number)
                self.faults["engines killed"] += 1
            case "cut":
                self._lab.hosts.cut(host)
                self._heal_after(self._random.uniform(0.5, 3), "cuts")
            case "line":
                self._lab.hosts.degrade(Path(delay=0.05, loss=0.02))
                self._heal_after(self._random.uniform(2, 8), "bad lines")

    def _where_directory(self, host: Host) -> tuple[Host, str]:
        kind = "DirectoryActor"
        here = [h for h in self._lab.hosts if self._lab.actor_pid(h, kind)]
        return (here or [host])[0], kind

    def _kill(self, host: Host, kind: str) -> None:
        if pid := self._lab.actor_pid(host, kind):
            host.kill(pid)
            self.faults[f"{kind} killed"] += 1

    def _freeze(self, host: Host) -> None:
        if not (pid := self._lab.actor_pid(host, "ShardActor")):
            return
        resume = self._lab.freeze(host, pid)
        self._undo.append((time.monotonic() + self._random.uniform(0.5, 4), resume))
        self.faults["shards frozen"] += 1

    def _heal_after(self, seconds: float, what: str) -> None:
        self._undo.append((time.monotonic() + seconds, self._lab.hosts.heal))
        self.faults[what] += 1

    def _mend(self, now: float) -> None:
        for _, undo in [entry for entry in self._undo if entry[0] <= now]:
            undo()
        self._undo = [entry for entry in self._undo if entry[0] > now]

    def _sample(self) -> Sample:
        sums = [[float(n) for n in host.run(SUMS).split()] for host in self._lab.hosts]
        at = time.monotonic() - self._began
        return Sample(at, *(sum(column) for column in zip(*sums, strict=True)))


def write(soak: Soak, seconds: float, seed: int, path: File) -> None:
    """Write the result: ``path``, and a page of the same name beside it."""
    minutes = {int(sample.at // 60): sample for sample in soak.samples}
    result = {
        "seconds": seconds,
        "seed": seed,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": [row._asdict() for row in soak.rows()],
        "samples": [asdict(sample) for sample in minutes.values()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    lines = [HEAD.format(minutes=seconds / 60, seed=seed, growth=GROWTH - 1, when=result["when"])]
    for row in soak.rows():
        value, floor = f"{row.value:,.4g} {row.unit}".strip(), f"{row.floor:,.4g}"
        lines.append(f"| {row.name.removeprefix('soak: ')} | {value} | {floor} | {row.ratio:.2f} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Soak, show and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=File, default=File("build/soak.json"))
    options = parser.parse_args()
    lab = Lab(2)
    try:
        soak = Soak(lab, options.seed)
        soak.run(options.seconds)
    finally:
        lab.close()
    show(soak.rows())
    write(soak, options.seconds, options.seed, options.output)
    soak.check()


if __name__ == "__main__":
    main()
