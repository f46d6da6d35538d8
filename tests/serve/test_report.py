"""The demo's report, from rows that were not measured."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from serve_apps.report import CASES, Row, plot, table, write_json

ROWS = [
    Row(n, case, [scale * n / 1000, scale * n / 1000, 99.0], text_equal=case != "cold")
    for n in (1048, 7192)
    for case, scale in zip(CASES, (1.0, 0.05, 0.05, 0.1, 0.02), strict=True)
]


def text(rows: list[Row]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(rows))
    return capture.get()


def test_the_table_shows_medians_and_speed_ups() -> None:
    lines = text(ROWS).splitlines()
    row = next(line for line in lines if "7,192" in line)
    assert "7.192 s ≠" in row
    assert "0.360 s (20x) =" in row
    assert "0.719 s (10x) =" in row


def test_the_table_copes_with_cases_that_are_missing() -> None:
    assert "7,192" in text([row for row in ROWS if row.case != "after_restart"])
    assert "-" in text(ROWS[:-1])


def test_the_json_has_rows_and_what_they_were_measured_on(tmp_path: Path) -> None:
    write_json(ROWS, {"machine": {"cores": 2}}, tmp_path / "demo.json")
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["machine"] == {"cores": 2}
    assert len(content["rows"]) == 10
    assert content["rows"][0] == {
        "prompt_tokens": 1048,
        "case": "cold",
        "ttft_s": [1.048, 1.048, 99.0],
        "text_equal": False,
    }


@pytest.mark.parametrize("rows", [ROWS, ROWS[:-1]], ids=["all", "one missing"])
def test_the_plot_is_a_picture(tmp_path: Path, rows: list[Row]) -> None:
    plot(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
