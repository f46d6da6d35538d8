"""Tiers below memory: where chunks survive eviction and restarts."""

from lmkv_ray.tiers.base import Tier, TierCapabilities, TierChunk, TierStatus

__all__ = ["Tier", "TierCapabilities", "TierChunk", "TierStatus"]
