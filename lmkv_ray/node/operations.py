"""What people do to chunks by name. Each is safe while engines use the chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lmkv_ray.directory import Holding, Location
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.node.demotion import Demotion
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.shard import Shard
from lmkv_ray.orders import Move, Take
from lmkv_ray.tiers import Tier

TIER_SECONDS = 1.0
"""How long a tier of this node may take to say what it holds."""


class Operations:
    """One shard's part of an operation. Chunks it does not hold are other shards' part.

    Args:
        shard: the chunks in the memory of this node.
        node_id: the id of this node.
        tiers: the tiers of this node.
        demotion: writes chunks to the tiers.
        peers: the other nodes.
    """

    def __init__(
        self,
        shard: Shard,
        node_id: str,
        tiers: Sequence[Tier],
        demotion: Demotion,
        peers: Peers,
    ) -> None:
        self._shard = shard
        self._node_id = node_id
        self._tiers = {tier.name: tier for tier in tiers}
        self._demotion = demotion
        self._peers = peers

    async def where(self, keys: bytes) -> list[Holding]:
        """Which of these chunks the tiers of this node alone hold."""
        found: dict[Location, list[int]] = {}
        for name, tier in self._tiers.items():
            if tier.capabilities.instant and not tier.capabilities.shared:
                held = np.flatnonzero(await tier.lookup(key_array(keys), TIER_SECONDS)).tolist()
                if held:
                    found[Location(self._node_id, name)] = held
        return Holding.ranked(found)

    async def pin(self, keys: bytes, pinned: bool) -> list[bytes]:
        """Keep chunks from being evicted to make room, or no longer; those pinned in memory now."""
        for tier in self._tiers.values():
            await tier.pin(key_array(keys), pinned)
        return self._shard.pin(key_list(key_array(keys)), pinned)

    def evict(self, keys: bytes) -> list[bytes]:
        """Remove chunks from memory; those that were there. Lower tiers keep theirs."""
        here = self._here(keys)
        self._shard.evict(here)
        return here

    async def move(self, move: Move) -> list[bytes]:
        """Move the chunks that are in memory here: copy them, then evict what was copied.

        Returns:
            those that are there now.
        """
        here = self._here(move.keys)
        if move.to == self._node_id:
            return here
        if move.to in self._tiers:
            moved = await self._demotion.write(here, self._tiers[move.to])
        else:
            moved = await self._give(here, move.to, move.within)
        self._shard.evict(moved)
        return moved

    async def _give(self, keys: list[bytes], node_id: str, within: float) -> list[bytes]:
        """Let another node fetch chunks, in the order they have; a leading part may arrive."""
        deadline = self._shard.clock.monotonic() + within
        groups: defaultdict[tuple[int, int, bool], list[bytes]] = defaultdict(list)
        for key in keys:
            if (kind := self._shard.state.chunks.space_size_and_pin(key)) is not None:
                groups[kind].append(key)
        given: list[bytes] = []
        for (space, slot_bytes, pinned), group in groups.items():
            take = Take(
                node_id=self._node_id,
                space=space,
                slot_bytes=slot_bytes,
                pinned=pinned,
                keys=b"".join(group),
                within=max(deadline - self._shard.clock.monotonic(), 0),
                cleared=self._shard.cleared,
            )
            given += await self._peers.take(node_id, take)
        return given

    def _here(self, keys: bytes) -> list[bytes]:
        return [key for key in key_list(key_array(keys)) if key in self._shard.state.chunks]
