"""Whether a process still lives: only a certain end counts as one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmkv_ray.arena import is_alive, this_process
from lmkv_ray.arena.owners import is_ending
from lmkv_ray.errors import ArenaError
from lmkv_ray.messages import Owner

LEADER_ENDS = """
import ctypes, threading
threading.Thread(target=input).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def owner_of(pid: int) -> Owner:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Owner(pid=pid, start=int(stat[19]))


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_that_is_gone_or_a_zombie_is_dead() -> None:
    me = this_process()
    assert is_alive(me)
    assert not is_ending(me)
    assert not is_alive(Owner(pid=me.pid, start=me.start + 1)), "the pid was used again"
    assert is_ending(Owner(pid=me.pid, start=me.start + 1))
    assert not is_alive(Owner(pid=2**22 + 1, start=0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = owner_of(process.pid)
        assert is_alive(owner)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert state_of(process.pid) == "Z"
        assert not is_alive(owner)
        assert is_ending(owner)
    assert not is_alive(owner)


def test_a_zombie_of_which_a_thread_still_runs_may_write() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEADER_ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        owner = owner_of(process.pid)
        tick = threading.Event()
        for _ in range(1000):
            if state_of(process.pid) == "Z":
                break
            tick.wait(0.01)
        assert state_of(process.pid) == "Z"
        assert is_alive(owner)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(owner)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_what_cannot_be_known_counts_as_alive(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = Owner(pid=2**22 + 1, start=0)

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        assert is_alive(dead)
        assert not is_ending(dead)
        with pytest.raises(ArenaError, match="ulimit -n"):
            this_process()
    assert not is_alive(dead)
