"""Whose memory this is: what another user made, or can open, is neither mapped nor adopted.

A path proves nothing. Any user can make a file whose name looks like an arena's, and can have a
process of root hold it: a set-uid program that waits for a password keeps the files it was started
with. So the *opened* file is judged, which cannot be exchanged any more.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lmkv_ray.arena.shortage import check_shortage
from lmkv_ray.errors import ArenaError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_NEXT_STEP = (
    "run shard and engines as one user; if they are, end the process that holds this file, "
    "for it was not made by lmkv_ray."
)


def check_ours(fd: int, path: str) -> os.stat_result:
    """The status of an open file, which is memory that only this process's user can open.

    Args:
        fd: the open file.
        path: for messages.

    Raises:
        ArenaError: it is no regular file, belongs to another user, lets others in by its mode, or
            still has a name.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ArenaError(
            f"{path} is not shared memory.",
            next_step="ask the shard for its arena again; it was restarted.",
        )
    me, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
    if status.st_uid != me:
        raise ArenaError(
            f"The memory {path} belongs to user {status.st_uid}, not to user {me}.",
            next_step=_NEXT_STEP,
        )
    if mode & _OTHERS:
        raise ArenaError(
            f"Other users can open the memory {path} (mode {mode:o}).", next_step=_NEXT_STEP
        )
    if status.st_nlink:
        raise ArenaError(
            f"The memory {path} still has a name by which it can be opened.", next_step=_NEXT_STEP
        )
    return status


def is_ours(process: Path) -> bool:
    """Whether a process (``/proc/<pid>``) is this user's and no other user's; False if it has
    ended.

    All its user ids count: real, effective, saved, and for files. The owner of ``/proc/<pid>`` says
    less, as it is root for each process that another user may not look into.

    Raises:
        ShortageError: that cannot be known now.
    """
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError as error:
        check_shortage(error)
        return False
    uids = (line.split()[1:] for line in lines if line.startswith("Uid:"))
    return any({int(uid) for uid in owners} == {os.geteuid()} for owners in uids)
