"""Engines that a shard cannot serve, for the status: they go on without cache, and ask again."""

from __future__ import annotations

SECONDS = 180.0
"""How long an engine is remembered that does not ask again."""
MOST = 64
"""Engines remembered; the one that was longest silent makes room."""


class Refusals:
    """Why engines were refused."""

    def __init__(self) -> None:
        self._why: dict[str, tuple[float, str]] = {}

    def refused(self, engine_id: str, why: str, now: float) -> bool:
        """An engine was refused at ``now`` (monotonic seconds); whether that is news."""
        before = self._why.pop(engine_id, None)
        self._why[engine_id] = now, why
        if len(self._why) > MOST:
            del self._why[next(iter(self._why))]
        return before is None or before[1] != why

    def accepted(self, engine_id: str) -> None:
        """An engine is served."""
        self._why.pop(engine_id, None)

    def reasons(self, now: float) -> list[str]:
        """Each reason once, the oldest first."""
        self._why = {name: why for name, why in self._why.items() if now - why[0] < SECONDS}
        return list(dict.fromkeys(text for _, text in self._why.values()))
