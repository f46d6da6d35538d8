"""The metrics of shards, tiers and the directory: name, kind, labels, meaning.

What the services export, docs/metrics.md and the tests of the dashboard are made from these
declarations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lmkv_ray.status import DirectoryStatus, ShardStatus, TierStatus


class MetricKind(Enum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    """Grows from 0 since the process started; shown with ``_total`` behind its name."""
    GAUGE = "gauge"


@dataclass(frozen=True)
class Metric:
    """One declared metric of a service. Ray puts ``ray_`` in front of its name."""

    name: str
    kind: MetricKind
    text: str
    """Its meaning, one sentence."""
    labels: tuple[str, ...]
    counter: str = ""
    """Under which name the status of the service has it among its counters; empty: not there."""

    @property
    def exported(self) -> str:
        """As Prometheus has it."""
        return f"ray_{self.name}{'_total' if self.kind is MetricKind.COUNTER else ''}"


@dataclass(frozen=True)
class Sample:
    """The value that a metric has now."""

    metric: Metric
    labels: tuple[str, ...]
    """One value for each of the metric's labels."""
    value: float


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> Metric:
    return Metric(f"lmkv_{name}", MetricKind.GAUGE, text, labels)


def _counter(name: str, counter: str, text: str, labels: tuple[str, ...]) -> Metric:
    return Metric(f"lmkv_{name}", MetricKind.COUNTER, text, labels, counter)


_NODE = ("node",)
_TIER = ("node", "tier")
_PART = ("part",)

CAPACITY = _gauge("capacity_bytes", "Bytes of the arena; 0 if the node has none.", _NODE)
USED = _gauge("used_bytes", "Bytes of all chunks in the arena.", _NODE)
CHUNKS = _gauge("chunks", "Chunks in the arena.", _NODE)
PINNED = _gauge("pinned_chunks", "Chunks that are not evicted to make room.", _NODE)
ENGINES = _gauge("engines", "Engines that are attached to the shard.", _NODE)
SLOTS = _gauge("granted_slots", "Slots that engines may fill and have not filled yet.", _NODE)
DEVICE_CHUNKS = _gauge(
    "device_chunks", "Chunks in the prefix caches of the node's engines themselves.", _NODE
)
PROBLEM = _gauge("problem", "1 if the shard does not work ('lmkv status' says why), else 0.", _NODE)
REFUSALS = _gauge("refusals", "Engines' reasons to be served without cache, lately.", _NODE)
DRAINING = _gauge(
    "draining", "1 if the node hands its chunks over before it leaves, else 0.", _NODE
)

NODE_COUNTERS = (
    _counter("committed_chunks", "committed", "Chunks that became ready in the arena.", _NODE),
    _counter(
        "duplicate_chunks", "duplicate", "Chunks that were saved though they were there.", _NODE
    ),
    _counter("refused_chunks", "refused", "Saved chunks that the shard did not accept.", _NODE),
    _counter("evicted_chunks", "evicted", "Chunks evicted from the arena to make room.", _NODE),
    _counter("cleared_chunks", "cleared", "Chunks removed by clears.", _NODE),
    _counter("unsound_hints", "unsound", "Commits whose hints were beyond the limits.", _NODE),
    _counter("slots_granted", "granted", "Slots that were granted to engines.", _NODE),
    _counter("slots_not_granted", "ungranted", "Slots that engines wanted and did not get.", _NODE),
    _counter(
        "admissions_missed",
        "missed",
        "Chunks that had earned a tier and were not written: too many waited.",
        _NODE,
    ),
    _counter("policy_errors", "policy_errors", "Errors inside the eviction policy.", _NODE),
    _counter("staged_chunks", "staged", "Chunks fetched from tiers and other nodes.", _NODE),
    _counter("staged_bytes", "staged_bytes", "Bytes of these chunks.", _NODE),
    _counter("stage_failed_chunks", "fetch_failed", "Chunks a source did not deliver.", _NODE),
    _counter(
        "stage_left_chunks",
        "left_to_compute",
        "Chunks that were not fetched, because computing them was expected to be quicker.",
        _NODE,
    ),
    _counter(
        "stage_expected_seconds",
        "expected_seconds",
        "Seconds that fetches were expected to take; compare with lmkv_stage_seconds.",
        _NODE,
    ),
    _counter("stage_seconds", "taken_seconds", "Seconds that the same fetches took.", _NODE),
)

TIER_CHUNKS = _gauge("tier_chunks", "Chunks of a tier, where the tier counts them.", _TIER)
TIER_USED = _gauge("tier_used_bytes", "Bytes that a tier takes, where they are known.", _TIER)
TIER_CAPACITY = _gauge("tier_capacity_bytes", "Bytes that a tier may take, if bounded.", _TIER)
TIER_PROBLEM = _gauge("tier_problem", "1 if a tier is out of use at present, else 0.", _TIER)

