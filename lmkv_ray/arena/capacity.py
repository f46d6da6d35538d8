"""How much memory an arena may take of a machine: pure; ``machine`` reads the limits.

Memory of a tmpfs counts as memory of the container, so a limit that is exceeded is found out by
being killed. Therefore a default keeps well below every limit, and a wish that no limit can allow
is refused before the first page is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmkv_ray.arena.format import MIN_CAPACITY
from lmkv_ray.errors import ArenaError

SHARE = 5
"""A default is at most one part of so many of the memory that there is."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What limits an arena. Bytes; None: no limit."""

    directory: Path
    """Of the arena."""
    memory: int
    """Of the machine."""
    free: int
    """What the directory's file system has free."""
    container: int | None = None
    """The smallest memory limit of the cgroups that this process is in."""
    ray: int | None = None
    """Memory that Ray counts on this node, with its object store."""
    object_store: int = 0
    """What Ray's object store may yet take of the same file system."""
    file: int | None = None
    """Size of a file (ulimit -f)."""
    address_space: int | None = None
    """Addresses of a process (ulimit -v)."""


@dataclass(frozen=True, slots=True)
class ArenaCapacity:
    """What an arena takes."""

    nbytes: int
    why: str
    """One sentence, for the log and the status."""


def capacity_for(machine: MachineLimits, wanted: int | None) -> ArenaCapacity:
    """The capacity of a new arena.

    Args:
        machine: where it is to be made.
        wanted: the setting; None: the default.

    Raises:
        ArenaError: the machine cannot give what is wanted, or not even the least; with the numbers.
    """
    if wanted is not None:
        for limit, name in _hard(machine):
            if wanted > limit:
                raise ArenaError(
                    f"LMKV_CAPACITY is {_mib(wanted)}, but {name} is {_mib(limit)}.",
                    next_step="lower LMKV_CAPACITY on this node, or raise that limit.",
                )
        return ArenaCapacity(wanted, f"takes {_mib(wanted)} of {machine.directory}: LMKV_CAPACITY")
    nbytes, name = min(_soft(machine))
    if nbytes < MIN_CAPACITY:
        raise ArenaError(
            f"There is no room for an arena: {name} is {_mib(nbytes)}, and "
            f"{_mib(MIN_CAPACITY)} are the least.",
            next_step="enlarge it (docker run --shm-size, or an emptyDir with medium Memory on "
            "Kubernetes), or set LMKV_CAPACITY or LMKV_ARENA_DIR on this node.",
        )
    return ArenaCapacity(nbytes, f"takes {_mib(nbytes)} of {machine.directory}: {name}")


def _hard(machine: MachineLimits) -> Iterator[tuple[int, str]]:
    """What an arena can never exceed. Free space is checked where the file is made."""
    yield machine.memory, "the machine's memory"
    if machine.container is not None:
        yield machine.container, "the memory limit of this container (cgroup)"
    yield from _process(machine, 1)


def _soft(machine: MachineLimits) -> Iterator[tuple[int, str]]:
    """What a default keeps below."""
    part = "a fifth of"
    yield machine.memory // SHARE, f"{part} the machine's memory ({_mib(machine.memory)})"
    if machine.container is not None:
        limit = machine.container
        yield limit // SHARE, f"{part} this container's memory limit ({_mib(limit)})"
    if machine.ray is not None:
        yield machine.ray // SHARE, f"{part} the memory that Ray has here ({_mib(machine.ray)})"
    beside = f" beside {_mib(machine.object_store)} of Ray's object store"
    yield (
        max(0, machine.free - machine.object_store) // 2,
        f"half of what is free there ({_mib(machine.free)}"
        f"{beside if machine.object_store else ''})",
    )
    yield from _process(machine, 2)


def _process(machine: MachineLimits, part: int) -> Iterator[tuple[int, str]]:
    of = "half of " if part == 2 else ""
    if machine.file is not None:
        yield machine.file // part, f"{of}the largest file that may be made (ulimit -f)"
    if machine.address_space is not None:
        yield machine.address_space // part, f"{of}a process's address space (ulimit -v)"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
