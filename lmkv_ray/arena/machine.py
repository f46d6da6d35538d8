"""The limits of this machine and container, as the kernel says them."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmkv_ray.arena.capacity import MachineLimits
from lmkv_ray.arena.segment import DEFAULT_DIRECTORY
from lmkv_ray.errors import ArenaError

_NO_LIMIT = 1 << 60
"""Version 1 of cgroups says so, as nearly 2**63."""


def machine_limits(
    directory: Path, *, ray: int | None = None, object_store: int = 0
) -> MachineLimits:
    """What limits an arena in ``directory``, read now.

    Args:
        directory: the directory of a memory file system in which the arena is made.
        ray: memory that Ray counts on this node, in bytes.
        object_store: what Ray's object store may take of /dev/shm, in bytes.

    Raises:
        ArenaError: there is no such directory.
    """
    try:
        free = shutil.disk_usage(directory).free
        shared = directory.stat().st_dev == DEFAULT_DIRECTORY.stat().st_dev
    except OSError as error:
        raise ArenaError(
            f"The arena directory {directory} cannot be used: {error.strerror}.",
            next_step="set LMKV_ARENA_DIR to a directory on a tmpfs, normally /dev/shm.",
        ) from error
    return MachineLimits(
        directory=directory,
        memory=memory(),
        free=free,
        container=cgroup_limit(),
        ray=ray,
        object_store=object_store if shared else 0,
        file=_ulimit(resource.RLIMIT_FSIZE),
        address_space=_ulimit(resource.RLIMIT_AS),
    )


def memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of the machine's memory; some containers have a ``meminfo`` of their own."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_limit(
    own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The smallest memory limit from this process's cgroup up to the root; None: there is none.

    Args:
        own: what the kernel says of the process's cgroups, of version 1 and 2.
        mount: where the hierarchies are; in a container its own cgroup is the root of it, and the
            path in ``own`` may not exist.
    """
    limits: list[int] = []
    names: tuple[str, ...]
    roots: tuple[Path, ...]
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0":
                names, roots = ("memory.max", "memory.high"), (mount, mount / "unified")
            elif "memory" in controllers.split(","):
                names, roots = ("memory.limit_in_bytes",), (mount / "memory",)
            else:
                continue
            for root in roots:
                for folder in _upwards(root, path):
                    limits += [limit for name in names for limit in _limit(folder / name)]
    return min(limits, default=None)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """A cgroup's directory and those above it, up to the root."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for end in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:end])


def _limit(file: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # it is not there, or says "max"
        value = int(file.read_text())
        if 0 < value < _NO_LIMIT:
            yield value


def _ulimit(which: int) -> int | None:
    limit = resource.getrlimit(which)[0]
    return None if limit == resource.RLIM_INFINITY else limit
