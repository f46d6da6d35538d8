"""A node's part of clears, with tiers that cannot do theirs at once."""

from __future__ import annotations

import secrets

from lmkv_ray.actors.clearing import Clearing
from lmkv_ray.actors.core import Shard, open_arena
from lmkv_ray.actors.parts import Directory
from lmkv_ray.actors.peers import RayPeers
from lmkv_ray.config import load_settings
from lmkv_ray.messages import Clear, Commit
from tests.actors.fakes import CHUNK_BYTES
from tests.tiers.memory_tier import MemoryTier

SETTINGS = load_settings({"capacity": 4 << 20})


async def test_memory_and_disk_agree_when_a_shard_starts() -> None:
    name = f"clear.{secrets.token_hex(4)}"
    writer = open_arena(SETTINGS, name, restarted=False)
    peers = RayPeers("none", "n", Directory("none", 1))
    shard, tier = Shard(writer, SETTINGS, "n"), MemoryTier()
    tier.cleared = 7
    await Clearing(shard, [tier], peers).start()
    assert shard.cleared == peers.cleared == 7, "nothing in memory has missed a clear"
    shard = Shard(writer, SETTINGS, "n")
    size = writer.geometry.slot_size(CHUNK_BYTES)
    [slot] = shard.reserve(7, size, 1)
    shard.commit(7, size, [Commit(slot=slot, key=b"k" * 16, nbytes=10)], [0])
    shard.cleared = 5
    await Clearing(shard, [tier], peers).start()
    assert shard.cleared == peers.cleared == 5, "but this may have"
    assert tier.numbers == [7, 5], "and the disk is told what memory knows"
    shard.close()


async def test_the_arena_remembers_a_clear_when_every_tier_has_done_it() -> None:
    name = f"clear.{secrets.token_hex(4)}"
    shard = Shard(open_arena(SETTINGS, name, restarted=False), SETTINGS, "n")
    tiers = [MemoryTier("a"), MemoryTier("b")]
    peers = RayPeers("none", "n", Directory("none", 1))
    clearing = Clearing(shard, tiers, peers)
    tiers[1].settled = False
    done = await clearing.catch_up([Clear(number=3), Clear(number=5)])
    assert done.before == 0
    assert done.pending == ["b"]
    assert shard.cleared == peers.cleared == 5, "nothing of it is served any more"
    clearing.settle()
    assert shard.writer.cleared == 0, "a successor has to be told again"
    tiers[1].settled = True
    clearing.settle()
    assert shard.writer.cleared == 5
    assert (await clearing.catch_up([Clear(number=5), Clear(number=6)])).before == 5
    assert tiers[0].numbers == [3, 5, 6]
    shard.close()


async def test_what_others_cleared_in_a_shared_store_is_ordered_for_all_nodes() -> None:
    name = f"clear.{secrets.token_hex(4)}"
    shard, tier = Shard(open_arena(SETTINGS, name, restarted=False), SETTINGS, "n"), MemoryTier()
    clearing = Clearing(shard, [tier], RayPeers("none", "n", Directory("none", 1)))
    ordered: list[tuple[bytes, int]] = []

    async def order(space: bytes, number: int) -> bool:
        ordered.append((space, number))
        return number < 9  # the directory does not answer at first

    await clearing.catch_up([Clear(number=4)])
    tier.unheard = [(7, 3), (None, 5), (8, 9)]
    await clearing.hear(order)
    assert ordered == [((7).to_bytes(8, "little"), 3), (b"", 5), ((8).to_bytes(8, "little"), 9)]
    assert tier.numbers == [4, 3], "memory had done it; the others come from the directory"
    shard.close()
