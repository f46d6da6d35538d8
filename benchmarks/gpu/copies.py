"""Plain copies: the floors everything else is compared with.

link    one large registered copy, each way
pages   the same bytes as one copy a page: what a path without kernels pays, and so above
which page size it needs none (the setting of the break-even)
device  one large copy inside the device's memory, read plus write
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.machine import Machine, rate
from benchmarks.table import Row

PAGES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
COPIES = 4096
"""At most, in one measurement of single copies."""


class Floors(NamedTuple):
    """Bytes per second of large plain copies."""

    to_device: float
    from_device: float
    within: float
    """Read plus write."""


def run(machine: Machine) -> tuple[list[Row], Floors]:
    """Rows, and the floors for other measurements."""
    nbytes = machine.scale
    ours, other = machine.memory(nbytes), machine.memory(nbytes)
    host = machine.registered(nbytes)
    ways = {"to the device": (ours, host), "from the device": (host, ours)}

    def copy(to: int, source: int, size: int, step: int) -> Callable[[], None]:
        def queue() -> None:
            for at in range(0, size, step):
                machine.copy(to + at, source + at, step)

        return queue

    def measure(to: int, source: int, step: int) -> float:
        size = min(nbytes, COPIES * step)
        return rate(machine, size, copy(to, source, size, step))

    large = {way: measure(to.address, from_.address, nbytes) for way, (to, from_) in ways.items()}
    within = 2 * rate(machine, nbytes, partial(machine.copy, other.address, ours.address, nbytes))
    rows = [_row(f"registered copy {way}", value, value) for way, value in large.items()]
    rows.append(_row("copy within the device, read and write", within, within))
    for way, (to, from_) in ways.items():
        for page in (page for page in PAGES if page <= nbytes):
            value = measure(to.address, from_.address, page)
            rows.append(_row(f"one copy for each {page >> 10} KiB {way}", value, large[way]))
    return rows, Floors(large["to the device"], large["from the device"], within)


def _row(name: str, value: float, floor: float) -> Row:
    return Row(name, value / 1e9, "GB/s", floor / 1e9, value / floor)
