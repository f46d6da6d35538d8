"""What the demo measured: rows, a table, a JSON file, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

CASES = {
    "cold": "cold",
    "same_replica": "same replica",
    "other_replica": "other replica",
    "after_restart": "after restart",
    "prefix_cache": "vLLM's own\nprefix cache",
}


@dataclass(frozen=True)
class Row:
    """One case at one prompt length.

    ttft_s: seconds to the first token, one per document.
    text_equal: every answer was that of vLLM's own prefix-cache hit of the same prompt.
    """

    prompt_tokens: int
    case: str
    ttft_s: list[float]
    text_equal: bool


def write_json(rows: Sequence[Row], about: Mapping[str, Any], path: Path) -> None:
    """{"rows": [...], and `about`: the machine, the versions}."""
    content = {"rows": [asdict(row) for row in rows], **about}
    path.write_text(json.dumps(content, indent=2) + "\n")


def table(rows: Sequence[Row]) -> Table:
    """Per length and case: median time to first token, times faster than cold, same text or not."""
    medians = {(row.prompt_tokens, row.case): median(row.ttft_s) for row in rows}
    equal = {(row.prompt_tokens, row.case): row.text_equal for row in rows}
    lengths, cases = _axes(rows)
    result = Table(
        title="Median time to first token (speed-up over cold)",
        caption="= the answer equals that of vLLM's own prefix-cache hit; ≠ it differs "
        "(cold may: vLLM computes it in other pieces)",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("prompt\ntokens", justify="right")
    for case in cases:
        result.add_column(CASES[case], justify="right")
    for length in lengths:
        cold = medians.get((length, "cold"))
        cells = []
        for case in cases:
            if (length, case) not in medians:
                cells.append("-")
                continue
            seconds = medians[length, case]
            speedup = f" ({cold / seconds:.0f}x)" if cold and case != "cold" else ""
            cells.append(f"{seconds:.3f} s{speedup} {'=' if equal[length, case] else '≠'}")
        result.add_row(f"{length:,}", *cells)
    return result


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time to first token over prompt length, a line per case, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    lengths, cases = _axes(rows)
    medians = {(row.prompt_tokens, row.case): median(row.ttft_s) for row in rows}
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    styles = dict(zip(CASES, STYLES, strict=True))
    for case in cases:
        points = [(n, medians[n, case]) for n in lengths if (n, case) in medians]
        axes.plot(*zip(*points, strict=True), label=CASES[case].replace("\n", " "), **styles[case])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to first token, median")
    axes.set_title("Reading a document again: SmolLM2-135M, vLLM on CPU, Ray Serve")
    axes.grid(which="major", alpha=0.4)
    axes.grid(which="minor", axis="y", alpha=0.15)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#444444", "marker": "o", "linewidth": 2.5},
    {"color": "#2a9d8f", "marker": "s"},
    {"color": "#e76f51", "marker": "D", "linewidth": 2.5},
    {"color": "#457b9d", "marker": "^"},
    {"color": "#999999", "marker": "v", "linestyle": "--"},
)


def _axes(rows: Sequence[Row]) -> tuple[list[int], list[str]]:
    present = {row.case for row in rows}
    return sorted({row.prompt_tokens for row in rows}), [c for c in CASES if c in present]
