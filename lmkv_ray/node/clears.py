"""A node's part of clears."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from lmkv_ray.messages import Clear, ShardCleared
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.shard import Shard
from lmkv_ray.tiers import Tier


class NodeClears:
    """Clears memory and tiers, each clear once.

    Args:
        shard: the memory of this node.
        tiers: the tiers of this node.
        peers: are told what this node has carried out, because peers that have missed a clear must
            not be read from.
    """

    def __init__(self, shard: Shard, tiers: Sequence[Tier], peers: Peers) -> None:
        self._shard = shard
        self._tiers = tiers
        self._peers = peers
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Agree with the tiers of this node, before anything is read from them.

        A disk may have been elsewhere, or refused, while memory was cleared: what it missed then
        the directory does not tell it again. An empty memory has missed nothing that its disk has
        not.
        """
        own = [tier for tier in self._tiers if not tier.capabilities.shared]
        if not len(self._shard.state.chunks):
            self._shard.cleared = max([self._shard.cleared, *(tier.cleared for tier in own)])
        self._peers.cleared = self._shard.cleared
        for tier in own:
            if self._shard.cleared:
                await tier.clear(None, self._shard.cleared)

    async def clear(self, space: bytes, number: int = 0) -> None:
        """Serve nothing any more of a space (8 bytes, little endian; none: all)."""
        which = int.from_bytes(space, "little") if space else None
        self._shard.clear(which)
        await asyncio.gather(*(tier.clear(which, number) for tier in self._tiers))

    async def catch_up(self, clears: Sequence[Clear]) -> ShardCleared:
        """Carry out those of the directory's clears that are new."""
        before = self._shard.cleared
        async with self._one_at_a_time:
            for clear in clears:
                if clear.number > self._shard.cleared:
                    await self.clear(clear.space, clear.number)
                    # Noted last: a clear that is interrupted is carried out again.
                    self._shard.cleared = self._peers.cleared = clear.number
        pending = [tier.name for tier in self._tiers if not tier.settled]
        return ShardCleared(previous=before, pending=pending)

    async def hear(self, order: Callable[[bytes, int, bool], Awaitable[int | None]]) -> None:
        """Let all nodes clear what others, who share a tier with us, have cleared there.

        Call when the directory has said what this node had missed.

        Args:
            order: asks the directory for a clear of a space with a number, which was in the store
                when this node began to look or was not: the number under which it has told all
                nodes that answer, this one too; None: it does not agree.
        """
        for tier in self._tiers:
            for clear in [*tier.unheard]:
                which = b"" if clear.space is None else clear.space.to_bytes(8, "little")
                # Also one with a lower number than what this node has carried out: while the store
                # was out of reach, another cluster may have cleared and then this one.
                number = await order(which, clear.number, clear.before)
                # What was carried out before the tier saw it is no news to memory.
                if number is not None and number <= self._shard.cleared:
                    tier.heard(clear)

    def settle(self) -> None:
        """Let the arena remember what no tier has yet to do."""
        if all(tier.settled for tier in self._tiers):
            self._shard.settle()
