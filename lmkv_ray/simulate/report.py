"""Results for people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lmkv_ray.errors import ConfigError
from lmkv_ray.simulate.replay import Result

FORMAT = 1


def table(results: Sequence[Result]) -> Table:
    """One row for each result."""
    first = results[0]
    cold = first.ttft_without[0]
    out = Table(
        title=f"{first.requests:,} requests, {first.chunks:,} chunks asked for; "
        f"expected time to first token without a cache {cold:.3g} s",
    )
    for column in ("policy", "memory", "hits", "by tier", "written", "read", "expected TTFT"):
        out.add_column(column, justify="left" if column == "policy" else "right")
    for result in results:
        setup = result.setup
        out.add_row(
            setup.policy,
            f"{setup.memory:,}",
            f"{result.hit_rate:.1%}",
            _by_tier({tier: f"{n / max(result.chunks, 1):.1%}" for tier, n in result.hits.items()}),
            _by_tier({tier: _size(n) for tier, n in result.written.items()}),
            _by_tier({tier: _size(n) for tier, n in result.read.items()}),
            f"{result.ttft[0]:.3g} s",
        )
    return out


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write ``{"format": 1, "results": [...]}``.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {"format": FORMAT, "results": [result.as_dict() for result in results]}
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", next_step="name another file."
        ) from error


def _by_tier(values: dict[str, str]) -> str:
    return ", ".join(values.values()) if len(values) > 1 else next(iter(values.values()))


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.3g} TiB"
