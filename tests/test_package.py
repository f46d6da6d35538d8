"""What is installed from a wheel is whole."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEEL = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]


def test_a_wheel_has_everything_that_clusters_import(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, *WHEEL, "--wheel-dir", tmp_path, ROOT],
        check=True,
        capture_output=True,
        timeout=120,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "lmkv_ray/*.py", "serve_apps/*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(tracked) <= names
    assert {"serve_apps/llm.yaml", "lmkv_ray/kernels/pages.cu", "lmkv_ray/py.typed"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "dashboards/")) for name in names)
