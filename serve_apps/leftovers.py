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
    new = files() - before
    mapped = _mapped()  # later: what is new is mapped by now, if anybody uses it
    for path in new:
        try:
            if path.stat().st_ino not in mapped:
                path.unlink()
        except FileNotFoundError:  # by its owner
            continue


def _mapped() -> set[int]:
    """Inodes, as the C library renames a semaphore's file after it was mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # ended meanwhile, or another user's: then its files are too
            continue
        found |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHM}/" in line}
    return found
