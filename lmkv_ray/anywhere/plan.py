"""Of which pieces a prompt is put together, and what is computed in between. Pure arithmetic.

    tokens  0 ...... exact .......................................... resume ......... n
            | prefix | hole | piece | piece | hole | piece | hole | piece | computed as usual |

Pieces are copied from stored chunks. Holes are computed in the step that begins at ``resume``: text
between pieces, the first tokens of each, whole documents. Nothing of the last token is ever used
again, so that the step computes something.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from lmkv_ray.anywhere.matches import Match, StoredChunk

MIN_REUSE = 16
"""Tokens below which a piece is not worth the two holes that it may cut its neighbourhood into."""
MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What one step can take."""

    rows: int = MAX_ROWS
    """Holes at most."""
    tokens: int = 1 << 30
    """Tokens of all holes at most."""
    piece: int = MIN_REUSE
    """Tokens of a piece at least."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``dst`` to ``end`` come from stored chunks, turned by ``delta`` positions."""

    dst: int
    n: int
    chunks: tuple[StoredChunk, ...]
    lead: int
    """Tokens of the first chunk that lie before the piece."""
    delta: int

    @property
    def end(self) -> int:
        """The first token behind it."""
        return self.dst + self.n

    def part(self, begin: int, end: int, chunk_tokens: int) -> Piece:
        """Its tokens from ``begin`` to ``end`` of the prompt, with the chunks that hold them."""
        lead = self.lead + begin - self.dst
        first, last = lead // chunk_tokens, -(-(lead + end - begin) // chunk_tokens)
        return replace(
            self,
            dst=begin,
            n=end - begin,
            chunks=self.chunks[first:last],
            lead=lead - first * chunk_tokens,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces and holes of one request; together they are the tokens from ``exact`` to ``resume``.

    Args:
        exact: tokens in front that are there, or are loaded, as an ordinary prefix.
        pieces: ascending, without overlaps, none before ``exact``; at least one.
        chunk_tokens: tokens of a stored chunk.
    """

    exact: int
    pieces: tuple[Piece, ...]
    chunk_tokens: int

    @property
    def resume(self) -> int:
        """The engine computes from this token on, as after any hit."""
        return self.pieces[-1].end

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of what is computed in the step that begins at ``resume``; ascending."""
        return tuple(self._holes())

    @property
    def reused(self) -> int:
        """Tokens that are copied."""
        return sum(piece.n for piece in self.pieces)

    @property
    def recomputed(self) -> int:
        """Tokens of all holes."""
        return self.resume - self.exact - self.reused

    def begin_at(self, exact: int) -> Plan | None:
        """The same with more, or less, in front; None: then nothing is left to copy."""
        pieces = [
            piece.part(max(piece.dst, exact), piece.end, self.chunk_tokens)
            for piece in self.pieces
            if piece.end > exact
        ]
        return Plan(exact, tuple(pieces), self.chunk_tokens) if pieces else None

    def within(self, limits: PlanLimits) -> Plan | None:
        """As many of its first pieces as a step can take; None: not even one.

        What follows them is computed as usual, in as many steps as it takes.
        """
        pieces, at, rows, tokens = 0, self.exact, 0, 0
        for piece in self.pieces:
            rows += piece.dst > at
            tokens += piece.dst - at
            if rows > limits.rows or tokens > limits.tokens:
                break
            pieces, at = pieces + 1, piece.end
        return replace(self, pieces=self.pieces[:pieces]) if pieces else None

    def _holes(self) -> Iterator[tuple[int, int]]:
        at = self.exact
        for piece in self.pieces:
            if piece.dst > at:
                yield at, piece.dst
            at = piece.end


def plan(
    exact: int,
    matches: Sequence[Match],
    *,
    n: int,
    chunk_tokens: int,
    first: int = 0,
    whole: Collection[int] = (),
    limits: PlanLimits = PlanLimits(),
) -> Plan | None:
    """Put a prompt together.

    Args:
        exact: tokens of its exact prefix.
        matches: what was found, ascending.
        n: tokens of the prompt.
        chunk_tokens: tokens of a stored chunk.
        first: of each match so many tokens are computed again.
        whole: numbers of matches that are computed again as a whole.
        limits: what one step of the engine can compute.

    Returns:
        None: nothing is worth copying.
    """
    pieces: list[Piece] = []
    at = exact
    for number, match in enumerate(matches):
        begin, end = max(match.dst, at), min(match.dst + match.n, n - 1)
        if number in whole or end - begin - first < max(1, limits.piece):
            continue
        piece = Piece(match.dst, match.n, match.chunks, match.lead, match.delta)
        pieces.append(piece.part(begin + first, end, chunk_tokens))
        at = end
    return Plan(exact, tuple(pieces), chunk_tokens).within(limits) if pieces else None
