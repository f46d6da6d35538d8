"""After every test module that starts Ray or vLLM, nothing of it may be left."""

from __future__ import annotations

import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_apps import leftovers

GRACE_S = 30.0  # Ray's processes end a while after ray.shutdown()
# Imports open a few for good: a bound, so that a leak per test is seen and an import is not.
MORE_FILES, MORE_THREADS = 64, 16
# Every process started from here inherits it, also those that outlive their parent.
MARK = f"PYTEST_RUN_ID={uuid.uuid4().hex}"
# Python's own helper: ends with this process.
IGNORED = b"multiprocessing.resource_tracker"


@pytest.fixture(scope="module", autouse=True)
def no_leaks(request: pytest.FixtureRequest, run_mark: None) -> Iterator[None]:
    """Fail a module marked ray or vllm that leaves processes, arenas, files or threads."""
    if not _starts_something(request):
        yield
        return
    processes, files, threads = _processes(), _open_files(), threading.active_count()
    shared = leftovers.files()
    yield
    gc.collect()
    left = _until_empty(lambda: _describe(_processes() - processes))
    assert not left, f"processes left behind: {left}"
    left = _until_empty(lambda: [str(path) for path in Path("/dev/shm").glob("lmkv*")])
    assert not left, f"arenas left behind: {left}"
    assert _open_files() <= files + MORE_FILES, f"{files} open files became {_open_files()}"
    assert threading.active_count() <= threads + MORE_THREADS, f"threads: {threading.enumerate()}"
    leftovers.sweep(shared)  # what vLLM itself leaves when it is killed


@pytest.fixture(scope="session")
def run_mark() -> Iterator[None]:
    """Sets MARK in the environment for the whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*MARK.split("=", 1))
        yield


def _starts_something(request: pytest.FixtureRequest) -> bool:
    here = (item for item in request.session.items if item.path == request.path)
    return any(item.get_closest_marker(name) for item in here for name in ("ray", "vllm"))


def _processes() -> set[int]:
    """Pids of the living processes that carry MARK, this one aside."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = MARK.encode() in (path / "environ").read_bytes().split(b"\0")
            ours = ours and IGNORED not in (path / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if ours:
            found.add(int(path.name))
    return found - {os.getpid()}


def _describe(pids: set[int]) -> list[str]:
    lines = []
    for pid in sorted(pids):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if command:  # a zombie has none
            lines.append(f"{pid} {command[:80]}")
    return lines


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _until_empty(look: Callable[[], list[str]]) -> list[str]:
    """What `look` still finds after GRACE_S seconds."""
    deadline = time.monotonic() + GRACE_S
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
