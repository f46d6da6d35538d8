"""How fast the disk tier reads and writes, and how soon it knows what it has after a crash.

    write     from arena slots to published files, against plain O_DIRECT writes of the same slots
    read      verified, into arena slots, against plain O_DIRECT reads of the same files
    recover   open a directory of 100,000 chunks; seconds, at most 10

The plain reader and writer have as many requests under way, with as large blocks, one file a chunk
as well, and do nothing else (our writer has one thread more, for checksums). Both take
turns, a batch each, so that a noisy disk disturbs both alike. On the file system of the temporary
directory (TMPDIR); needs 1.5 GiB there. Run as ``python -m benchmarks.bench_disk``.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.table import rows_of, show
from lmkv_ray.arena import ArenaWriter, this_process
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Fetch
from lmkv_ray.keys import key_list
from lmkv_ray.policies import LRU
from lmkv_ray.tiers import TierChunk
from lmkv_ray.tiers.cipher import PLAIN
from lmkv_ray.tiers.disk import DiskTier
from lmkv_ray.tiers.format import PAGE, Label, file_bytes

SIZES = [512 << 10, 2 << 20, 8 << 20]
TOTAL = 512 << 20
BATCH = 64 << 20
"""What one turn moves."""
ROUNDS = 3
THREADS = 4
GOAL = 0.85
FILES = 100_000
RECOVER_GOAL_S = 10.0
WITHIN = 600.0

Row = dict[str, Any]
Turn = Callable[[slice], Coroutine[Any, Any, float]]
"""Moves some of the chunks; returns the seconds it took."""


def run() -> list[Row]:
    """All figures, as rows {name, value, unit, floor, ratio}.

    ``ratio`` is ours / plain for transfers (0.85 or more is wanted), floor / value for recovery.
    """
    with tempfile.TemporaryDirectory(prefix="lmkv-bench-") as path:
        rows = [row for size in SIZES for row in asyncio.run(transfers(Path(path), size))]
        return [*rows, asyncio.run(recovery(Path(path)))]


async def transfers(path: Path, size: int) -> list[Row]:
    """Write and read, in turns with the plain way."""
    count = TOTAL // size
    keys = np.random.default_rng(size).integers(0, 2**64, (count, 2), dtype=np.uint64)
    arena = ArenaWriter.create("benchdisk", TOTAL, extent_bytes=64 << 20)
    extents = range(TOTAL // (64 << 20))
    places = np.concatenate([arena.assign_extent(extent, size) for extent in extents])
    arena.reserve(places, this_process())
    slots = [arena.payload(place) for place in places.tolist()]
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    for slot in slots:
        slot[:] = content
    tier = await DiskTier.open(
        path / "tier", 2 * TOTAL, make_policy=LRU, clock=SYSTEM_CLOCK, threads=THREADS
    )

    async def write(part: slice) -> float:
        names = key_list(keys[part])
        pairs = zip(names, slots[part], strict=True)
        chunks = [TierChunk(key, part.start + 1, slot, lambda: True) for key, slot in pairs]
        await tier.clear(part.start + 1, 0)
        while not tier.settled:  # noqa: ASYNC110 (a tier has no event for it)
            await asyncio.sleep(0.01)
        begin = time.perf_counter()
        assert all(await tier.store(chunks))
        return time.perf_counter() - begin

    async def read(part: slice) -> float:
        begin = time.perf_counter()
        async with contextlib.aclosing(
            tier.fetch(Fetch(keys[part], slots[part], WITHIN))
        ) as outcomes:
            async for outcome in outcomes:
                assert outcome.ok, outcome
        return time.perf_counter() - begin

    batch = BATCH // size
    spaces = [i // batch * batch + 1 for i in range(count)]  # each batch has one, to be cleared
    labels = map(Label, key_list(keys), spaces, [size] * count)
    ours = [path / "tier" / label.path(PLAIN) for label in labels]
    others = [path / "plain" / str(i) for i in range(count)]
    others[0].parent.mkdir()
    write_flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT
    plain_write = _plain(THREADS // 2, others, slots, write_flags, os.pwritev)
    plain_read = _plain(THREADS, ours, slots, os.O_RDONLY | os.O_DIRECT, os.preadv)
    name = f"chunks of {size >> 10} KiB"
    rows = [
        await _compare(f"disk: write {name}", write, plain_write, size),
        await _compare(f"disk: read {name}", read, plain_read, size),
    ]
    await tier.clear(None, 0)
    await tier.close()
    shutil.rmtree(path / "plain")
    arena.close()
    return rows


async def recovery(path: Path) -> Row:
    """Open a directory that somebody else left; its files are sparse."""
    await (await DiskTier.open(path / "many", 1 << 40, make_policy=LRU, clock=SYSTEM_CLOCK)).close()
    nbytes = 2 << 20
    rng = np.random.default_rng(1)
    for key in key_list(rng.integers(0, 2**64, (FILES, 2), dtype=np.uint64)):
        file = path / "many" / Label(key, 1, nbytes).path(PLAIN)
        file.touch()
        os.truncate(file, file_bytes(nbytes, 0))
    begin = time.perf_counter()
    tier = await DiskTier.open(path / "many", 1 << 40, make_policy=LRU, clock=SYSTEM_CLOCK)
    value = time.perf_counter() - begin
    assert tier.status().chunks == FILES
    await tier.close()
    return {
        "name": f"disk: recover {FILES} chunks",
        "value": round(value, 2),
        "unit": "s",
        "floor": RECOVER_GOAL_S,
        "ratio": round(RECOVER_GOAL_S / value, 2),
    }


def _plain(
    threads: int,
    files: list[Path],
    slots: list[np.ndarray[Any, Any]],
    flags: int,
    call: Callable[[int, list[memoryview], int], int],
) -> Turn:
    """What can be had: one system call a file, and nothing else."""
    header = memoryview(mmap.mmap(-1, PAGE)) if flags & os.O_WRONLY == 0 else None

    def move(i: int) -> None:
        fd = os.open(files[i], flags, 0o600)
        buffers = [slots[i].data] if header is None else [header, slots[i].data]
        assert call(fd, buffers, 0) == sum(map(len, buffers))
        os.close(fd)

    async def turn(part: slice) -> float:
        positions = range(len(files))[part]
        if flags & os.O_CREAT:
            for i in positions:
                files[i].unlink(missing_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            list(pool.map(move, positions))
            return time.perf_counter() - begin

    return turn


async def _compare(name: str, ours: Turn, plain: Turn, size: int) -> Row:
    """Both walk through all chunks, a batch each in turn; every other time the other one first."""
    batch, samples = BATCH // size, ([], [])  # type: tuple[int, tuple[list[float], list[float]]]
    for step in range(ROUNDS * TOTAL // BATCH):
        start = step * batch % (TOTAL // size)
        part = slice(start, start + batch)
        for which, turn in [(0, ours), (1, plain)][:: 1 if step % 2 else -1]:
            samples[which].append(await turn(part))
    seconds, plain_seconds = median(samples[0]), median(samples[1])
    return {
        "name": name,
        "value": round(BATCH / seconds / 1e9, 2),
        "unit": "GB/s",
        "floor": round(BATCH / plain_seconds / 1e9 * GOAL, 2),
        "ratio": round(plain_seconds / seconds, 3),
    }


if __name__ == "__main__":
    show(rows_of(run()))
