"""Arena memory near the GPUs, on machines with several memory nodes.

A GPU reads memory of another node through the link between the sockets, at a fraction of its own
link's speed. The policy is set on the arena's file before it has pages, and tmpfs keeps it for all
processes: whichever process touches a page first, the kernel takes it from the nodes that were
asked for, or from another one if these are full. Machines with one node are left alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

PCI_DEVICES = Path("/sys/bus/pci/devices")
NODES_ONLINE = Path("/sys/devices/system/node/online")

_GPU_VENDORS = {"0x10de", "0x1002"}
"""NVIDIA and AMD."""
_DISPLAY = "0x03"
"""Class of PCI devices: VGA and 3D controllers."""

_PREFERRED, _INTERLEAVE = 1, 3
"""MPOL_PREFERRED and MPOL_INTERLEAVE."""
_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which glibc does not wrap."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Memory nodes to take pages from: one, or several in turn."""

    nodes: tuple[int, ...]


def choose(gpu_nodes: Sequence[int], online: Sequence[int]) -> Placement | None:
    """Where the arena's pages should be.

    Args:
        gpu_nodes: memory node of each GPU, -1 where it is not known.
        online: the machine's memory nodes.

    Returns:
        None if it does not matter or is not known: no policy is set then.
    """
    near = sorted({node for node in gpu_nodes if node in online})
    return Placement(tuple(near)) if len(online) > 1 and near else None


def gpu_nodes(devices: Path = PCI_DEVICES) -> list[int]:
    """The memory node of each GPU of this machine, -1 where the kernel does not know it."""
    found = []
    for device in sorted(devices.iterdir()) if devices.is_dir() else ():
        try:
            kind = (device / "class").read_text(), (device / "vendor").read_text().strip()
            if kind[0].startswith(_DISPLAY) and kind[1] in _GPU_VENDORS:
                found.append(int((device / "numa_node").read_text()))
        except (OSError, ValueError):
            continue
    return found


def online_nodes(path: Path = NODES_ONLINE) -> list[int]:
    """The machine's memory nodes; [0] if the kernel does not say."""
    try:
        ranges = [part.split("-") for part in path.read_text().strip().split(",")]
        return [node for r in ranges for node in range(int(r[0]), int(r[-1]) + 1)]
    except (OSError, ValueError):
        return [0]


def place_near_gpus(memory: npt.NDArray[np.uint8]) -> Placement | None:
    """Have the pages of a new arena taken near this machine's GPUs, if there is a choice.

    Returns:
        what was set, None if nothing was.
    """
    placement = choose(gpu_nodes(), online_nodes())
    if placement is None or not set_policy(memory, placement):
        return None
    logger.info("lmkv_ray: the arena takes its memory from node %s, near the GPUs.", placement)
    return placement


Mbind = Callable[[int, int, int, int], int]
"""(address, bytes, mode, mask of nodes) -> 0, or an errno."""


def set_policy(
    memory: npt.NDArray[np.uint8], placement: Placement, mbind: Mbind | None = None
) -> bool:
    """Set the policy of a mapping, and so of its file, for pages that it does not have yet."""
    mode = _PREFERRED if len(placement.nodes) == 1 else _INTERLEAVE
    mask = sum(1 << node for node in placement.nodes)
    error = (mbind or _mbind)(memory.ctypes.data, memory.nbytes, mode, mask)
    if error:
        logger.warning(
            "lmkv_ray: the arena's memory cannot be placed near the GPUs (%s); copies may cross "
            "between sockets. Next step: start the shard with numactl, or ignore this.",
            os.strerror(error),
        )
    return not error


def _mbind(address: int, nbytes: int, mode: int, mask: int) -> int:
    number = _MBIND.get(platform.machine())
    if number is None:
        return 38  # ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    nodes = ctypes.c_ulong(mask)
    failed = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(mode),
        ctypes.byref(nodes),
        ctypes.c_ulong(64),
        ctypes.c_uint(0),
    )
    return ctypes.get_errno() if failed else 0
