"""The tiers of a shard, as the settings want them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from lmkv_ray.config import Settings
from lmkv_ray.errors import LmkvError
from lmkv_ray.tiers import Tier, TierStatus

logger = logging.getLogger(__name__)

OPENERS: dict[str, Callable[[Settings], Awaitable[Tier | None]]] = {}
"""By name, the quickest first; each gives None if its tier is not configured."""


async def open_tiers(settings: Settings) -> tuple[list[Tier], list[TierStatus]]:
    """Open what is configured.

    A tier that is configured wrongly costs itself, not the cache.

    Returns:
        the tiers, the quickest first, and the state of those that were refused.
    """
    tiers: list[Tier] = []
    refused: list[TierStatus] = []
    for name, opener in OPENERS.items():
        try:
            tier = await opener(settings)
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
