"""What only a disk tier counts."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv_ray.tiers.counters import Counters


@dataclass(kw_only=True)
class DiskCounters(Counters):
    """See ``Counters``."""

    store_no_room: int = 0
    """Not stored: all that could make room is pinned or being read."""
    evicted: int = 0
