"""Plain values of a shard: its bounds, its counters, what it finds at start."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv_ray.messages import Owner


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a shard."""

    grant_seconds: float = 30.0
    """How long a granted slot may be filled."""
    grace_seconds: float = 3.0
    """How long the slots of a dead owner rest: its workers may outlive it for a moment."""
    memory_seconds: float = 5.0
    """After /dev/shm was full the arena does not try to grow for so long."""
    holder_slots: int = 1024
    """Slots one holder may have at most; never more than a quarter of the arena."""


@dataclass(frozen=True, kw_only=True)
class RecoveredSlot:
    """A slot that is not free, as the predecessor left it in the arena."""

    slot: int
    key: bytes | None
    """The chunk's key; None: the slot is reserved by ``owner``."""
    space: int = 0
    nbytes: int = 0
    pinned: bool = False
    owner: Owner | None = None
    spoiled: bool = False
    """A clear came while the slot was being filled."""


@dataclass(kw_only=True)
class Counters:
    """What happened since the shard started."""

    committed: int = 0
    duplicate: int = 0
    refused: int = 0
    evicted: int = 0
    cleared: int = 0
    unsound: int = 0
    """Commits whose hints were beyond the limits, and ignored."""
    granted: int = 0
    ungranted: int = 0
    """Slots that were wanted and not granted."""
