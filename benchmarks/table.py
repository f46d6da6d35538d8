"""How results are shown and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One figure: a value, what it is compared with in the same run, and value over that."""

    name: str
    value: float
    unit: str
    floor: float
    ratio: float


class Outcome(NamedTuple):
    """What a part of a benchmark found."""

    rows: list[Row]
    absent: list[str]
    """What cannot be measured here, with the reason."""
    failed: list[str]
    """What should have been measured and was not, with the reason."""


def rows_of(results: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows from their JSON form."""
    return [Row(**result) for result in results]


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    table = Table("figure", "value", "unit", "compared with", "ratio")
    for row in rows:
        table.add_row(
            row.name, f"{row.value:,.3g}", row.unit, f"{row.floor:,.3g}", f"{row.ratio:.3g}"
        )
    Console(width=120).print(table)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write ``{"rows": [...]}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [row._asdict() for row in rows]}, indent=1) + "\n")
