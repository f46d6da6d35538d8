"""The life of a shard's chunks: pure, no I/O."""

from lmkv_ray.shard.admission import Admission, Rule
from lmkv_ray.shard.allocator import Allocator
from lmkv_ray.shard.deltas import DeltaLog
from lmkv_ray.shard.instructions import (
    AssignExtent,
    Free,
    Instruction,
    Publish,
    Reserve,
    Retire,
    Spoil,
)
from lmkv_ray.shard.plan import FetchPlan, plan_fetches
from lmkv_ray.shard.refusals import Refusals
from lmkv_ray.shard.state import ShardState
from lmkv_ray.shard.values import Counters, Limits, RecoveredSlot

__all__ = [
    "Admission",
    "Allocator",
    "AssignExtent",
    "Counters",
    "DeltaLog",
    "FetchPlan",
    "Free",
    "Instruction",
    "Limits",
    "Publish",
    "RecoveredSlot",
    "Refusals",
    "Reserve",
    "Retire",
    "Rule",
    "ShardState",
    "Spoil",
    "plan_fetches",
]
