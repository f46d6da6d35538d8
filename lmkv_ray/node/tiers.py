"""The tiers of a shard, as the settings want them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from lmkv_ray.clock import Clock
from lmkv_ray.config import Settings
from lmkv_ray.errors import LmkvError
from lmkv_ray.policies import make_policy
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers import Tier
from lmkv_ray.tiers.disk import DiskTier
from lmkv_ray.tiers.remote import RemoteTier

logger = logging.getLogger(__name__)


async def _open_disk(settings: Settings, clock: Clock) -> Tier | None:
    if settings.disk_dir is None:
        return None
    return await DiskTier.open(
        settings.disk_dir,
        None if settings.disk_capacity is None else int(settings.disk_capacity),
        make_policy=partial(make_policy, settings.eviction_policy),
        clock=clock,
        key_file=settings.encryption_key_file,
        threads=settings.disk_threads,
    )


async def _open_remote(settings: Settings, clock: Clock) -> Tier | None:
    if settings.remote_url is None:
        return None
    return await RemoteTier.open(
        settings.remote_url,
        settings.remote_options,
        clock=clock,
        key_file=settings.encryption_key_file,
    )


OPENERS: dict[str, Callable[[Settings, Clock], Awaitable[Tier | None]]] = {
    "disk": _open_disk,
    "remote": _open_remote,
}
"""By name, the quickest first; each gives None if its tier is not configured."""

TIER_SETTINGS = {"disk": "LMKV_DISK_DIR", "remote": "LMKV_REMOTE_URL"}
"""By name, the setting that gives a node such a tier."""


async def open_tiers(settings: Settings, clock: Clock) -> tuple[list[Tier], list[TierStatus]]:
    """Open what is configured.

    A tier that is configured wrongly costs itself, not the cache.

    Args:
        settings: the settings of this node's shard.
        clock: the machine's time and chance.

    Returns:
        the tiers, the quickest first, and the state of those that were refused.
    """
    tiers: list[Tier] = []
    refused: list[TierStatus] = []
    for name, opener in OPENERS.items():
        try:
            tier = await opener(settings, clock)
        except LmkvError as error:
            logger.error("lmkv_ray: no %s tier: %s", name, error)
            refused.append(
                TierStatus(
                    name=name, chunks=0, nbytes=0, capacity=0, problem=str(error), counters={}
                )
            )
        else:
            tiers += [tier] if tier is not None else []
    return tiers, refused
