"""Whose a file or directory is: what other users of this machine can write is not believed.

The object that was opened is looked at, not its path: a user that may rename the directories above
it can put something else in its place, but nothing that has these properties and is not ours.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

WRITABLE = stat.S_IWGRP | stat.S_IWOTH
"""By others than the owner. An access-control list that lets others write sets the first one."""


def is_ours(status: os.stat_result) -> bool:
    """Whether only this process's user can have written a file, or what is in a directory."""
    return status.st_uid == os.geteuid() and not status.st_mode & WRITABLE


def trouble_with_directory(status: os.stat_result, path: Path) -> tuple[str, str] | None:
    """What is wrong with a directory whose content is believed, and the remedy.

    Args:
        status: of the open directory.
        path: what users call it.
    """
    user = os.geteuid()
    empty = "what others may have put there is believed: empty it if you do not know who wrote it"
    if status.st_uid != user:
        return (
            f"belongs to user {status.st_uid}, not to user {user} of this process",
            f"'chown {user} {path}' or another directory; {empty}",
        )
    if status.st_mode & WRITABLE:
        return (
            f"may be written by other users (mode {stat.S_IMODE(status.st_mode):04o})",
            f"'chmod go-w {path}'; {empty}",
        )
    return None


def trouble_with_secret(status: os.stat_result, path: Path) -> tuple[str, str] | None:
    """What is wrong with a file that holds a secret, and the remedy.

    A file of the superuser may be readable for a group: so are secrets that are mounted for a
    container whose user is another one.

    Args:
        status: of the open file.
        path: what users call it.
    """
    user, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
    if status.st_uid not in (user, 0):
        return (
            f"belongs to user {status.st_uid}, not to user {user} of this process",
            f"'chown {user} {path}'",
        )
    allowed = 0o700 if status.st_uid == user else 0o740
    if mode & 0o777 & ~allowed:
        return (
            f"may be read or written by other users (mode {mode:04o})",
            f"'chmod go= {path}', or defaultMode: 0400 of a mounted secret",
        )
    return None
