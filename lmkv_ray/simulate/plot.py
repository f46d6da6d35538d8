"""How much memory buys how much hit rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmkv_ray.errors import ConfigError
from lmkv_ray.simulate.replay import BELADY, Result


def plot(results: Sequence[Result], chunk_tokens: int, path: Path) -> None:
    """Draw hit rate and expected time to first token over memory, one line for each policy.

    Args:
        results: several capacities of the same trace.
        chunk_tokens: of the trace, to show bytes.
        path: of the picture; its ending decides the format.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "The plot needs matplotlib, which is not installed.",
            next_step="run 'pip install matplotlib', or leave --plot out.",
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    hits, ttft = figure.subplots(1, 2)
    gib = results[0].setup.bytes_per_token * chunk_tokens / (1 << 30)
    for policy in dict.fromkeys(result.setup.policy for result in results):
        own = sorted(
            (result for result in results if result.setup.policy == policy),
            key=lambda result: result.setup.memory,
        )
        memory = [result.setup.memory * gib for result in own]
        style = {"linestyle": "--", "color": "0.6"} if policy == BELADY else {"marker": "o"}
        hits.plot(memory, [100 * result.hit_rate for result in own], label=policy, **style)
        ttft.plot(memory, [result.ttft[0] for result in own], label=policy, **style)
    ttft.axhline(results[0].ttft_without[0], linestyle=":", color="0.6", label="no cache")
    for axes, label in ((hits, "hit rate, %"), (ttft, "expected time to first token, s")):
        axes.set(xscale="log", xlabel="memory, GiB", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    ttft.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be written: {error}.", next_step="name another file, as .png or .svg."
        ) from error
