"""What tiers count."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv_ray.fetch import Failure, Outcome


@dataclass(kw_only=True)
class TierCounters:
    """What happened in any tier since the tier was opened. Chunks, if it does not say otherwise."""

    stored: int = 0
    stored_bytes: int = 0
    store_busy: int = 0
    """Not stored: too much was being written already."""
    store_changed: int = 0
    """Not stored: evicted from memory while it was written."""
    store_failed: int = 0
    """Not stored: the medium refused."""
    read: int = 0
    read_bytes: int = 0
    read_corrupt: int = 0
    read_late: int = 0
    read_failed: int = 0
    read_too_large: int = 0
    """What is stored is larger than the slot of the chunk that it is called after."""
    troubles: int = 0
    """How often the medium went out of use."""

    def wrote(self, nbytes: int) -> None:
        """A chunk was stored."""
        self.stored += 1
        self.stored_bytes += nbytes

    def fetched(self, outcome: Outcome) -> None:
        """A fetch has this outcome."""
        match outcome.failure:
            case None:
                self.read += 1
                self.read_bytes += outcome.nbytes
            case Failure.CORRUPT:
                self.read_corrupt += 1
            case Failure.LATE:
                self.read_late += 1
            case Failure.LOST:
                self.read_failed += 1
            case Failure.TOO_LARGE:
                self.read_too_large += 1


@dataclass(kw_only=True)
class DiskCounters(TierCounters):
    """What happened in a disk tier."""

    store_no_room: int = 0
    """Not stored: all that could make room is pinned or being read."""
    evicted: int = 0


@dataclass(kw_only=True)
class RemoteCounters(TierCounters):
    """What happened in a remote tier."""

    store_known: int = 0
    """Not stored: another node had done so already."""
    asked: int = 0
    """Keys that the store was asked about."""
