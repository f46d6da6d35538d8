"""One picture: bandwidths over their floors, and times to first token."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.table import Row

HIT = re.compile(r"TTFT, ([\d,]+) tokens, (.+), (cold|hit)$")


def draw(rows: Sequence[Row], device: str, path: Path) -> None:
    """Write a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    moved = [row for row in rows if row.unit == "GB/s"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, 2 + len(moved) / 6), layout="constrained"
    )
    left.barh([row.name for row in moved], [row.ratio for row in moved], color="#2a9d8f")
    left.axvline(1, color="#444444", linewidth=1)
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("bandwidth over its floor, a plain copy")
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if found := HIT.match(row.name):
            length, who, case = found.groups()
            if case == "hit" or who == "vLLM alone":
                label = f"{who}, {'own prefix cache' if who == 'vLLM alone' else case}"
                label = f"{who}, cold" if case == "cold" else label
                lines[label].append((int(length.replace(",", "")), row.value))
    for label, points in lines.items():
        right.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if lines:
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.legend()
    right.set_xlabel("prompt tokens")
    right.set_ylabel("time to first token, ms")
    right.grid(which="major", alpha=0.4)
    figure.suptitle(device)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
