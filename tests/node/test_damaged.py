"""Another process of this user has written over the tables of an arena whose shard is restarted."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from lmkv_ray.arena import ArenaReader, ArenaWriter
from lmkv_ray.arena.format import HEADER_BYTES
from lmkv_ray.config import load_settings
from tests.node.fakes import FakeEngine, LocalShard, make_keys

SETTINGS = load_settings({"capacity": 4 << 20})
SIZES = [4, 64, 4096], [1, 8, 500], [3, 16, 63]
"""How far from the beginning of a table, how many words, and of how many bits."""


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_arena_is_refused_or_serves(seed: int) -> None:
    name = f"test.{secrets.token_hex(4)}"
    shard = LocalShard(ArenaWriter.create(name, 4 << 20), SETTINGS)
    engine = FakeEngine(shard.call)
    engine.save(make_keys(12))
    holder = ArenaReader.attach(shard.writer.path)
    engine.close()
    shard.close()
    damage(holder, np.random.default_rng(seed))
    try:
        writer = ArenaWriter.find_and_adopt(name)
    finally:
        holder.close()
    if writer is None:  # refused: the shard makes a new one
        return
    successor = LocalShard(writer, SETTINGS)
    engine = FakeEngine(successor.call)
    successor.tick()
    for round_ in range(20):
        keys = make_keys(12, seed=100 + round_)
        assert engine.save(keys).refused == []
        assert engine.intact(keys) == 12
    engine.close()
    successor.close()


def damage(arena: ArenaReader, chance: np.random.Generator) -> None:
    """Random words in a random part of the tables, never in the sealed half of the header."""
    geometry = arena.geometry
    starts = [
        HEADER_BYTES,
        geometry.crews_offset,
        geometry.ghosts_offset,
        geometry.index_offset,
        geometry.slots_offset,
        geometry.data_offset,
    ]
    which = int(chance.integers(len(starts) - 1))
    start, end = starts[which], starts[which + 1]
    whole = arena._segment.map(writable=True, nbytes=geometry.data_offset)
    words = whole[start:end].view(np.uint64)
    near, many, bits = (
        int(chance.choice(choices)) for choices in ([4, 64, 4096], [1, 8, 500], [3, 16, 63])
    )
    places = chance.integers(min(len(words), near), size=many)
    words[places] = chance.integers(0, 2**bits, size=many, dtype=np.uint64)
