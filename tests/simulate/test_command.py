from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmkv_ray.cli import app


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


def test_table_json_and_plot(runner: CliRunner, mooncake: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--capacity", "20,64MiB,1000", "--policy", "arc,belady", "--disk", "100"]
    result = runner.invoke(
        app, ["simulate", str(mooncake), *arguments, "--json", str(out), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("belady") == 3
    rows = json.loads(out.read_text())["results"]
    assert [(row["policy"], row["memory"]) for row in rows] == [
        (policy, n) for n in (20, 1, 1000) for policy in ("arc", "belady")
    ]
    assert rows[-1]["hit_rate"] > 0.5
    assert rows[-1]["ttft_seconds"]["mean"] < rows[-1]["ttft_seconds_without"]["mean"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_needs_nothing_but_a_trace(runner: CliRunner, mooncake: Path) -> None:
    result = runner.invoke(app, ["simulate", str(mooncake)])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("lru", "arc", "s3fifo", "hinted", "belady"))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--policy", "none"], "no policy called 'none'"),
        (["--format", "csv"], "no format called 'csv'"),
        (["--admission", "some"], "no admission called 'some'"),
        (["--capacity", "much"], "'much' is not a capacity"),
        (["--capacity", "1KiB"], "less than one chunk"),
        (["--json", "/nowhere/x.json", "--capacity", "9"], "cannot be written"),
        (["--plot", "/nowhere/x.png", "--capacity", "9"], "cannot be written"),
        (["--plot", "x.unknown", "--capacity", "9"], "cannot be written"),
    ],
)
def test_mistakes_are_clear(
    runner: CliRunner, mooncake: Path, arguments: list[str], what: str
) -> None:
    result = runner.invoke(app, ["simulate", str(mooncake), *arguments])
    assert result.exit_code == 1
    assert what in result.output
    assert "Next step" in result.output


def test_a_plot_without_matplotlib_is_a_clear_error(
    runner: CliRunner, mooncake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--capacity", "9", "--policy", "lru", "--plot", str(tmp_path / "x.png")]
    result = runner.invoke(app, ["simulate", str(mooncake), *arguments])
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.output
