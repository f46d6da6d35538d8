"""The leak check sees what outlives its parent, and leaves alone what others use."""

import multiprocessing
import subprocess
import sys

import pytest

from serve_apps import leftovers
from tests import leaks

ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0)"


@pytest.mark.usefixtures("run_mark")
def test_an_orphan_is_found_while_it_lives() -> None:
    before = leaks._processes()
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE) as parent:
        parent.wait()
        left = leaks._describe(leaks._processes() - before)
        assert len(left) == 1
        assert "input()" in left[0]
        # Closing the pipe ends it.
    assert leaks._until_empty(lambda: leaks._describe(leaks._processes() - before)) == []


def test_only_what_nobody_maps_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers.files()
    lock = multiprocessing.get_context("spawn").Lock()
    in_use = leftovers.SHM / f"sem.{lock._semlock.name.removeprefix('/')}"  # type: ignore[attr-defined]
    left = leftovers.SHM / "psm_left_behind"
    left.touch()
    monkeypatch.setattr(leftovers, "files", lambda: {in_use, left})
    leftovers.sweep(before)
    assert in_use.exists()
    assert not left.exists()
