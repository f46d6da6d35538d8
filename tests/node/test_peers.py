"""What a shard remembers of other shards."""

from __future__ import annotations

import pytest

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.messages import encode
from lmkv_ray.node import peers as peers_module
from lmkv_ray.node.peers import Peers
from lmkv_ray.orders import Offer, PeerAddress
from tests.node.fakes import Silence, no_directory


class FakeActor(Silence):
    """Another shard; ``obstacle``: why NIXL cannot read from it now."""

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self.asked = 0

    async def ask(self, method: str, *arguments: object, within: float) -> bytes | None:
        self.asked += 1
        return encode(
            PeerAddress(
                node_id="n",
                host="another",
                arena_id=1,
                offers={"nixl": Offer(obstacle=self.obstacle)},
            )
        )


async def test_a_peer_is_asked_once_but_for_obstacles_that_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = FakeActor()
    peers = Peers(actor, no_directory(), "here", "host", SYSTEM_CLOCK)
    actor.obstacle = "the NIXL process did not start"
    for _ in range(2):
        peer = await peers.peer("n", 1.0)
        assert peer is not None
        assert peer.offers["nixl"].obstacle == actor.obstacle
    assert actor.asked == 1
    actor.obstacle = None
    monkeypatch.setattr(peers_module, "AGAIN_SECONDS", 0.0)
    for _ in range(2):
        peer = await peers.peer("n", 1.0)
        assert peer is not None
        assert peer.offers["nixl"].obstacle is None
    assert actor.asked == 2
