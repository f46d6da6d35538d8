"""Whether the device can still be trusted."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class EngineHealth:
    """Sound until the first error, and broken for good after it. For any thread."""

    def __init__(self, what: str) -> None:
        self.broken = False
        self._what = what

    def fail(self, error: Exception) -> None:
        """Note an error; the first is logged."""
        if not self.broken:
            self.broken = True
            logger.error(
                "lmkv_ray: %s failed (%s). Nothing is loaded or saved any more by this worker; "
                "everything is recomputed. Next step: restart the engine.",
                self._what,
                error,
                exc_info=error,
            )
