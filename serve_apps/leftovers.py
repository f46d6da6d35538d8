"""Shared memory that killed vLLM processes leave in /dev/shm.

vLLM's processes talk over Python's shared memory and semaphores, whose files outlive a process
that is killed; Ray stops a replica by killing it.
"""

from __future__ import annotations

from pathlib import Path

SHM = Path("/dev/shm")
PATTERNS = ("psm_*", "sem.mp-*")


def files() -> set[Path]:
    """Those that exist now, in use or not."""
    return {path for pattern in PATTERNS for path in SHM.glob(pattern)}


def sweep(before: set[Path]) -> None:
    """Remove what is not in `before` and what no process maps."""
    for path in files() - before - _mapped():
        path.unlink(missing_ok=True)


def _mapped() -> set[Path]:
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # ended meanwhile, or another user's: then its files are too
            continue
        found |= {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHM}/" in line}
    return found
