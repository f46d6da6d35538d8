"""Hit rates of every policy on real traces: docs/policies.md and results/policies.json.

``python -m benchmarks.bench_policies [TRACES]`` takes some minutes, and gives the same figures
everywhere. It is not part of ``make bench``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import libcachesim

from benchmarks.table import rows_of, show, write
from lmkv_ray.policies import ARC, LRU, POLICIES, S3FIFO, Policy
from lmkv_ray.simulate import BELADY, Belady, Setup, Trace, read_trace, replay
from lmkv_ray.simulate.admissions import AdmissionRule

K = TypeVar("K")
V = TypeVar("V")
HitRates: TypeAlias = dict[tuple[str, int], dict[str, float]]
Oracle: TypeAlias = dict[tuple[str, int], dict[str, tuple[int, int]]]
Tiers: TypeAlias = dict[tuple[str, int, int], dict[str, tuple[float, float]]]

TRACES = Path("../shared/traces")
NAMES = ("conversation", "synthetic")
CAPACITIES = (1_000, 5_000, 10_000, 50_000)
TIERS = ((1_000, 10_000), (1_000, 50_000), (5_000, 50_000))
RULES = ("all", "second_hit", "hit_in_memory", "evicted")
EVERY = (*POLICIES, BELADY)
ORACLES = {
    "lru": libcachesim.LRU,
    "arc": libcachesim.ARC,
    "s3fifo": libcachesim.S3FIFO,
    BELADY: libcachesim.Belady,
}
RESULTS = Path("benchmarks/results/policies.json")
DOCS = Path("docs/policies.md")
BEGIN, END = "<!-- figures: bench_policies -->", "<!-- end of figures -->"


def main(folder: Path) -> None:
    """Measure, show, and write the results and the tables of the documentation."""
    with ProcessPoolExecutor() as pool:
        hit_rates = {
            (name, n): {p: pool.submit(_hit_rate, folder, name, n, p) for p in EVERY}
            for name in NAMES
            for n in CAPACITIES
        }
        tiers = {
            (name, memory, disk): {
                rule: pool.submit(_tiers, folder, name, memory, disk, rule) for rule in RULES
            }
            for name in NAMES
            for memory, disk in TIERS
        }
        oracle = {
            (name, n): {p: pool.submit(_oracle, folder, name, n, p) for p in ORACLES}
            for name in NAMES
            for n in CAPACITIES[:3]
        }
        report(_results(hit_rates), _results(oracle), _results(tiers))


def _results(table: dict[K, dict[str, Future[V]]]) -> dict[K, dict[str, V]]:
    return {key: {name: job.result() for name, job in row.items()} for key, row in table.items()}


@cache
def _trace(folder: Path, name: str) -> Trace:
    return read_trace(folder / f"mooncake_{name}.jsonl")


def report(hit_rates: HitRates, oracle: Oracle, tiers: Tiers) -> None:
    """Show the results, write them, and put the tables into the documentation."""
    rows = rows_of([*_hit_rate_rows(hit_rates), *_oracle_rows(oracle), *_tier_rows(tiers)])
    show(rows)
    write(rows, RESULTS)
    text = "\n".join(
        [*_hit_rate_table(hit_rates), "", *_oracle_table(oracle), "", *_tier_table(tiers)]
    )
    _insert(text)


def _hit_rate(folder: Path, name: str, memory: int, policy: str) -> float:
    return replay(_trace(folder, name), Setup(memory=memory, policy=policy)).hit_rate


def _tiers(folder: Path, name: str, memory: int, disk: int, rule: str) -> tuple[float, float]:
    """Hit rate, and chunks written to disk for each chunk asked for."""
    trace = _trace(folder, name)
    setup = Setup(memory=memory, disk=disk, admission=cast(AdmissionRule, rule))
    result = replay(trace, setup)
    chunk_bytes = setup.bytes_per_token * trace.chunk_tokens
    return result.hit_rate, result.written["disk"] / chunk_bytes / result.chunks


def _oracle(folder: Path, name: str, capacity: int, policy: str) -> tuple[int, int]:
    """Hits of single chunks at a fixed capacity: ours and libcachesim's."""
    asked = [key for request in _trace(folder, name).requests for key in reversed(request.keys)]
    position = [0]
    ours: Policy
    match policy:
        case "lru":
            ours = LRU()
        case "arc":
            ours = ARC(capacity)
        case "s3fifo":
            ours = S3FIFO(capacity)
        case _:
            ours = Belady.of(([key] for key in asked), lambda: position[0])
    theirs = ORACLES[policy](cache_size=capacity, hashpower=16)
    return _hits(ours, capacity, asked, position), _their_hits(theirs, asked)


