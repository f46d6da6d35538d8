"""What engines tell of their devices: known, forgotten with the engine, and bounded."""

import pytest

from lmkv_ray.messages import Delta, DeviceDelta, Exchange, Hello, Owner
from lmkv_ray.policies import LRU
from lmkv_ray.shard import Allocator, DeltaLog, ShardState, devices

KEYS = [bytes([i]) * 16 for i in range(1, 9)]


class Node:
    """A shard with two engines in different spaces."""

    def __init__(self) -> None:
        allocator = Allocator(4, 1 << 20, 1 << 16, LRU)
        self.state = ShardState(allocator, Owner(pid=1, start=1), DeltaLog("n", 1))
        for name in "ef":
            self.hello(name)
        while not self.take().end:
            pass

    def hello(self, name: str) -> None:
        owner = Owner(pid=ord(name), start=1)
        space = ord(name)
        message = Hello(
            engine_id=name, owner=owner, space=space, model="m", slot_bytes=1 << 16, held=[]
        )
        self.state.hello(message, 0)

    def tell(self, name: str, added: list[bytes], removed: list[bytes] = []) -> None:  # noqa: B006
        exchange = Exchange(
            engine_id=name, device_added=b"".join(added), device_removed=b"".join(removed)
        )
        assert self.state.exchange(exchange, 0)[0].known

    def take(self) -> Delta:
        return self.state.delta()

    @property
    def counts(self) -> list[int]:
        return [self.state.devices.count(name) for name in "ef"]


@pytest.fixture
def node() -> Node:
    return Node()


def test_what_is_told_again_is_no_news(node: Node) -> None:
    node.tell("e", KEYS[:3])
    assert node.take().devices == [
        DeviceDelta(engine_id="e", added=b"".join(KEYS[:3]), removed=b"")
    ]
    node.tell("e", KEYS[:2], KEYS[5:])
    assert node.take().devices == []
    node.tell("e", [], KEYS[:1])
    assert node.take().devices == [DeviceDelta(engine_id="e", added=b"", removed=KEYS[0])]
    assert node.counts == [2, 0]


def test_a_dead_engine_holds_nothing(node: Node) -> None:
    node.tell("e", KEYS[:3])
    node.tell("f", KEYS)
    node.take()
    node.state.owner_gone(Owner(pid=ord("e"), start=1), 1)
    assert node.take().devices == [
        DeviceDelta(engine_id="e", added=b"", removed=b"".join(KEYS[:3]))
    ]
    assert node.counts == [0, 8]


def test_a_new_hello_starts_over(node: Node) -> None:
    node.tell("e", KEYS[:3])
    node.take()
    node.hello("e")
    node.tell("e", KEYS[2:4])
    (told,) = node.take().devices
    assert (told.added, told.removed) == (KEYS[2] + KEYS[3], KEYS[0] + KEYS[1])
    assert node.counts == [2, 0]


def test_a_clear_of_a_space_is_of_its_engines(node: Node) -> None:
    node.tell("e", KEYS)
    node.tell("f", KEYS)
    node.state.clear(ord("e"))
    assert node.counts == [0, 8]
    node.state.clear()
    assert node.counts == [0, 0]
    node.tell("e", KEYS[:1])  # used again after the clear, it is known again
    assert node.counts == [1, 0]


def test_devices_are_no_chunks_of_the_arena(node: Node) -> None:
    node.tell("e", KEYS)
    assert len(node.state.chunks) == 0
    assert node.take().added == b""


def test_an_engine_cannot_fill_the_shard(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "MAX_KEYS", 5)
    node.tell("e", [*KEYS, b"half a key"])
    node.tell("e", KEYS)
    assert node.counts == [5, 0]
    assert node.state.devices.content == {"e": dict.fromkeys(KEYS[:5])}
