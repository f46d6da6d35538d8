"""Log lines that a stranger, or a defect in every step, may cause: few, and each of one line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

PERIOD_SECONDS = 10.0
"""Between two lines about one kind of trouble."""
QUOTED = 64
"""Characters of a stranger's text that are shown."""


class Complaints:
    """Lines about one kind of trouble, at most one in ``PERIOD_SECONDS``. For any thread.

    Args:
        logger: where to.
        clock: seconds that never go back.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._quiet_until = float("-inf")
        self._unsaid = 0

    def say(self, text: str, *, error: BaseException | None = None) -> None:
        """Warn, or count what is not said; the next line tells how many there were.

        Args:
            text: what happened; of what strangers wrote only ``quote`` may be in it.
            error: whose traceback to show.
        """
        now = self._clock()
        with self._lock:
            if now < self._quiet_until:
                self._unsaid += 1
                return
            self._quiet_until, unsaid, self._unsaid = now + PERIOD_SECONDS, self._unsaid, 0
        more = f" ({unsaid} more like this since the last such line.)" if unsaid else ""
        level = logging.WARNING if error is None else logging.ERROR
        self._logger.log(level, "lmkv_ray: %s%s", text, more, exc_info=error)


def quote(text: object) -> str:
    """What a stranger wrote, as ASCII in one line; of what is long, the beginning."""
    if not isinstance(text, str):
        return f"a value of type {type(text).__name__[:QUOTED]}"
    return ascii(text[:QUOTED]) + ("..." if len(text) > QUOTED else "")
