"""Copying tokens of stored chunks to other positions: what a worker asks, and of which the answer.

Unlike a load, a move knows tokens and not only blocks: token i of a chunk becomes token j of a
block, and its key is turned (``anywhere.rope``). What knows how tokens lie in a page is handed in
(``TokenPages``). As with a load, the blocks belong to the move until it ended, and it is good only
if all slots kept their generations until the last byte was read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

from lmkv_ray.transfer.base import Arena, Bytes, Generations, Ints
from lmkv_ray.transfer.crew import Crew
from lmkv_ray.transfer.host_engine import LOAD_PATIENCE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class MovedPiece:
    """``n`` tokens that follow each other in chunks of one prefix."""

    slots: Ints
    """Of the chunks, int64[chunks]."""
    generations: Generations
    """Of the slots when they were found."""
    lead: int
    """Tokens of the first chunk that are left out."""
    n: int
    delta: int
    """Positions by which keys are turned."""
    dst: int
    """Token of the request that the first one becomes."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenMove:
    """All pieces of one request. Compared by identity."""

    arena_id: int
    """The arena that the slots were found in."""
    pieces: tuple[MovedPiece, ...]
    blocks: Ints
    """All blocks of the request, from its first token on."""


@dataclass(frozen=True, slots=True)
class Moved:
    """How a move ended."""

    move: TokenMove
    ok: bool
    nbytes: int = 0
    seconds: float = 0.0


class TokenPages(Protocol):
    """Knows how tokens lie in pages."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of this worker's slice of a chunk."""

    def put(self, arena: Bytes, at: Ints, piece: MovedPiece, blocks: Ints) -> None:
        """Copy a piece into its blocks.

        Args:
            arena: the mapped arena as uint8[m].
            at: where this worker's slices of the piece's chunks begin in it, int64[chunks].
            piece: what to copy.
            blocks: of the request, from its first token on.

        Raises:
            IndexError: a block or a chunk lies outside its memory; nothing was copied.
        """


class HostMoves:
    """Moves in host memory, on a thread.

    Args:
        pages: of the engine's only KV group.
    """

    def __init__(self, pages: TokenPages) -> None:
        self._pages = pages
        self._crew = Crew(1, "lmkv-move")
        self._arena: tuple[Arena, int] | None = None
        self._moves: list[tuple[TokenMove, Future[Moved]]] = []

    def attach(self, arena: Arena, offset: int) -> None:
        """Use this arena from now on.

        Args:
            arena: where slots are.
            offset: where this worker's part of a chunk begins in a slot, in bytes.
        """
        self._arena = (arena, offset)

    def begin(self, moves: Sequence[TokenMove], *, idle: bool) -> None:
        """Start moves; ``idle``: nothing is computed in this step, so that it may wait a little."""
        self._moves += [(move, self._crew.submit(self._move, move)) for move in moves]
        if idle:
            wait([future for _, future in self._moves], LOAD_PATIENCE)

    def ended(self) -> list[Moved]:
        """Moves that ended since the last call; each once."""
        done = [(move, future) for move, future in self._moves if future.done()]
        self._moves = [move for move in self._moves if move not in done]
        return [
            Moved(move, False) if future.cancelled() else future.result() for move, future in done
        ]

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._crew.close()
        self._arena = None

    def _move(self, move: TokenMove) -> Moved:
        attached = self._arena  # once: the engine's thread may exchange it
        if attached is None or attached[0].arena_id != move.arena_id:
            return Moved(move, False)
        arena, offset = attached
        began, nbytes = time.perf_counter(), 0
        try:
            for piece in move.pieces:
                at = arena.offsets(piece.slots, offset + self._pages.chunk_bytes) + offset
                self._pages.put(arena.data, at, piece, move.blocks)
                nbytes += len(piece.slots) * self._pages.chunk_bytes
            ok = all(arena.unchanged(p.slots, p.generations).all() for p in move.pieces)
        except Exception:
            logger.exception("lmkv_ray: stored text was not copied; its tokens are recomputed")
            return Moved(move, False)
        return Moved(move, bool(ok), nbytes, time.perf_counter() - began)
