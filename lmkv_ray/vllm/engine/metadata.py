"""What the two halves of the connector say to each other, step by step.

vLLM carries these objects (pickled, small) between the engine process and its workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmkv_ray.anywhere.plan import Piece
from lmkv_ray.layout import ChunkLayout
from lmkv_ray.messages import Owner

NO_ARENA = 0
"""No arena has this id."""

EVERY_PLACE = -1
"""Instead of a place's number: for the workers of all places."""


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's slices of the chunks of its place."""

    offsets: tuple[int, ...]
    """Per group: where its slice of a chunk begins, in bytes."""
    turn: int = 0
    turns: int = 1
    """So many workers of the place have the same slice, and this one is number ``turn`` of them:
    each writes every ``turns``-th slot."""


@dataclass(frozen=True, slots=True)
class ArenaRef:
    """Where the workers of a place find its arena, and their slices of its chunks."""

    path: str
    arena_id: int
    shares: Mapping[int, Share]
    """By the worker's rank."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Copy chunks of one group from the arena into a request's blocks."""

    request_id: str
    arena_id: int
    """The arena the slots were found in."""
    group: int
    first_chunk: int
    """Number of the first chunk within the request."""
    slots: list[int]
    generations: list[int]
    """Of the slots when they were found; anything else after the copy means torn bytes."""
    skip: int
    """Leading blocks of the first chunk that the engine has already."""
    blocks: list[int]
    place: int = 0
    """Whose workers it is for."""
    adapter: int = 0
    """The LoRA adapter that it is about, if any."""

    @classmethod
    def lost(cls, request_id: str, blocks: list[int]) -> LoadJob:
        """A load that vLLM waits for and that was never ordered: from no arena, so that it
        fails.
        """
        return cls(request_id, NO_ARENA, 0, 0, [], [], 0, blocks, EVERY_PLACE)


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Copy the blocks of one chunk into a granted slot."""

    job_id: int
    group: int
    arena_id: int
    """The arena the slot was granted in."""
    slot: int
    blocks: list[int]
    deadline: float
    """``time.monotonic()`` of the worker's node, which must not begin to write after it."""
    place: int = 0
    """Whose workers it is for."""
    adapter: int = 0
    """The LoRA adapter that it is about, if any."""


@dataclass(frozen=True, slots=True)
class MoveJob:
    """Copy stored text into a request's blocks, wherever it stood before; for all workers."""

    request_id: str
    arena_id: int
    """The arena the slots were found in."""
    exact: int
    """Tokens in front that are an exact prefix: all that follows is bad if anything fails."""
    pieces: tuple[Piece, ...]
    blocks: list[int]
    """Of the request, from its first token on."""


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler half to worker half, once a step."""

    arenas: tuple[ArenaRef | None, ...]
    """By place; None: not attached yet."""
    loads: list[LoadJob]
    saves: list[SaveJob]
    idle: bool
    """No tokens are computed in this step: the worker may wait a little for its loads."""
    check: int = 0
    """Not 0: say with this number which weights there are."""
    adapters: dict[int, dict[int, int]] = field(default_factory=dict)
    """Rank to adapter to the number of the load that the orders are for."""
    moves: list[MoveJob] = field(default_factory=list)


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half, once a step: what ended. Values count the workers."""

    saved: dict[int, int] = field(default_factory=dict)
    """job_id of saves whose bytes are in their slots."""
    unsaved: dict[int, int] = field(default_factory=dict)
    """job_id of saves that were not made (too late, or failed)."""
    failed_loads: dict[str, int] = field(default_factory=dict)
    """request_id to the first token that could not be loaded."""
    suspicious: bool = False
    """Weights may have changed: no order is carried out until they were checked."""
    weights: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Rank to number and result of a check (see ``WeightsWatch.check``)."""
    adapters: dict[int, dict[int, tuple[int, str]]] = field(default_factory=dict)
    """Rank to all adapters that it has, if they are others than before (see ``AdapterWatch``)."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both workers' reports as one."""
        assert isinstance(other, WorkerReport)
        for mine, theirs in ((self.saved, other.saved), (self.unsaved, other.unsaved)):
            for job_id, workers in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + workers
        for request_id, token in other.failed_loads.items():
            self.failed_loads[request_id] = min(token, self.failed_loads.get(request_id, token))
        self.suspicious |= other.suspicious
        self.weights |= other.weights
        self.adapters |= other.adapters
        return self


@dataclass(frozen=True, slots=True)
class LayoutReport(KVConnectorHandshakeMetadata):
    """Worker half to scheduler half, once at start: how its pages lie."""

    rank: int
    """Number of the worker in its engine: pipeline stage by stage, tensor rank by tensor rank."""
    host: str
    """Equal for workers that can map the same arena."""
    owner: Owner
    """The worker's process."""
    layouts: tuple[ChunkLayout, ...]
    """Per group, of this worker's slice of a chunk."""
    packing: str
    """The layout's name, and by what pages are packed, if they are: instruction set, backend."""
    no_moves: str = ""
    """Why this worker cannot move tokens to other positions; empty: it can."""

    def digest(self) -> str:
        """Part of the namespace."""
        return " ".join([*(layout.digest() for layout in self.layouts), self.packing])


def share_chunks(
    reports: Iterable[LayoutReport], replicas: int
) -> tuple[list[int], dict[int, Share]]:
    """Lay the slices of a place's workers side by side in one chunk.

    Args:
        reports: one of each worker, by rank.
        replicas: of so many consecutive ranks the slices are the same bytes: these are kept once.

    Returns:
        per group the bytes of a chunk, and the shares by rank.
    """
    nbytes: list[int] = []
    shares: dict[int, Share] = {}
    for _, same in groupby(reports, lambda report: report.rank // replicas):
        workers = list(same)
        sizes = [layout.chunk_bytes for layout in workers[0].layouts]
        nbytes = nbytes or [0] * len(sizes)
        for turn, report in enumerate(workers):
            shares[report.rank] = Share(tuple(nbytes), turn, len(workers))
        nbytes = [a + b for a, b in zip(nbytes, sizes, strict=True)]
    return nbytes, shares
