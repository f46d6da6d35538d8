"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lmkv_ray.errors import ConfigError
from lmkv_ray.policies.base import Policy
from lmkv_ray.policies.lru import LRU

POLICIES: Mapping[str, Callable[[], Policy]] = {"lru": LRU}


def make_policy(name: str) -> Policy:
    """A new, empty policy.

    Raises:
        ConfigError: no policy has this name.
    """
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(
            f"There is no eviction policy called {name!r}.",
            next_step=f"set eviction_policy to one of: {', '.join(sorted(POLICIES))}.",
        ) from None
