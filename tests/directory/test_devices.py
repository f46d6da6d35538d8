"""What engines hold on their devices: found by those who send requests, by nobody who fetches."""

import msgspec
import numpy as np

from lmkv_ray.directory import GPU, DirectoryState, Location
from lmkv_ray.directory.state import DEVICES_SHARE, SILENT_SECONDS
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Delta, DeviceDelta

KEYS = [bytes([i]) * 16 for i in range(1, 25)]
ALL = key_array(KEYS)


def delta(
    seq: int, engine: str, added: bytes = b"", removed: bytes = b"", node: str = "a"
) -> Delta:
    devices = [DeviceDelta(engine_id=engine, added=added, removed=removed)]
    first = seq == 1
    return Delta(
        node_id=node,
        epoch=1,
        seq=seq,
        added=b"",
        removed=b"",
        begin=first,
        end=first,
        devices=devices,
    )


def test_a_chunk_on_a_device_is_no_place_to_fetch_from() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, "e", KEYS[0] + KEYS[2]), 0)
    assert directory.lookup(ALL, "b", 0, 0) == []
    assert directory.peers("b") == 0
    assert len(directory.table) == 0
    (holding,) = directory.where(ALL, 0)
    assert holding.location == Location("a", GPU, "e")
    assert (holding.run, holding.positions) == (1, [0, 2])


def test_a_resync_brings_back_what_is_still_held() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, "e", KEYS[0] + KEYS[1]), 0)
    assert directory.delta(delta(3, "e", KEYS[2]), 0).resync  # one was lost
    again = msgspec.structs.replace(delta(1, "f", KEYS[1]), seq=4)
    assert not directory.delta(again, 0).resync
    (holding,) = directory.where(ALL, 0)
    assert (holding.engine_id, holding.positions) == ("f", [1])


def test_a_silent_node_has_no_devices() -> None:
    directory = DirectoryState(64)
    directory.delta(delta(1, "e", KEYS[0]), 0)
    assert directory.where(ALL, SILENT_SECONDS)
    assert not directory.where(ALL, SILENT_SECONDS + 1)
    directory.node_lost("a")
    assert not directory.where(ALL, 0)
    assert len(directory.devices) == 0


def test_an_engine_is_known_as_long_as_it_holds_anything() -> None:
    directory = DirectoryState(64)
    for life in range(9):
        directory.delta(delta(2 * life + 1, f"e{life}", KEYS[0]), 0)
        assert [h.engine_id for h in directory.where(ALL, 0)] == [f"e{life}"]
        directory.delta(delta(2 * life + 2, f"e{life}", removed=KEYS[0]), 0)
        assert not directory.where(ALL, 0)
        assert len(directory.devices) == 1  # until another comes


def test_more_than_fits_is_forgotten_and_never_the_arena() -> None:
    capacity = 1 << 12
    directory = DirectoryState(capacity)
    rng = np.random.default_rng(0)
    here, there = rng.integers(0, 1 << 62, (2, capacity, 2), dtype=np.uint64)
    first = Delta(
        node_id="a", epoch=1, seq=1, added=here.tobytes(), removed=b"", begin=True, end=True
    )
    directory.delta(first, 0)
    for seq, part in enumerate(np.array_split(there, 8), 2):
        directory.delta(delta(seq, f"e{seq}", part.tobytes()), 0)
    (arena,) = directory.lookup(here, "b", 0, 0)
    assert arena.run == capacity
    on_devices = directory.where(there, 0)
    assert sum(len(h.positions) for h in on_devices) == capacity // DEVICES_SHARE
    assert {h.engine_id for h in on_devices} == {"e8", "e9"}
