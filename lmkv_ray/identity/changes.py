"""Whether a path may name another file than it did some time ago.

A file that was written since then tells by its times. One that came into the place of another is as
old as it likes: the link, or the directory, by which it is found tells.
"""

from __future__ import annotations

from pathlib import Path

MAX_LINKS = 40
"""On the way to a file, as Linux has it."""


def changed_since(path: Path, moment: float) -> Path | None:
    """What was changed or exchanged: the file, or a link or directory on the way; None: nothing.

    Args:
        path: of a file that is there.
        moment: seconds since 1970.

    Raises:
        OSError: it cannot be followed.
    """
    way, links = path.absolute(), 0
    while (link := _first_link(way)) is not None:
        links += 1
        if links > MAX_LINKS:
            raise OSError(f"{path} leads through too many links")
        if link.lstat().st_ctime > moment:
            return link
        way = link.parent / link.readlink() / way.relative_to(link)
    seen = way.stat()
    if max(seen.st_mtime, seen.st_ctime) > moment:
        return way
    for directory in way.parents:
        seen = directory.stat()
        # Another name for it changes its ctime only; what comes into it or leaves it, both.
        if seen.st_mtime <= moment < seen.st_ctime:
            return directory
    return None


def _first_link(path: Path) -> Path | None:
    """The first part of a path that is a link."""
    return next((part for part in [*reversed(path.parents), path] if part.is_symlink()), None)
