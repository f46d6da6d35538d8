"""Tiers below memory: where chunks survive eviction and restarts."""

from lmkv_ray.tiers.base import Tier, TierCapabilities, TierChunk

__all__ = ["Tier", "TierCapabilities", "TierChunk"]
