"""What the two halves of the connector say to each other, step by step.

vLLM carries these objects (pickled, small) between the engine process and its workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmkv_ray.layout import ChunkLayout


@dataclass(frozen=True, slots=True)
class ArenaRef:
    """Where workers find the arena."""

    path: str
    arena_id: int


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Copy chunks from the arena into a request's blocks."""

    request_id: str
    arena_id: int
    """The arena the slots were found in."""
    first_chunk: int
    """Number of the first chunk within the request."""
    slots: list[int]
    generations: list[int]
    """Of the slots when they were found; anything else after the copy means torn bytes."""
    skip: int
    """Leading blocks of the first chunk that the engine has already."""
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Copy the blocks of one chunk into a granted slot."""

    job_id: int
    arena_id: int
    """The arena the slot was granted in."""
    slot: int
    blocks: list[int]
    deadline: float
    """``time.monotonic()``; a worker must not begin to write after it."""


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler half to worker half, once a step."""

    arena: ArenaRef | None
    loads: list[LoadJob]
    saves: list[SaveJob]
    idle: bool
    """No tokens are computed in this step: the worker may wait a little for its loads."""


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half, once a step: what ended. Values count the workers."""

    saved: dict[int, int] = field(default_factory=dict)
    """job_id of saves whose bytes are in their slots."""
    unsaved: dict[int, int] = field(default_factory=dict)
    """job_id of saves that were not made (too late, or failed)."""
    failed_loads: dict[str, int] = field(default_factory=dict)
    """request_id to the first chunk that could not be loaded."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both workers' reports as one."""
        assert isinstance(other, WorkerReport)
        for mine, theirs in ((self.saved, other.saved), (self.unsaved, other.unsaved)):
            for job_id, workers in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + workers
        for request_id, chunk in other.failed_loads.items():
            self.failed_loads[request_id] = min(chunk, self.failed_loads.get(request_id, chunk))
        return self


@dataclass(frozen=True, slots=True)
class LayoutReport(KVConnectorHandshakeMetadata):
    """Worker half to scheduler half, once at start: how its pages lie."""

    layout: ChunkLayout
    packing: str
    """The layout's name and the instruction set by which pages are packed, if any."""

    def digest(self) -> str:
        """Part of the namespace."""
        return f"{self.layout.digest()} {self.packing}"
