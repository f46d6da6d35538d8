"""What was found: stored tokens that stand in a prompt, at any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk in the local arena, when it was found."""

    slot: int
    generation: int
    """Of the slot; if it is another one after the copy, the bytes are torn."""
    key: bytes
    """16 bytes. It stands for all text from the beginning up to the chunk's end."""
    first: int
    """Position of its first token when it was computed."""


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens ``dst`` to ``dst + n`` of a prompt are stored."""

    dst: int
    n: int
    chunks: tuple[StoredChunk, ...]
    """Chunks of one prefix that follow each other, and hold these tokens."""
    lead: int
    """Tokens of the first chunk that lie before the match."""
    delta: int
    """New minus stored position; may be negative."""
    lone: bool = False
    """The stored text had nothing, or only a system prompt, in front of it when it was computed."""


class SegmentFinder(Protocol):
    """Finds matches. Answers at once, from memory of this node."""

    def find(
        self, tokens: Sequence[int], *, begin: int, space: int, adapter: bytes
    ) -> Sequence[Match]:
        """Matches in a prompt, ascending, without overlaps.

        Args:
            tokens: of the whole prompt.
            begin: tokens that are an exact prefix: matches are looked for behind them.
            space: whose text may be used (see ``tenants``).
            adapter: digest of the LoRA adapter; empty: none.
        """
