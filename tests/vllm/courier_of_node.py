"""A courier to the shard of the node that TEST_NODE_ID names, one of several on this machine."""

from __future__ import annotations

import os
import sys

from lmkv_ray.actors.cache import Cache
from lmkv_ray.actors.launch import Handle, find
from lmkv_ray.actors.names import shard_name
from lmkv_ray.courier.process import CourierProcess, main


class OfNode(CourierProcess):
    def _shard(self, cache: Cache, host: str | None) -> Handle | None:
        assert self._settings is not None
        return find(shard_name(os.environ["TEST_NODE_ID"]), self._settings.ray_namespace)


if __name__ == "__main__":
    main(*sys.argv[1:], kind=OfNode)
