"""What a worker asks of whatever moves its chunks, and the values it is asked with.

``HostEngine`` (threads; pages in host memory) and ``DeviceEngine`` (streams; pages of a GPU) are
the two engines. What both promise:

* Order against the forward pass. ``begin_saves`` is called when the step that fills the blocks has
  been given to the device: the copies start when that step has ended. ``begin_loads`` is called
  before a step is given to it: the copies into blocks start when all earlier steps have ended, for
  those may still read or write what is freed by now. Blocks of a copy belong to it until it is
  among ``ended``; so nothing else has to be ordered.
* A load is good only as far as its slots kept their generations until its last byte had arrived.
* A save does not begin after its deadline, and is whole when it is reported.
* No method blocks, but for ``prepare`` before the first step, and for the few milliseconds that
  ``begin_loads`` and ``begin_saves`` name. Each copy ends exactly once, and errors are copies that
  are not good, never exceptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Generations = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Copy chunks out of the arena into blocks. Compared by identity, as is ``Save``."""

    arena_id: int
    """The arena that the slots were found in."""
    slots: Ints
    """One a chunk, int64[n]."""
    generations: Generations
    """Of the slots when they were found; anything else after the copy means torn bytes."""
    blocks: Ints
    """Block ids in order, at most ``n * blocks in a chunk - skip``."""
    skip: int = 0
    """Leading blocks of the first chunk that are left out."""
    group: int = 0
    """KV group: index of the engine's layout."""


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """Copy blocks into granted slots."""

    arena_id: int
    """The arena that the slots were granted in."""
    slots: Ints
    """One a chunk, int64[n]."""
    blocks: Ints
    """Block ids in order: those of whole chunks."""
    deadline: float
    """``time.monotonic()`` after which the copy must not begin."""
    group: int = 0
    """KV group: index of the engine's layout."""

    @property
    def skip(self) -> int:
        """0: a save leaves nothing out."""
        return 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a copy ended."""

    copy: Load | Save
    ok: bool
    """Whether all is well."""
    good: int
    """Leading chunks that are as they should be; of a save all or none."""
    nbytes: int = 0
    """That were copied, good or not."""
    seconds: float = 0.0
    """Spent copying; of several threads, the sum."""


class Arena(Protocol):
    """What engines need of an ``ArenaReader``, documented there."""

    data: Bytes

    @property
    def arena_id(self) -> int:
        """Random number of the arena."""

    @property
    def extent_bytes(self) -> int:
        """Size of an extent."""

    def offsets(self, slots: Ints, nbytes: int) -> Ints:
        """Where slots of at least ``nbytes`` begin in ``data``."""

    def unchanged(self, slots: Ints, generations: Generations) -> npt.NDArray[np.bool_]:
        """Which slots have kept their generation."""

    def assigned(self) -> list[tuple[int, int]]:
        """Parts (offset, nbytes) of ``data`` that have memory."""

    @property
    def grown(self) -> bool:
        """Whether memory was assigned that is not populated."""

    def populate(self) -> Iterator[int]:
        """Fault in newly assigned memory, step by step."""


class TransferEngine(Protocol):
    """Moves chunks between an arena and an engine's pages; used by one thread."""

    def prepare(self, arena: Arena, within: float) -> None:
        """Make an arena ready that will probably be attached; one that never is costs nothing more.

        Args:
            arena: lives for as long as the caller holds it.
            within: seconds that this may take. What is left waits for ``attach``: the device is
                let alone until then (see ``registration``).
        """

    def attach(self, arena: Arena, offsets: Sequence[int]) -> None:
        """Use this arena from now on; copies under way finish with the one they know.

        Args:
            arena: where slots are.
            offsets: one per KV group: where this worker's part of a chunk begins in a slot, in
                bytes (after those of lower ranks).
        """

    def begin_loads(self, loads: Sequence[Load], *, idle: bool) -> None:
        """Start loads.

        Args:
            loads: of this step; there may be none.
            idle: nothing is computed in this step, so that it may wait a little for its loads.
        """

    def begin_saves(self, saves: Sequence[Save]) -> None:
        """Start saves. May wait a little where that frees their blocks sooner."""

    def ended(self) -> list[Ended]:
        """Copies that ended since the last call; each once."""

    def close(self) -> None:
        """Begin nothing more, wait for what is under way (seconds at most), free everything."""
