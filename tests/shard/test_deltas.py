from lmkv_ray.keys import key_array, key_list
from lmkv_ray.messages import DeviceDelta
from lmkv_ray.shard import DeltaLog

A, B = b"a" * 16, b"b" * 16


def test_a_new_life_starts_with_everything() -> None:
    log = DeltaLog("n", epoch=7)
    log.added([A])
    first = log.take([A, B])
    assert (first.epoch, first.seq, first.added) == (7, 1, A + B)
    assert first.begin
    assert first.end
    assert not log.pending(0)


def test_changes_are_batched_and_the_last_one_counts() -> None:
    log = DeltaLog("n", epoch=1)
    log.take([])
    log.added([A, B])
    log.removed([A])
    delta = log.take([B])
    assert (delta.seq, delta.begin, delta.added, delta.removed) == (2, False, B, A)


def test_heartbeats_are_numbered_too() -> None:
    log = DeltaLog("n", epoch=1)
    assert [log.take([]).seq for _ in range(3)] == [1, 2, 3]


def test_too_many_changes_become_a_snapshot() -> None:
    log = DeltaLog("n", epoch=1, limit=4)
    log.take([])
    keys = [bytes([i]) * 16 for i in range(5)]
    log.added(keys)
    delta = log.take(keys)
    assert delta.begin
    assert delta.added == b"".join(keys)


def test_a_snapshot_comes_in_pieces_that_know_what_changed_meanwhile() -> None:
    keys = [bytes([i]) * 16 for i in range(5)]
    content = dict.fromkeys(keys)
    log = DeltaLog("n", epoch=1, piece=2)
    first = log.take(content)
    assert (first.begin, first.end, first.added) == (True, False, keys[0] + keys[1])
    del content[keys[0]], content[keys[3]]
    content[A] = None
    log.removed([keys[0], keys[3]])
    log.added([A])
    second = log.take(content)
    assert (second.begin, second.end, second.added) == (False, False, A + keys[2])
    assert second.removed == keys[0] + keys[3]
    last = log.take(content)
    assert (last.begin, last.end, last.added) == (False, True, keys[4])


def test_each_part_of_the_directory_is_told_its_keys() -> None:
    keys = [bytes([i]) * 16 for i in range(40)]
    log = DeltaLog("n", epoch=1, parts=3)
    told = [log.take(keys, part).added for part in range(3)]
    assert sorted(key for joined in told for key in key_list(key_array(joined))) == keys
    log.added([A])
    assert sum(log.pending(part) for part in range(3)) == 1


def test_devices_are_told_apart_from_the_arena() -> None:
    log = DeltaLog("n", epoch=1)
    assert log.take([], devices={"e": [A]}).devices == []  # the arena's piece, an empty one
    last = log.take([], devices={"e": [A]})
    assert last.end
    assert last.devices == [DeviceDelta(engine_id="e", added=A, removed=b"")]
    log.added([A])
    log.removed([A], "e")
    log.added([B], "f")
    delta = log.take([A], devices={"f": [B]})
    assert (delta.added, delta.removed) == (A, b"")
    assert {d.engine_id: (d.added, d.removed) for d in delta.devices} == {
        "e": (b"", A),
        "f": (B, b""),
    }


def test_a_snapshot_does_not_name_what_a_device_lost_meanwhile() -> None:
    log = DeltaLog("n", epoch=1, piece=1)
    devices = {"e": [A, B]}
    log.take([], devices=devices)
    devices["e"] = [B]
    log.removed([A], "e")
    second, third = log.take([], devices=devices), log.take([], devices=devices)
    assert second.devices == [DeviceDelta(engine_id="e", added=b"", removed=A)]
    assert third.devices == [DeviceDelta(engine_id="e", added=B, removed=b"")]
    assert third.end
