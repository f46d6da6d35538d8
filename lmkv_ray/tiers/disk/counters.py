"""What a disk tier counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class DiskCounters:
    """What happened since the tier was opened. Chunks, if it does not say otherwise."""

    stored: int = 0
    stored_bytes: int = 0
    store_busy: int = 0
    """Not stored: too much was being written already."""
    store_no_room: int = 0
    """Not stored: all that could make room is pinned or being read."""
    store_changed: int = 0
    """Not stored: evicted from memory while it was written."""
    store_failed: int = 0
    """Not stored: the disk refused."""
    read: int = 0
    read_bytes: int = 0
    read_corrupt: int = 0
    read_late: int = 0
    read_failed: int = 0
    evicted: int = 0
    troubles: int = 0
    """How often the disk went out of use."""
