"""``python -m tests.tiers.disk.crasher DIRECTORY KILLS SEED``: writers that are killed.

Each is a fork that stores, reads and clears chunks until it is killed by SIGKILL. After every kill
files are cut and bits are flipped; after every tenth another fork opens the tier and checks that
everything it serves is right. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Failure
from lmkv_ray.policies import LRU
from lmkv_ray.tiers.disk import DiskTier
from tests.tiers.harness import arrived, fetch, slots, some_keys, store

KEYS = some_keys(120, seed=9)
SPACES = 50
CAPACITY = 5 << 20
"""Room for 75 of the chunks."""


async def work(directory: Path, seed: int, ready: int) -> None:
    """Until killed; says when it is ready."""
    rng = np.random.default_rng(seed)
    tier = await open_tier(directory)
    os.close(ready)
    while True:
        keys = KEYS[rng.choice(len(KEYS), 6, replace=False)]
        await store(tier, keys, space=int(rng.integers(SPACES)) + 1)
        await fetch(tier, keys[:2], slots(2))
        await tier.clear(int(rng.integers(SPACES)) + 1, 0)


async def verify(directory: Path) -> dict[str, int]:
    """What the tier serves; fails if any of it is wrong."""
    tier = await open_tier(directory)
    for _ in range(2):
        into = slots(len(KEYS))
        held = await tier.lookup(KEYS, 1.0)
        outcomes = await fetch(tier, KEYS, into)
        for outcome, key, slot in zip(outcomes, KEYS, into, strict=True):
            assert not outcome.ok or arrived(slot, key), f"wrong bytes: {outcome}"
            assert outcome.failure in (None, Failure.MISSING, Failure.CORRUPT), outcome
            assert outcome.ok or not held[outcome.position] or outcome.failure == Failure.CORRUPT
        assert nbytes(directory) == tier.status().nbytes <= CAPACITY
        counters = tier.status().counters
    assert not any(outcome.failure == Failure.CORRUPT for outcome in outcomes), "served no more"
    await tier.close()
    return {"served": counters["read"], "corrupt": counters["read_corrupt"]}


def nbytes(directory: Path) -> int:
    """That files take on the medium."""
    return sum(path.stat().st_blocks * 512 for path in directory.glob("*/*"))


async def open_tier(directory: Path) -> DiskTier:
    tier = await DiskTier.open(directory, CAPACITY, make_policy=LRU, clock=SYSTEM_CLOCK)
    assert tier.status().problem is None
    return tier


def damage(directory: Path, rng: random.Random) -> int:
    """Cut some files, flip bits of others; returns how many."""
    files = sorted(directory.glob("??/*"))
    chosen = rng.sample(files, min(len(files), rng.randrange(4)))
    for path in chosen:
        size = path.stat().st_size
        with path.open("rb+") as file:
            if not size or rng.random() < 0.3:
                file.truncate(rng.randrange(size + 1))
                continue
            at = rng.choice([rng.randrange(size), rng.randrange(min(size, 64))])
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return len(chosen)


def main(directory: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    for kill in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            asyncio.run(work(directory, seed + kill, writer))
        os.close(writer)
        if rng.random() < 0.9:  # others are killed while they recover
            os.read(reader, 1)
        os.close(reader)
        time.sleep(rng.uniform(0, 0.03))  # into whatever it is doing
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        total["torn"] += len(list(directory.glob("tmp/*")))
        total["damaged"] += damage(directory, rng)
        if kill % 10 == 9:
            total.update(in_a_fork(directory))
    print(json.dumps(total | {"kills": kills}))


def in_a_fork(directory: Path) -> dict[str, int]:
    """``verify`` in a process of its own: this one must not have threads when it forks."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        result = asyncio.run(verify(directory))
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit("verification failed")
    answer: dict[str, int] = json.loads(text)
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
