"""A shard on a real arena, without Ray."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmkv_ray.arena import ArenaWriter, process
from lmkv_ray.arena.crews import ROWS
from lmkv_ray.arena.owners import is_alive
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import ArenaError, ChunkSizeError
from lmkv_ray.hints import Hints
from lmkv_ray.messages import Commit, Owner
from tests.node.fakes import CHUNK_BYTES, FakeEngine, LocalShard, make_keys, new_arena

CAPACITY = 4 << 20


def adopt(name: str) -> ArenaWriter:
    writer = ArenaWriter.find_and_adopt(name)
    assert writer is not None
    return writer


@pytest.fixture
def settings() -> Settings:
    return load_settings({"capacity": CAPACITY})


@pytest.fixture
def shard(settings: Settings) -> Iterator[LocalShard]:
    shard = LocalShard(new_arena(settings), settings)
    yield shard
    shard.close()


@pytest.fixture
def engine(shard: LocalShard) -> Iterator[FakeEngine]:
    engine = FakeEngine(shard.call)
    yield engine
    engine.close()


def test_what_an_engine_commits_every_process_can_read(engine: FakeEngine) -> None:
    keys = make_keys(10)
    assert engine.save(keys).refused == []
    assert engine.intact(keys) == 10


def test_a_full_arena_keeps_evicting(shard: LocalShard, engine: FakeEngine) -> None:
    for seed in range(20):
        keys = make_keys(12, seed)
        engine.save(keys)
        assert engine.intact(keys) == 12
    assert shard.counters()["evicted"] > 100
    assert shard.state.chunks.nbytes <= CAPACITY


def test_a_successor_finds_the_chunks(
    shard: LocalShard, engine: FakeEngine, settings: Settings
) -> None:
    keys = make_keys(10)
    engine.save(keys)
    engine.exchange(want=5)
    name = Path(shard.writer._segment.path).readlink().name.split("-")[1]
    shard.reader.close()
    shard.writer.close()
    heir = LocalShard(adopt(name), settings)
    assert len(heir.state.chunks) == 10
    assert [len(slots) for slots in heir.state._leases.orphans.values()] == [5]
    engine.call = heir.call
    held = list(engine.slots)
    welcome = engine.hello()
    assert welcome.grant.slots == held
    more = make_keys(5, 1)
    assert engine.save(more).refused == []
    assert engine.intact([*keys, *more]) == 15
    heir.close()


def test_what_is_pinned_stays_so_when_the_shard_is_restarted(
    shard: LocalShard, engine: FakeEngine, settings: Settings
) -> None:
    keys = make_keys(6)
    engine.save(keys)
    engine.exchange(want=1)
    slot, wish = engine.slots.pop(), make_keys(1, 7)[0]
    assert engine.reader is not None
    engine.reader.payload(slot, CHUNK_BYTES)[:] = 1
    hints = Hints(pinned=True)
    engine.exchange(commits=[Commit(slot=slot, key=wish, nbytes=CHUNK_BYTES, hints=hints)])
    assert shard.pin(keys[:4], True) == keys[:4]
    shard.pin(keys[:1], False)
    shard.evict(keys[1:2])
    shard.tick()
    name = Path(shard.writer._segment.path).readlink().name.split("-")[1]
    shard.reader.close()
    shard.writer.close()
    heir = LocalShard(adopt(name), settings)
    kept = {*keys[2:4], wish}
    assert set(heir.state.chunks.pinned()) == kept
    engine.call = heir.call
    engine.hello()
    for seed in range(20, 40):
        engine.save(make_keys(15, seed))
    assert {key for key in [*keys, wish] if key in heir.state.chunks} == kept
    heir.close()


def test_slots_of_a_dead_engine_come_back(shard: LocalShard) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        owner = Owner(pid=process.pid, start=int(stat[19]))
        assert is_alive(owner)
        engine = FakeEngine(shard.call, "mortal", owner)
        engine.exchange(want=5)
        assert {(process.pid, process.start) for process in shard.state.owners()} == {
            (owner.pid, owner.start)
        }
        process.kill()
    shard.tick()
    engine.close()
    assert shard.state.owners() == set()
    assert engine.exchange(want=1).known is False


@contextmanager
def a_process() -> Iterator[tuple[subprocess.Popen[bytes], Owner]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
        yield popen, process(popen.pid)
        popen.kill()


@pytest.mark.parametrize("restarted", [False, True])
def test_slots_are_their_workers_too(
    shard: LocalShard, settings: Settings, restarted: bool
) -> None:
    """A worker that was stopped in the middle of a save goes on after its engine has died."""
    name = Path(shard.writer._segment.path).readlink().name.split("-")[1]
    with a_process() as (scheduler, owner), a_process() as (worker, writer):
        engine = FakeEngine(shard.call, "parallel", owner, writers=[writer])
        engine.exchange(want=5)
        slots = set(engine.slots)
        scheduler.kill()
        scheduler.wait()
        if restarted:
            shard.reader.close()
            shard.writer.close()
            shard = LocalShard(adopt(name), settings)
        shard.tick()
        assert not shard.state._leases.resting, "the worker may still write"
        assert slots <= shard.writer.scan().reserved.keys()
        worker.kill()
        worker.wait()
        shard.tick()
        [(_, resting)] = shard.state._leases.resting
        assert set(resting) == slots
        assert shard.writer.crews.owners() == set()
    engine.close()
    if restarted:
        shard.close()


def test_the_processes_of_an_arena_are_bounded(shard: LocalShard) -> None:
    members = [Owner(pid=2**22 + i, start=1) for i in range(1, ROWS + 1)]
    shard.writer.crews.join(Owner(pid=1, start=1), members[:-1])
    with pytest.raises(ArenaError, match="fewer engines"):
        shard.writer.crews.join(Owner(pid=2, start=1), members[:2])
    shard.tick()
    assert shard.writer.crews.owners() == set()
    shard.writer.crews.join(Owner(pid=2, start=1), members)


def test_an_engine_that_cannot_be_seen_is_refused(shard: LocalShard) -> None:
    with pytest.raises(ArenaError, match="pid namespace"):
        FakeEngine(shard.call, owner=Owner(pid=1, start=12345))


def test_a_chunk_that_does_not_fit_is_refused_and_the_status_says_so(
    shard: LocalShard, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):  # it asks again and again
        with pytest.raises(ChunkSizeError, match=r"LMKV_CAPACITY to at least 48MiB"):
            FakeEngine(shard.call, nbytes=3 << 20)
    assert len(caplog.records) == 1, "said once"
    (reason,) = shard.refusals.reasons(time.monotonic())
    assert "served without cache" in reason
    assert "48MiB" in reason
    FakeEngine(shard.call, nbytes=CHUNK_BYTES).close()
    assert not shard.refusals.reasons(time.monotonic()), "the same engine, with smaller chunks"


def test_chunks_that_no_default_extent_holds_must_be_smaller(shard: LocalShard) -> None:
    with pytest.raises(ChunkSizeError, match="make chunks smaller") as refused:
        FakeEngine(shard.call, nbytes=257 << 20)
    assert "LMKV_CAPACITY" not in str(refused.value)


def test_a_full_dev_shm_makes_a_smaller_arena(
    shard: LocalShard, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign = shard.writer.assign_extent

    def only_one(extent: int, slot_bytes: int) -> object:
        if extent > 0:
            raise ArenaError("/dev/shm is full.", next_step="make room.")
        return assign(extent, slot_bytes)

    monkeypatch.setattr(shard.writer, "assign_extent", only_one)
    for seed in range(10):
        for _ in range(4):  # at most one extent is lost an exchange
            engine.exchange(want=3 - len(engine.slots))
        keys = make_keys(3, seed)
        engine.save(keys)
        assert engine.intact(keys) == 3
    assert shard.state.chunks.nbytes <= 1 << 20


def test_clear_removes_what_is_there_and_what_is_coming(
    shard: LocalShard, engine: FakeEngine
) -> None:
    keys = make_keys(4)
    engine.save(keys[:2])
    engine.exchange(want=2)
    slots = list(engine.slots)
    shard.clear(None)
    reply = engine.save(keys[2:])
    assert sorted(reply.refused) == sorted(slots)[:2]
    assert engine.intact(keys) == 0


def test_what_was_being_filled_during_a_clear_is_refused_by_a_successor_too(
    shard: LocalShard, engine: FakeEngine, settings: Settings
) -> None:
    """Found by the simulation: the clear was answered, and the chunk came back after a restart."""
    engine.exchange(want=2)
    slots = list(engine.slots)
    shard.clear(None)
    name = Path(shard.writer._segment.path).readlink().name.split("-")[1]
    shard.reader.close()
    shard.writer.close()
    heir = LocalShard(adopt(name), settings)
    engine.call = heir.call
    engine.hello()
    keys = make_keys(2)
    assert sorted(engine.save(keys).refused) == sorted(slots)
    assert engine.intact(keys) == 0
    assert engine.save(keys).refused == [], "slots that were granted since are good"
    heir.close()
