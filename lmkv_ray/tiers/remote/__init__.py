"""The remote tier: an object store that all nodes and clusters share."""

from lmkv_ray.tiers.remote.tier import RemoteTier

__all__ = ["RemoteTier"]
