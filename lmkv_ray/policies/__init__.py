"""Eviction policies: which chunk is evicted first."""

from lmkv_ray.policies.arc import ARC
from lmkv_ray.policies.base import Clock, Policy
from lmkv_ray.policies.expiry import Expiry
from lmkv_ray.policies.hinted import Hinted
from lmkv_ray.policies.lru import LRU
from lmkv_ray.policies.pins import Pins
from lmkv_ray.policies.prefix import Prefix
from lmkv_ray.policies.quota import Quota
from lmkv_ray.policies.registry import POLICIES, make_policy
from lmkv_ray.policies.s3fifo import S3FIFO

__all__ = [
    "ARC",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "Clock",
    "Expiry",
    "Hinted",
    "Pins",
    "Policy",
    "Prefix",
    "Quota",
    "make_policy",
]
