"""Gather and scatter, read plus write, over a plain copy within the device.

Blocks are drawn at random from a cache several times larger than what is moved: the worst case.

    layouts  Llama-3.1-8B in every KVCacheLayout, and DeepSeek-like MLA
    pages    32 layers with pages of 1 KiB to 1 MiB
    beside   the same with as few thread blocks as run beside a model, over the link; with the
             table of targets in the device's memory, and in the host's as the transfer engine has
             it
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.gpu.copies import Floors
from benchmarks.gpu.machine import Machine, rate
from benchmarks.table import Row
from lmkv_ray.kernels import TARGET, PageAddresses, PageTable, pages
from lmkv_ray.layout import ChunkLayout
from tests.kernels.caches import LAYOUTS, Shape

PAGES = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
LAYERS = 32
BLOCKS = 16
"""In one chunk: 256 tokens in blocks of 16."""
SPREAD = 4
"""How many times larger the cache is than what is moved."""

NO_PADDING = (0, 0, 0, 0, 0)
LLAMA_8B = {"L": 32, "H": 8, "N": 16, "C": 256}
"""C is K and V of one token and head: 2 * 128 values of 2 bytes."""
MLA = {"L": 61, "H": 1, "N": 64, "C": 576}


def run(machine: Machine, floors: Floors) -> list[Row]:
    """Rows of all three."""
    rows = []
    for name, layout, ways in cases(machine.scale):
        for way in ways:
            rows += measure(machine, floors, name, layout, way)
    return rows


class Way(NamedTuple):
    """How to launch."""

    grid_limit: int | None
    targets: Literal["device", "host"]


ALONE = Way(None, "device")
BESIDE = [Way(pages.BESIDE_A_MODEL, "device"), Way(pages.BESIDE_A_MODEL, "host")]


def cases(scale: int) -> Iterator[tuple[str, ChunkLayout, list[Way]]]:
    """Name, layout, and ways to launch."""
    for name in LAYOUTS:
        yield f"Llama-3.1-8B, {name}", _layout(name, LLAMA_8B, scale), [ALONE]
    yield "MLA, LBNHC", _layout("LBNHC", MLA, scale), [ALONE]
    for page in (page for page in PAGES if LAYERS * page <= scale):
        sizes = {"L": LAYERS, "H": 1, "N": 1, "C": page // 2}
        yield f"pages of {page >> 10} KiB", _layout("LBNHC", sizes, scale), [ALONE, *BESIDE]


def measure(
    machine: Machine, floors: Floors, name: str, layout: ChunkLayout, way: Way
) -> list[Row]:
    """Both directions of one layout."""
    count = layout.num_blocks // SPREAD
    cache_bytes = max(
        run.offset + (layout.num_blocks - 1) * run.stride + run.nbytes for run in layout.runs
    )
    buffer_bytes = -(-count // BLOCKS) * layout.chunk_bytes
    cache, buffer = machine.memory(cache_bytes), machine.memory(buffer_bytes)
    table, targets = PageTable(layout, cache_bytes=cache_bytes), np.empty(count, TARGET)
    order = np.arange(count, dtype=np.int64)
    launch = table.write(
        targets,
        order // BLOCKS * layout.chunk_bytes,
        order % BLOCKS,
        np.random.default_rng(0).permutation(layout.num_blocks)[:count],
        buffer_bytes=buffer_bytes,
    )
    runs = machine.upload(table.runs)
    if way.targets == "device":
        there = machine.upload(targets)
    else:
        there = machine.registered(targets.nbytes)
        ctypes.memmove(there.address, targets.ctypes.data, targets.nbytes)
    at = PageAddresses(cache.address, buffer.address, runs.address, there.address)
    nbytes = count * layout.block_bytes
    rows = []
    for direction, link in (("gather", floors.from_device), ("scatter", floors.to_device)):
        found = rate(
            machine, nbytes, partial(machine.launch, direction, launch, at, way.grid_limit)
        )
        if way.grid_limit is None:
            rows.append(_row(f"{direction}, {name}, read and write", 2 * found, floors.within))
        else:
            how = f"{way.grid_limit} thread blocks, targets on the {way.targets}, over link"
            rows.append(_row(f"{direction}, {name}, {how}", found, link))
    return rows


def _row(name: str, value: float, floor: float) -> Row:
    return Row(name, value / 1e9, "GB/s", floor / 1e9, value / floor)


def _layout(name: str, sizes: dict[str, int], scale: int) -> ChunkLayout:
    block = sizes["L"] * sizes["H"] * sizes["N"] * sizes["C"] * 2
    blocks = SPREAD * max(1, scale // block)
    return Shape(name, {**sizes, "B": blocks}, 2, NO_PADDING).chunk_layout(BLOCKS)
