"""Who is evicted first."""

from lmkv_ray.policies.base import Policy
from lmkv_ray.policies.lru import LRU
from lmkv_ray.policies.registry import POLICIES, make_policy

__all__ = ["LRU", "POLICIES", "Policy", "make_policy"]
