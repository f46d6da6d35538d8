"""Files or memory are short: then nothing is known of what there is.

A process that looks for an arena and is refused a file must not conclude that there is none.
"""

from __future__ import annotations

import errno

from lmkv_ray.errors import ArenaError

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})


class ShortageError(ArenaError):
    """What there is cannot be known now."""


def check_shortage(error: OSError) -> None:
    """Return if an error says something of what was looked at: it has ended.

    Raises:
        ShortageError: the error says nothing of it.
    """
    if error.errno in SHORTAGES:
        raise ShortageError(
            f"Arenas cannot be looked for: {error.strerror}.",
            next_step="allow more open files (ulimit -n, fs.file-max) or memory.",
        ) from error
