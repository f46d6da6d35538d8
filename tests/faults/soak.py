"""``make soak``: mixed traffic with random faults, for as long as you like; nothing may grow.

What is watched are sums over all processes of a host, the cache's, Ray's and the engines': whatever
a killed process leaves behind is in them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path as File
from statistics import median

from benchmarks.table import Row, show, write
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
GROWTH = 1.15
"""Allowed of a median, late over early: restarted processes are young or old by chance."""

SUMS = (
    "cat /proc/[0-9]*/status 2> /dev/null | awk '/^RssAnon/ {sum += $2} END {print sum * 1024}';"
    "ls /proc/[0-9]*/fd 2> /dev/null | grep -c '^[0-9]';"
    "ls -d /proc/[0-9]* | wc -l;"
    "df --output=used -B1 /dev/shm | tail -n 1"
)


@dataclass(frozen=True)
class Sample:
    """Sums over the processes of all hosts."""

    rss: float
    """Bytes, without shared memory."""
    files: float
    processes: float
    shared_memory: float
    """Bytes in /dev/shm."""


class Soak:
    """Args: what to try it on, and the seed of all that is random."""

    def __init__(self, lab: Lab, seed: int = 0) -> None:
        self._lab = lab
        self._random = random.Random(seed)
        self._documents = [lab.new_document() for _ in range(DOCUMENTS)]
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self.faults: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.requests = self.chunks = self.hits = 0
        self.slowest = 0.0

    def run(self, seconds: float) -> None:
        """Ask and break things for so long; then all must be well again.

        Raises:
            AssertionError: an answer was wrong or late, or the cache did not get well again.
        """
        end = time.monotonic() + seconds
        fault = sample = time.monotonic()
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
        """What grew: the median late over the median early."""
        settled = self.samples[int(len(self.samples) * WARM_UP) :]
        early, late = settled[: len(settled) // 3], settled[-(len(settled) // 3) :]
        rows = [
            Row("soak: requests", self.requests, "", self.requests, 1.0),
            Row("soak: chunks hit, of all", self.hits, "chunks", self.chunks, self._hit_rate),
            Row("soak: slowest answer", self.slowest, "s", self._deadline, self._lateness),
        ]
        rows += [Row(f"soak: {name}", n, "times", n, 1.0) for name, n in self.faults.items()]
        for i, field in enumerate(fields(Sample)):
            before, after = (median(astuple(s)[i] for s in part) for part in (early, late))
            rows.append(Row(f"soak: {field.name}, late", after, "", before, after / before))
        return rows

    def check(self) -> None:
        """Nothing grew."""
        grown = [row for row in self.rows() if row.name.endswith("late") and row.ratio > GROWTH]
        assert not grown, f"these grew: {grown}"

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
        return Sample(*(sum(column) for column in zip(*sums, strict=True)))


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
    write(soak.rows(), options.output)
    soak.check()


if __name__ == "__main__":
    main()