def _hits(policy: Policy, capacity: int, asked: Sequence[bytes], position: list[int]) -> int:
    held: set[bytes] = set()
    hits = 0
    for position[0], key in enumerate(asked):
        if key in held:
            hits += 1
            policy.touched((key,))
            continue
        if isinstance(policy, Belady) and len(held) == capacity:
            # Knows what comes, and would send that away again.
            _evict(policy, held)
        policy.added(key)
        held.add(key)
        if len(held) > capacity:
            _evict(policy, held)
    return hits


def _evict(policy: Policy, held: set[bytes]) -> None:
    (victim,) = policy.victims(1)
    policy.removed(victim)
    held.remove(victim)


def _their_hits(cache: Any, asked: Sequence[bytes]) -> int:
    """Hits of a libcachesim cache, which is told when each chunk comes next."""
    never = (1 << 63) - 1
    following: dict[bytes, int] = {}
    next_use = [never] * len(asked)
    for i in range(len(asked) - 1, -1, -1):
        next_use[i] = following.get(asked[i], never)
        following[asked[i]] = i
    hits = 0
    for i, key in enumerate(asked):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = int.from_bytes(key, "little"), 1
        request.clock_time, request.next_access_vtime = i, next_use[i]
        hits += cache.get(request)
    return hits


def _row(name: str, value: float, unit: str, floor: float) -> dict[str, Any]:
    ratio = value / floor if floor else 1.0
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "floor": round(floor, 4),
        "ratio": round(ratio, 4),
    }


def _hit_rate_rows(rates: HitRates) -> Iterator[dict[str, Any]]:
    for (name, n), row in rates.items():
        best = max(rate for policy, rate in row.items() if policy != BELADY)
        for policy, rate in row.items():
            yield _row(f"{name}, {n} chunks, {policy}", rate, "hits of chunks; to the best", best)


def _oracle_rows(oracle: Oracle) -> Iterator[dict[str, Any]]:
    for (name, n), row in oracle.items():
        for policy, (ours, theirs) in row.items():
            yield _row(f"{name}, {n} single chunks, {policy}", ours, "hits; libcachesim", theirs)


def _tier_rows(tiers: Tiers) -> Iterator[dict[str, Any]]:
    for (name, memory, disk), row in tiers.items():
        base, base_written = row["all"]
        for rule, (rate, written) in row.items():
            where = f"{name}, memory {memory}, disk {disk}, {rule}"
            yield _row(where, rate, "hits of chunks; to all", base)
            yield _row(f"{where}, written", written, "of chunks asked for; to all", base_written)


def _hit_rate_table(rates: HitRates) -> Iterator[str]:
    yield "| trace | chunks | " + " | ".join(EVERY) + " |"
    yield "|---|---|" + "---|" * len(EVERY)
    for (name, n), row in rates.items():
        best = max(rate for policy, rate in row.items() if policy != BELADY)
        cells = [
            f"**{rate:.1%}**" if policy != BELADY and best - rate < 0.01 else f"{rate:.1%}"
            for policy, rate in row.items()
        ]
        yield f"| {name} | {n:,} | " + " | ".join(cells) + " |"


def _oracle_table(oracle: Oracle) -> Iterator[str]:
    yield "| trace | chunks | policy | our hits | libcachesim's |"
    yield "|---|---|---|---|---|"
    for (name, n), row in oracle.items():
        for policy, (ours, theirs) in row.items():
            yield f"| {name} | {n:,} | {policy} | {ours:,} | {theirs:,} |"


def _tier_table(tiers: Tiers) -> Iterator[str]:
    yield (
        "| trace | memory | disk | " + " | ".join(f"{rule}: hits, written" for rule in RULES) + " |"
    )
    yield "|---|---|---|" + "---|" * len(RULES)
    for (name, memory, disk), row in tiers.items():
        cells = [f"{rate:.1%}, {written:.2f}" for rate, written in row.values()]
        yield f"| {name} | {memory:,} | {disk:,} | " + " | ".join(cells) + " |"


def _insert(tables: str) -> None:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TRACES)