TIER_COUNTERS = (
    _counter("tier_stored_chunks", "stored", "Chunks written to a tier.", _TIER),
    _counter("tier_stored_bytes", "stored_bytes", "Bytes written to a tier.", _TIER),
    _counter(
        "tier_store_busy_chunks",
        "store_busy",
        "Chunks not written, because too much was being written already.",
        _TIER,
    ),
    _counter(
        "tier_store_changed_chunks",
        "store_changed",
        "Chunks not written, because they were evicted from memory meanwhile.",
        _TIER,
    ),
    _counter(
        "tier_store_failed_chunks",
        "store_failed",
        "Chunks not written, because the disk or the store refused.",
        _TIER,
    ),
    _counter(
        "tier_store_no_room_chunks",
        "store_no_room",
        "Chunks not written, because nothing could be evicted from the tier.",
        _TIER,
    ),
    _counter(
        "tier_store_known_chunks",
        "store_known",
        "Chunks not written, because another node had written them.",
        _TIER,
    ),
    _counter("tier_evicted_chunks", "evicted", "Chunks evicted from a tier.", _TIER),
    _counter("tier_read_chunks", "read", "Chunks read from a tier.", _TIER),
    _counter("tier_read_bytes", "read_bytes", "Bytes read from a tier.", _TIER),
    _counter(
        "tier_read_corrupt_chunks",
        "read_corrupt",
        "Chunks that were damaged, and removed instead of served.",
        _TIER,
    ),
    _counter("tier_read_late_chunks", "read_late", "Chunks that did not arrive in time.", _TIER),
    _counter("tier_read_failed_chunks", "read_failed", "Chunks that could not be read.", _TIER),
    _counter(
        "tier_read_too_large_chunks",
        "read_too_large",
        "Objects larger than the chunk that they are called after; they are not read.",
        _TIER,
    ),
    _counter("tier_asked_chunks", "asked", "Chunks that a remote store was asked about.", _TIER),
    _counter("tier_troubles", "troubles", "How often a tier went out of use.", _TIER),
)

DIRECTORY_CHUNKS = _gauge(
    "directory_chunks", "Distinct chunks that a part of the directory knows.", _PART
)
DIRECTORY_CAPACITY = _gauge(
    "directory_capacity_chunks", "Chunks that this part can remember.", _PART
)
DIRECTORY_NODES = _gauge("directory_nodes", "Nodes that report to this part.", _PART)
DIRECTORY_UNSYNCED = _gauge(
    "directory_unsynced_nodes", "Nodes whose whole content this part does not know yet.", _PART
)

SERVICE_METRICS = (
    *(CAPACITY, USED, CHUNKS, PINNED, ENGINES, SLOTS, DEVICE_CHUNKS, PROBLEM, REFUSALS, DRAINING),
    *NODE_COUNTERS,
    *(TIER_CHUNKS, TIER_USED, TIER_CAPACITY, TIER_PROBLEM),
    *TIER_COUNTERS,
    *(DIRECTORY_CHUNKS, DIRECTORY_CAPACITY, DIRECTORY_NODES, DIRECTORY_UNSYNCED),
)
"""What shards and the directory export on the metrics port of Ray."""


def node_samples(status: ShardStatus) -> Iterator[Sample]:
    """What a shard exports. Counters of tiers that a tier does not count are left out."""
    node = (status.node_id[:12],)
    yield Sample(CAPACITY, node, status.capacity)
    yield Sample(USED, node, status.nbytes)
    yield Sample(CHUNKS, node, status.chunks)
    yield Sample(PINNED, node, status.pinned)
    yield Sample(ENGINES, node, len(status.engines))
    yield Sample(SLOTS, node, sum(engine.slots for engine in status.engines))
    yield Sample(DEVICE_CHUNKS, node, sum(engine.device_chunks for engine in status.engines))
    yield Sample(PROBLEM, node, status.problem is not None)
    yield Sample(REFUSALS, node, len(status.refusals))
    yield Sample(DRAINING, node, status.draining)
    for metric in NODE_COUNTERS:
        yield Sample(metric, node, status.counters.get(metric.counter, 0))
    for tier in status.tiers:
        yield from _tier_samples(node[0], tier)


def _tier_samples(node: str, status: TierStatus) -> Iterator[Sample]:
    labels = (node, status.name)
    for metric, value in (
        (TIER_CHUNKS, status.chunks),
        (TIER_USED, status.nbytes),
        (TIER_CAPACITY, status.capacity),
    ):
        if value >= 0:
            yield Sample(metric, labels, value)
    yield Sample(TIER_PROBLEM, labels, status.problem is not None)
    for metric in TIER_COUNTERS:
        if metric.counter in status.counters:
            yield Sample(metric, labels, status.counters[metric.counter])


def part_samples(status: DirectoryStatus) -> Iterator[Sample]:
    """What a part of the directory exports."""
    part = (str(status.part),)
    yield Sample(DIRECTORY_CHUNKS, part, status.chunks)
    yield Sample(DIRECTORY_CAPACITY, part, status.capacity)
    yield Sample(DIRECTORY_NODES, part, status.nodes)
    yield Sample(DIRECTORY_UNSYNCED, part, status.unsynced)
