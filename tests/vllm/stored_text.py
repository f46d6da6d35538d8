"""A finder that is told which documents there are, and which prompts they were read in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmkv_ray.anywhere.matches import Match, StoredChunk
from lmkv_ray.arena import ArenaReader
from lmkv_ray.keys import key_array
from tests.vllm.engine import Engine

CHUNK = 32


class ToldFinder:
    """Finds documents in prompts by searching them, and their chunks by the donors' keys.

    Args:
        reader: of the arena.
        documents: in tokens; no one contains another.
    """

    def __init__(self, reader: ArenaReader, documents: Sequence[list[int]]) -> None:
        self._reader = reader
        self._documents = documents
        self._donors: list[tuple[list[int], list[bytes]]] = []

    def learn(self, engine: Engine, prompt: list[int]) -> None:
        """The chunks of a prompt are in the arena."""
        self._donors.append((prompt, engine.keys(prompt)))

    def find(
        self, tokens: Sequence[int], *, begin: int, space: int, adapter: bytes
    ) -> Sequence[Match]:
        """See ``Finder``."""
        found = []
        for document in self._documents:
            at = where(tokens, document)
            for donor, keys in self._donors:
                stored = where(donor, document)
                if at is None or stored is None or at + len(document) <= begin:
                    continue
                first, last = stored // CHUNK, -(-(stored + len(document)) // CHUNK)
                last = min(last, len(keys))
                n = min(len(document), last * CHUNK - stored)
                hits = self._reader.lookup(key_array(keys[first:last]))
                if not hits.found.all():
                    continue
                chunks = tuple(
                    StoredChunk(int(slot), int(generation), key, (first + i) * CHUNK)
                    for i, (slot, generation, key) in enumerate(
                        zip(hits.slots, hits.generations, keys[first:last], strict=True)
                    )
                )
                lead, skipped = stored - first * CHUNK, max(0, begin - at)
                match = Match(at, n, chunks, lead, at - stored)
                if skipped < n:
                    found.append(match)
                break
        return sorted(found, key=lambda its: its.dst)


def where(tokens: Sequence[int], part: Sequence[int]) -> int | None:
    """Position of a part in a text."""
    text, wanted = np.array(tokens), np.array(part)
    starts = np.flatnonzero(text[: max(0, len(text) - len(wanted) + 1)] == wanted[0])
    for start in starts.tolist():
        if (text[start : start + len(wanted)] == wanted).all():
            return int(start)
    return None
