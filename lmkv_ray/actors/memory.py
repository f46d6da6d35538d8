"""A cluster's memory: the key-value store of Ray's head (GCS), where Ray Serve keeps its state too.

It is as durable as the cluster: with Redis behind the head it outlives the head, else it ends with
the cluster, and with it all actors.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.experimental import internal_kv  # not public, but what Ray Serve uses as well

SAVE_SECONDS = 2.0
LOAD_SECONDS = 30.0
"""The head may restart while the directory does."""
_KEY = b"clears"


class GcsMemory:
    """See ``ClusterMemory``.

    Args:
        namespace: the Ray namespace of the cache.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = f"lmkv_ray/{namespace}".encode()

    async def load(self) -> bytes | None:
        """See ``ClusterMemory``."""
        get: Any = internal_kv._internal_kv_get
        found: bytes | None = await _in_time(LOAD_SECONDS, get, _KEY, namespace=self._namespace)
        return found

    async def save(self, data: bytes) -> None:
        """See ``ClusterMemory``."""
        put: Any = internal_kv._internal_kv_put
        await _in_time(SAVE_SECONDS, put, _KEY, data, True, namespace=self._namespace)


async def _in_time(within: float, function: Any, *arguments: object, **options: object) -> Any:
    """The result of a function that blocks.

    Raises:
        OSError: it failed, or did not answer in time.
    """
    try:
        call = asyncio.to_thread(function, *arguments, **options)
        return await asyncio.wait_for(call, within)
    except Exception as error:  # Ray raises many types here
        raise OSError(f"Ray's head does not answer: {error!r}") from error
