"""kill -9 while chunks are written, hundreds of times, and damage on top of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 200


def test_no_wrong_byte_is_ever_served(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tiers.disk.crasher", str(tmp_path), str(KILLS), "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout)
    # It was killed in the middle of things, and there was something to serve and to refuse.
    assert seen["kills"] == KILLS
    assert seen["torn"] > 0
    assert seen["damaged"] > seen["corrupt"] > 0
    assert seen["served"] > KILLS
