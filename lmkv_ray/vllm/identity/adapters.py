"""LoRA adapters: which one a request is computed with, by what the workers have in memory.

vLLM's block hashes know an adapter by its name, and since 0.31 its path: not by what is in it. So
a digest of the adapter is part of the keys of its requests, and its name is not: see
``unnamed_request``. The digest is taken from the adapter that a worker has loaded, not from files:
those may have been overwritten since, or before vLLM loads them again, which it does without a word
when it had to make room. While a worker has not loaded an adapter, its requests neither look up nor
save; the first one makes vLLM load it.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

from lmkv_ray.vllm.engine.metadata import WorkerReport

REMEMBERED_NAMES = 4096
"""Adapters of which is known what requests were last computed with."""


class Adapters:
    """One per engine; on the engine's thread.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._tables: dict[int, dict[int, tuple[int, str]]] = {}
        self._digests: dict[int, bytes] = {}
        self._last: OrderedDict[str, bytes] = OrderedDict()

    def digest(self, adapter: int) -> bytes | None:
        """What is in the adapter with this id, 16 bytes; empty for none (0); None: not known."""
        return self._digests.get(adapter) if adapter else b""

    def replaces(self, name: str, digest: bytes) -> bool:
        """The adapter of this name is used. Whether it had another content before."""
        before = self._last.pop(name, digest)
        self._last[name] = digest
        if len(self._last) > REMEMBERED_NAMES:
            self._last.popitem(last=False)
        return before != digest

    def serials(self) -> dict[int, dict[int, int]]:
        """Rank to adapter to the number of the load that its digest is of."""
        return {
            rank: {adapter: serial for adapter, (serial, _) in table.items()}
            for rank, table in self._tables.items()
        }

    def take(self, report: WorkerReport) -> set[int]:
        """Take in what workers have loaded; returns the adapters that were loaded or let go of."""
        if not report.adapters:
            return set()
        before = self._tables
        self._tables = before | report.adapters
        tables = list(self._tables.values())
        everywhere = set.intersection(*(set(table) for table in tables))
        if len(tables) < self._workers:
            everywhere = set()
        self._digests = {
            adapter: _combined([self._tables[rank][adapter][1] for rank in sorted(self._tables)])
            for adapter in everywhere
        }
        adapters = {each for table in [*before.values(), *tables] for each in table}
        return {
            each
            for each in adapters
            if any(before.get(r, {}).get(each) != t.get(each) for r, t in self._tables.items())
        }


def _combined(digests: list[str]) -> bytes:
    return blake2b(" ".join(digests).encode(), digest_size=16).digest()
