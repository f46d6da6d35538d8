"""What a node that leaves says of its chunks, whatever the directory has heard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.directory import Holding
from lmkv_ray.keys import key_array, key_list
from lmkv_ray.node.directory import DirectoryClient
from lmkv_ray.node.handover import PASSES, Handover
from lmkv_ray.node.peers import Peers
from lmkv_ray.orders import Drained, Take
from tests.node.fakes import FakeEngine, LocalShard, make_keys, new_arena

SETTINGS = load_settings({"capacity": 8 << 20})
KEYS = make_keys(20)


class Elsewhere:
    """Another node and the directory, which hears of its chunks late, or never.

    Args:
        takes: how many chunks of an order it fetches.
        hears_after: orders.
    """

    def __init__(self, takes: int, hears_after: int) -> None:
        self.takes = takes
        self.hears_after = hears_after
        self.orders: list[list[bytes]] = []

    async def rooms(self, but: str) -> dict[str, int]:
        return {"there": 1 << 30}

    async def lookup(self, keys: bytes, within: float) -> list[Holding]:
        known = {key for order in self.orders[: -self.hears_after] for key in order}
        positions = [i for i, key in enumerate(key_list(key_array(keys))) if key in known]
        return [Holding(node_id="there", run=0, positions=positions)] if positions else []

    async def take(self, node_id: str, take: Take) -> list[bytes]:
        self.orders.append(key_list(key_array(take.keys))[: self.takes])
        return self.orders[-1]


@pytest.fixture
def shard() -> Iterator[LocalShard]:
    shard = LocalShard(new_arena(SETTINGS), SETTINGS, "here")
    engine = FakeEngine(shard.call)
    engine.save(KEYS)
    yield shard
    engine.close()
    shard.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv_ray.node.handover.AGAIN_SECONDS", 0.0)


async def drain(shard: LocalShard, elsewhere: Elsewhere) -> Drained:
    peers, directory = cast(Peers, elsewhere), cast(DirectoryClient, elsewhere)
    return await Handover(shard, "here", peers, directory).drain(10)


async def test_a_chunk_that_is_copied_again_counts_once(shard: LocalShard) -> None:
    elsewhere = Elsewhere(takes=20, hears_after=PASSES)
    assert (await drain(shard, elsewhere)).copied == 20
    assert len(elsewhere.orders) == PASSES


async def test_what_did_not_arrive_is_ordered_again(shard: LocalShard) -> None:
    elsewhere = Elsewhere(takes=15, hears_after=1)
    assert (await drain(shard, elsewhere)).copied == 20
