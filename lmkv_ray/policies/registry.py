"""Eviction policies by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from lmkv_ray.errors import ConfigError
from lmkv_ray.policies.arc import ARC
from lmkv_ray.policies.base import Clock, Policy
from lmkv_ray.policies.expiry import Expiry
from lmkv_ray.policies.hinted import Hinted
from lmkv_ray.policies.lru import LRU
from lmkv_ray.policies.prefix import Prefix
from lmkv_ray.policies.quota import Quota
from lmkv_ray.policies.s3fifo import S3FIFO

POLICIES: Mapping[str, Callable[[Clock], Policy]] = {
    "lru": lambda _: LRU(),
    "arc": lambda _: ARC(),
    "s3fifo": lambda _: S3FIFO(),
    "hinted": Hinted,
}


def make_policy(
    name: str, *, clock: Clock = time.monotonic, tenant_share: float | None = None
) -> Policy:
    """A new, empty policy: the named core, in the wrappers that every core needs.

    Pins are not among them: the allocator, which must know them too, adds those.

    Args:
        name: the policy's name in ``POLICIES``.
        clock: what deadlines are compared with.
        tenant_share: see ``Quota``; None: tenants have no shares.

    Raises:
        ConfigError: no policy has this name.
    """
    try:
        policy = POLICIES[name](clock)
    except KeyError:
        raise ConfigError(
            f"There is no eviction policy called {name!r}.",
            next_step=f"set eviction_policy to one of: {', '.join(sorted(POLICIES))}.",
        ) from None
    if tenant_share is not None:
        policy = Quota(policy, tenant_share)
    return Expiry(Prefix(policy), clock)
