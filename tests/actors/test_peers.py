"""What a shard remembers of other shards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmkv_ray.actors import peers as peers_module
from lmkv_ray.actors.named import NamedActor
from lmkv_ray.actors.parts import Directory
from lmkv_ray.actors.peers import RayPeers
from lmkv_ray.actors.wire import PeerAddress
from lmkv_ray.messages import encode


class FakeActor:
    """Another shard; ``obstacle``: why NIXL cannot read from it now."""

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self.asked = 0

    async def handle(self, within: float) -> Any:
        return SimpleNamespace()

    async def ask(self, method: str, *args: object, within: float) -> bytes:
        self.asked += 1
        return encode(
            PeerAddress(
                node_id="n",
                host="another",
                arena_path="",
                arena_id=1,
                nixl_obstacle=self.obstacle,
            )
        )


async def test_a_peer_is_asked_once_but_for_obstacles_that_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers, actor = RayPeers("none", "here", Directory("none", 1)), FakeActor()
    peers._actors["n"] = cast(NamedActor, actor)
    actor.obstacle = "the NIXL process did not start"
    for _ in range(2):
        peer = await peers.peer("n", 1.0)
        assert peer is not None
        assert peer.nixl_obstacle == actor.obstacle
    assert actor.asked == 1
    actor.obstacle = None
    monkeypatch.setattr(peers_module, "AGAIN_SECONDS", 0.0)
    for _ in range(2):
        peer = await peers.peer("n", 1.0)
        assert peer is not None
        assert peer.nixl_obstacle is None
    assert actor.asked == 2
