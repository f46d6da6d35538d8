"""Digests of files that were read before, so that a restart reads nothing.

One small file for each, under the user's cache directory, named after device and inode. It is
believed only while the file it is about has the same size and times to the nanosecond. The time of
change (ctime) is one of them: a program can set a file's mtime back, but not that. File systems of
images have none: in two images that were built alike, other weights have the same inode and times,
and a device's number is given again. What lies on those is not remembered.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import msgspec

from lmkv_ray.ownership import is_ours

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Files; past it those that were noted first are forgotten."""

MAX_NOTE_BYTES = 512


IMAGES = frozenset({"squashfs", "erofs", "iso9660", "cramfs", "romfs", "fuse.squashfuse"})
"""File systems whose ctime is what the builder of the image said."""

MOUNTS = Path("/proc/self/mountinfo")


class _Note(msgspec.Struct, frozen=True):
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


class DigestMemory:
    """See the module. Trouble with the directory costs the memory, nothing else.

    Args:
        directory: made if it is not there; one that others could write is not used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._usable = _is_our_directory(directory)
        if not self._usable:
            logger.warning(
                "lmkv_ray: %s is not a directory that only this user can write: digests of weights "
                "are not remembered, and every start reads the weights again.",
                directory,
            )

    @classmethod
    def of_user(cls) -> DigestMemory | None:
        """In ``$XDG_CACHE_HOME/lmkv_ray/digests``, or ``~/.cache/...``; None: there is no home."""
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:
            return None
        return cls(base / "lmkv_ray" / "digests") if base.is_absolute() else None

    def recall(self, seen: os.stat_result) -> str | None:
        """The SHA-256 of the file that is this one, as hex; None: not known."""
        if not self._usable or _is_of_an_image(seen):
            return None
        try:
            fd = os.open(self._path(seen), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not is_ours(os.fstat(fd)):
                return None
            note = msgspec.json.decode(os.read(fd, MAX_NOTE_BYTES), type=_Note)
        except (OSError, msgspec.MsgspecError):
            return None
        finally:
            os.close(fd)
        return note.sha256 if note == _note(seen, note.sha256) else None

    def note(self, seen: os.stat_result, sha256: str) -> None:
        """Remember the digest of a file."""
        if not self._usable or _is_of_an_image(seen):
            return
        path = self._path(seen)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(_note(seen, sha256)))
            temporary.replace(path)
            self._forget_some()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("lmkv_ray: a digest cannot be remembered in %s: %s", path, error)

    def _path(self, seen: os.stat_result) -> Path:
        return self._directory / f"{seen.st_dev:x}-{seen.st_ino:x}.json"

    def _forget_some(self) -> None:
        notes = list(os.scandir(self._directory))
        if len(notes) <= MAX_REMEMBERED:
            return
        notes.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns)
        for entry in notes[: len(notes) - MAX_REMEMBERED * 7 // 8]:
            Path(entry.path).unlink(missing_ok=True)


def _is_of_an_image(seen: os.stat_result) -> bool:
    """Whether a file lies on one of ``IMAGES``; False as well if that cannot be known."""
    device = f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}"
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    mounts = (line.partition(" - ") for line in lines)
    return any(
        kind.partition(" ")[0] in IMAGES for where, _, kind in mounts if where.split()[2] == device
    )


def _note(seen: os.stat_result, sha256: str) -> _Note:
    return _Note(seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, sha256)


def _is_our_directory(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and is_ours(found)
