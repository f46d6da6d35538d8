"""The leak check sees what outlives its parent."""

import subprocess
import sys

import pytest

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
