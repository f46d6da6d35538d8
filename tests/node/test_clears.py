"""A node's part of clears, with tiers that cannot do theirs at once."""

from __future__ import annotations

from lmkv_ray.config import load_settings
from lmkv_ray.messages import Clear, Commit
from lmkv_ray.node.clears import NodeClears
from lmkv_ray.tiers.clears import Unheard
from tests.node.fakes import CHUNK_BYTES, LocalShard, new_arena, no_peers
from tests.tiers.memory_tier import MemoryTier

SETTINGS = load_settings({"capacity": 4 << 20})


async def test_memory_and_disk_agree_when_a_shard_starts() -> None:
    writer = new_arena(SETTINGS)
    peers = no_peers()
    shard, tier = LocalShard(writer, SETTINGS), MemoryTier()
    tier.cleared = 7
    await NodeClears(shard, [tier], peers).start()
    assert shard.cleared == peers.cleared == 7, "nothing in memory has missed a clear"
    shard = LocalShard(writer, SETTINGS)
    size = writer.geometry.slot_size(CHUNK_BYTES)
    [slot] = shard.reserve(7, size, 1)
    shard.commit(7, size, [Commit(slot=slot, key=b"k" * 16, nbytes=10)], [0])
    shard.cleared = 5
    await NodeClears(shard, [tier], peers).start()
    assert shard.cleared == peers.cleared == 5, "but this may have"
    assert tier.numbers == [7, 5], "and the disk is told what memory knows"
    shard.close()


async def test_the_arena_remembers_a_clear_when_every_tier_has_done_it() -> None:
    shard = LocalShard(new_arena(SETTINGS), SETTINGS)
    tiers = [MemoryTier("a"), MemoryTier("b")]
    peers = no_peers()
    clearing = NodeClears(shard, tiers, peers)
    tiers[1].settled = False
    done = await clearing.catch_up([Clear(number=3), Clear(number=5)])
    assert done.previous == 0
    assert done.pending == ["b"]
    assert shard.cleared == peers.cleared == 5, "nothing of it is served any more"
    clearing.settle()
    assert shard.writer.cleared == 0, "a successor has to be told again"
    tiers[1].settled = True
    clearing.settle()
    assert shard.writer.cleared == 5
    assert (await clearing.catch_up([Clear(number=5), Clear(number=6)])).previous == 5
    assert tiers[0].numbers == [3, 5, 6]
    shard.close()


async def test_what_others_cleared_in_a_shared_store_is_ordered_for_all_nodes() -> None:
    shard, tier = LocalShard(new_arena(SETTINGS), SETTINGS), MemoryTier()
    clearing = NodeClears(shard, [tier], no_peers())
    ordered: list[tuple[bytes, int, bool]] = []
    numbers: dict[int, int | None] = {1: 8, 2: 2, 3: 3, 5: 8, 9: None, 0: 7}

    async def order(space: bytes, number: int, old: bool) -> int | None:
        """What the directory answers; this node hears of new ones later."""
        ordered.append((space, number, old))
        return numbers[number]

    await clearing.catch_up([Clear(number=4)])
    old, missed, own, new, refused, unnumbered = tier.unheard = [
        Unheard(6, 2, before=True),
        Unheard(5, 1, before=True),
        Unheard(7, 3, before=False),
        Unheard(None, 5, before=True),
        Unheard(8, 9, before=False),
        Unheard(9, 0, before=False),
    ]
    await clearing.hear(order)
    assert old not in tier.unheard, "carried out long ago, when this node was here before"
    assert own not in tier.unheard, "carried out before the tier saw it"
    assert tier.unheard == [missed, new, refused, unnumbered], "memory still holds these"
    assert ordered == [
        ((6).to_bytes(8, "little"), 2, True),
        ((5).to_bytes(8, "little"), 1, True),
        ((7).to_bytes(8, "little"), 3, False),
        (b"", 5, True),
        ((8).to_bytes(8, "little"), 9, False),
        ((9).to_bytes(8, "little"), 0, False),
    ]
    await clearing.catch_up([Clear(number=8)])
    await clearing.hear(order)
    assert tier.unheard == [refused]
    assert tier.numbers == [4, 8]
    shard.close()
