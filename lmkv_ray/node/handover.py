"""Copying a node's chunks to others: when it leaves, or for there to be more copies.

Others fetch from it as always, and check what they get: there is no second way for chunks to
move. Ray ends a node that it drains when nothing runs there, so the shard, which goes last, holds
it until the chunks are safe. For the same reason Ray's autoscaler does not see a node with a shard
as idle: ``release_idle_seconds`` lets idle nodes go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from itertools import chain

from lmkv_ray.directory import Held, Order, plan_handoff
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.peers import Peers
from lmkv_ray.node.shard import Shard
from lmkv_ray.orders import Drained, Take

BATCH = 512
"""Chunks that are looked up and ordered at a time, within which a deadline is not noticed."""
TAKE_SECONDS = 10.0
"""How long a peer may take to fetch what one order names."""
PASSES = 4
"""Times that all is gone through: peers may have failed, and new chunks have come."""
AGAIN_SECONDS = 0.2
"""Until a directory that did not answer is asked again, and deltas of others have arrived."""


class Handover:
    """Asks peers to fetch chunks from this shard, as they fetch all others.

    Args:
        shard: the chunks in the memory of this node.
        node_id: the id of this node.
        peers: the nodes that take chunks.
        directory: knows where copies are and where there is room.
    """

    def __init__(
        self, shard: Shard, node_id: str, peers: Peers, directory: DirectoryClient
    ) -> None:
        self._shard = shard
        self._node_id = node_id
        self._peers = peers
        self._directory = directory

    async def drain(self, within: float) -> Drained:
        """Hand over what no other node holds, the most worth first, until the time is over.

        It is not over before the directory knows of the copies: it forgets this node next, and
        no reader would find them.
        """
        deadline = self._shard.clock.monotonic() + within
        copied: set[bytes] = set()  # a directory that hears late has chunks copied twice
        left = 0
        budget: dict[str, int] = {}
        for _ in range(PASSES):
            keys = self._shard.state.chunks.by_worth()
            arrived, left = await self.spread(keys, 1, deadline, budget=budget)
            copied.update(arrived)
            if not (arrived or left) or self._shard.clock.monotonic() > deadline:
                break
            await self._shard.clock.sleep(AGAIN_SECONDS)
        return Drained(copied=len(copied), left=left)

    async def spread(
        self,
        keys: Sequence[bytes],
        copies: int,
        deadline: float,
        *,
        budget: dict[str, int] | None = None,
        shared: bool = False,
    ) -> tuple[list[bytes], int]:
        """See to it that chunks have so many copies on other nodes.

        Args:
            keys: the most important first.
            copies: on nodes that stay.
            deadline: monotonic seconds of the clock.
            budget: bytes that each node may still be given, for several calls with one purpose.
            shared: all nodes do this: leave chunks to the first of those that hold them.

        Returns:
            of which chunks copies were made, one element a copy, and how many are still missing.
        """
        budget = {} if budget is None else budget
        made: list[bytes] = []
        missing = 0
        for i in range(0, len(keys), BATCH):
            batch = keys[i : i + BATCH]
            left = deadline - self._shard.clock.monotonic()
            if left <= 0:
                return made, missing + copies * (len(keys) - i)
            staying = await self._directory.rooms(self._node_id)
            held = None if staying is None else await self._held(batch, staying, left)
            if staying is None or held is None:
                missing += copies * len(batch)
                await self._shard.clock.sleep(min(AGAIN_SECONDS, left))
                continue
            if shared:
                held = [
                    chunk for chunk in held if self._node_id < min(chunk.elsewhere, default="~")
                ]
            # What a node would take at first counts: a full one always offers a part of itself.
            rooms = {node: budget.setdefault(node, room) for node, room in staying.items()}
            wanted = sum(max(copies - len(chunk.elsewhere), 0) for chunk in held)
            orders = plan_handoff(held, rooms, copies)
            budget |= rooms
            sent = await asyncio.gather(*(self._send(order, deadline) for order in orders))
            arrived = [*chain.from_iterable(sent)]
            made += arrived
            missing += max(wanted - len(arrived), 0)
        return made, missing

    async def _held(
        self, keys: Sequence[bytes], staying: Collection[str], within: float
    ) -> list[Held] | None:
        """Those that are still here, and which of the nodes that stay hold them too."""
        holdings = await self._peers.lookup(b"".join(keys), within)
        if holdings is None:
            return None
        elsewhere: list[set[str]] = [set() for _ in keys]
        for holding in holdings:
            if holding.node_id in staying:
                for position in holding.positions:
                    elsewhere[position].add(holding.node_id)
        held = []
        for key, others in zip(keys, elsewhere, strict=True):
            known = self._shard.state.chunks.space_size_and_pin(key)
            if known is not None:
                held.append(Held(key, *known, elsewhere=frozenset(others)))
        return held

    async def _send(self, order: Order, deadline: float) -> list[bytes]:
        within = min(deadline - self._shard.clock.monotonic(), TAKE_SECONDS)
        take = Take(
            node_id=self._node_id,
            space=order.space,
            slot_bytes=order.slot_bytes,
            pinned=order.pinned,
            keys=b"".join(order.keys),
            within=max(within, 0),
            cleared=self._shard.cleared,
        )
        return await self._peers.take(order.node_id, take)
