"""What every ``TransferEngine`` promises: threads; and streams, with and without packing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.layout import ChunkLayout, Run
from lmkv_ray.transfer import DeviceEngine, Ended, HostEngine, Load, Save, TransferEngine
from lmkv_ray.transfer.device import DeviceError
from lmkv_ray.transfer.host_copier import HostCopier
from lmkv_ray.transfer.host_device import HostDevice
from lmkv_ray.transfer.host_engine import split
from tests.transfer.fake_arena import FakeArena

BLOCKS, PAGE, PER_CHUNK = 32, 64, 2
LAYOUT = ChunkLayout((Run(0, PAGE, PAGE), Run(BLOCKS * PAGE, PAGE, PAGE)), PER_CHUNK, BLOCKS)


@pytest.fixture
def cache() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, 2 * BLOCKS * PAGE, np.uint8)


@pytest.fixture
def arena() -> FakeArena:
    return FakeArena(8, 2 * LAYOUT.chunk_bytes)


@pytest.fixture(params=["threads", "streams", "streams, packed"])
def engine(
    request: pytest.FixtureRequest, cache: np.ndarray, arena: FakeArena
) -> Iterator[TransferEngine]:
    made: TransferEngine
    if request.param == "threads":
        made = HostEngine([LAYOUT, LAYOUT], cache, threads=2)
    else:
        made = DeviceEngine(
            [LAYOUT, LAYOUT],
            HostDevice(),
            cache=cache.ctypes.data,
            cache_bytes=len(cache),
            ring_bytes=1 << 20,
            direct_bytes=1 << 20 if "packed" in request.param else 0,
        )
    made.attach(arena, [0, LAYOUT.chunk_bytes])
    yield made
    made.close()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def save(*slots: int, deadline: float | None = None, arena_id: int = 1, group: int = 0) -> Save:
    blocks = np.arange(len(slots) * PER_CHUNK)
    deadline = time.monotonic() + 60 if deadline is None else deadline
    return Save(arena_id, ints(*slots), blocks, deadline, group)


def load(*slots: int, arena_id: int = 1, group: int = 0) -> Load:
    blocks = np.arange(len(slots) * PER_CHUNK) + 16
    return Load(arena_id, ints(*slots), np.zeros(len(slots), np.uint64), blocks, group=group)


def wait_ended(engine: TransferEngine) -> Ended:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for ended in engine.ended():
            return ended
        time.sleep(0.0005)
    raise TimeoutError


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize("group", [0, 1])
def test_what_was_saved_is_loaded(
    engine: TransferEngine, arena: FakeArena, cache: np.ndarray, group: int
) -> None:
    engine.begin_saves([save(3, 1, 4, group=group)])
    saved = wait_ended(engine)
    assert saved.ok
    assert saved.nbytes == 3 * LAYOUT.chunk_bytes
    mine = slice(group * LAYOUT.chunk_bytes, (group + 1) * LAYOUT.chunk_bytes)
    assert arena.slot(3)[mine].all()
    assert not np.delete(arena.slot(3), np.r_[mine]).any(), "another rank's part"
    before = cache.copy().reshape(2, BLOCKS, PAGE)
    engine.begin_loads([load(3, 1, 4, group=group)], idle=True)
    assert wait_ended(engine).good == 3
    assert (cache.reshape(2, BLOCKS, PAGE)[:, 16:22] == before[:, :6]).all()
    assert engine.ended() == [], "each once"


def test_a_load_is_good_as_far_as_its_generations(engine: TransferEngine, arena: FakeArena) -> None:
    arena.generations[5] += 1
    engine.begin_loads([load(1, 2, 3, 5, 7)], idle=True)
    assert wait_ended(engine).good == 3


def test_jobs_of_another_arena_are_not_carried_out(
    engine: TransferEngine, arena: FakeArena, cache: np.ndarray
) -> None:
    """A restarted shard may come with a new arena while orders for the old one are on their way."""
    before = cache.copy(), arena.data.copy()
    engine.begin_loads([load(1, arena_id=2)], idle=True)
    assert wait_ended(engine).good == 0
    engine.begin_saves([save(1, arena_id=2)])
    assert not wait_ended(engine).ok
    assert (cache == before[0]).all()
    assert (arena.data == before[1]).all()


def test_a_load_from_nowhere_fails(engine: TransferEngine) -> None:
    engine.begin_loads([load(arena_id=0)], idle=True)
    assert not wait_ended(engine).ok


def test_a_save_does_not_begin_after_its_deadline(engine: TransferEngine, arena: FakeArena) -> None:
    engine.begin_saves([save(1, deadline=time.monotonic() - 1)])
    assert not wait_ended(engine).ok
    assert not arena.data.any()


def test_a_block_out_of_range_is_a_copy_that_is_not_good(
    engine: TransferEngine, arena: FakeArena
) -> None:
    engine.begin_saves([Save(1, ints(1), ints(0, BLOCKS), time.monotonic() + 60)])
    assert not wait_ended(engine).ok
    assert not arena.data.any()


def test_an_error_is_a_copy_that_is_not_good(
    engine: TransferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(HostCopier, "load", broken)
        patch.setattr(HostDevice, "copy", broken)
        engine.begin_loads([load(1, 2)], idle=True)
        assert wait_ended(engine).good == 0
    engine.begin_loads([load(1, 2)], idle=True)
    # Threads go on; a device that failed once is not trusted again.
    assert wait_ended(engine).ok == isinstance(engine, HostEngine)


def test_an_error_of_the_models_stream_fails_the_copy(
    engine: TransferEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise DeviceError("injected")

    monkeypatch.setattr(HostDevice, "mark", broken)
    engine.begin_saves([save(1)])
    assert wait_ended(engine).ok == isinstance(engine, HostEngine)


def refuse(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_threads_copies_are_not_good_and_never_made_later(
    cache: np.ndarray,
    arena: FakeArena,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = HostEngine([LAYOUT, LAYOUT], cache, threads=2)
    arena.grown = True
    engine.attach(arena, [0, LAYOUT.chunk_bytes])
    before = cache.copy()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        engine.prepare(arena, 1.0)
        for _ in range(20):
            engine.begin_loads([load(1, 2)], idle=True)
            engine.begin_saves([save(3), save(4)])
            ended = engine.ended()
            assert [(copy.ok, copy.good) for copy in ended] == [(False, 0)] * 3
    assert len([r for r in caplog.records if "threads can be started" in r.message]) == 2
    assert "Next step" in caplog.text
    monkeypatch.setattr("lmkv_ray.transfer.crew.RETRY_SECONDS", 0.0)
    wait_until(lambda: saved(engine, save(5)))
    engine.begin_loads([load(6, 7)], idle=True)
    assert wait_ended(engine).ok
    assert arena.slot(5)[: LAYOUT.chunk_bytes].all()
    assert not arena.slot(3).any(), "a save that was given up was made"
    assert not arena.slot(4).any()
    kept = np.r_[0:16, 20:BLOCKS]  # blocks that no good load was for
    assert (
        cache.reshape(2, BLOCKS, PAGE)[:, kept] == before.reshape(2, BLOCKS, PAGE)[:, kept]
    ).all()
    engine.close()


def saved(engine: TransferEngine, job: Save) -> bool:
    engine.begin_saves([job])
    return wait_ended(engine).ok


def test_one_thread_is_enough_to_go_on(
    cache: np.ndarray, arena: FakeArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HostEngine([LAYOUT, LAYOUT], cache, threads=4)
    engine.attach(arena, [0, LAYOUT.chunk_bytes])
    start = threading.Thread.start

    def first(thread: threading.Thread) -> None:
        if thread.name.endswith("-0"):
            start(thread)
        else:
            refuse()

    monkeypatch.setattr(threading.Thread, "start", first)
    engine.begin_saves([save(1, 2)])
    assert wait_ended(engine).ok
    engine.begin_loads([load(1, 2, 3, 4)], idle=True)
    assert wait_ended(engine).good == 4
    engine.close()


def test_a_closed_engine_has_let_go_of_everything(engine: TransferEngine, arena: FakeArena) -> None:
    engine.begin_loads([load(*range(8))] * 3, idle=False)
    engine.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("lmkv-")]


def test_new_memory_is_faulted_in(engine: TransferEngine, arena: FakeArena) -> None:
    before = arena.populated  # a device registers what there is, at once
    arena.grown = True
    engine.begin_loads([], idle=False)
    wait_until(lambda: arena.populated > before)


def test_an_arena_that_was_prepared_is_used_when_it_is_attached(
    engine: TransferEngine, arena: FakeArena
) -> None:
    following = FakeArena(8, 2 * LAYOUT.chunk_bytes, arena_id=2)
    engine.prepare(following, 60)
    engine.begin_saves([save(1, arena_id=2)])
    assert not wait_ended(engine).ok, "a guess is not used"
    engine.begin_saves([save(1)])
    assert wait_ended(engine).ok
    engine.attach(following, [0, LAYOUT.chunk_bytes])
    engine.begin_saves([save(1, arena_id=2)])
    assert wait_ended(engine).ok


def test_the_next_arena_takes_over(engine: TransferEngine, arena: FakeArena) -> None:
    following = FakeArena(8, 2 * LAYOUT.chunk_bytes, arena_id=2)
    engine.attach(following, [0, LAYOUT.chunk_bytes])
    engine.begin_saves([save(1)])
    assert not wait_ended(engine).ok
    engine.begin_saves([save(1, arena_id=2)])
    assert wait_ended(engine).ok
    assert following.data.any()
    assert not arena.data.any()


def test_an_engine_says_what_it_takes_and_what_it_pinned(
    cache: np.ndarray, arena: FakeArena, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = DeviceEngine(
        [LAYOUT],
        HostDevice(),
        cache=cache.ctypes.data,
        cache_bytes=len(cache),
        ring_bytes=3 << 20,
        direct_bytes=128 << 10,
    )
    made.prepare(arena, 60)
    made.close()
    assert (
        "host: a ring of 3 MiB of its memory (2 x 4 slots of 0.4 MiB); runs of 128 KiB"
        in caplog.text
    )
    assert "host registered 0.0 of 0.0 GiB of the node's arena" in caplog.text


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_pieces_of_a_load_are_the_load(
    chunks: int, per_chunk: int, pieces: int, data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, per_chunk - 1))
    count = data.draw(st.integers(1, max(1, chunks * per_chunk - skip)))
    slots, blocks = np.arange(chunks), np.arange(100, 100 + count)
    whole = Load(1, slots, np.full(chunks, 2, np.uint64), blocks, skip, 3)
    parts = split(whole, pieces, per_chunk)
    assert len(parts) <= pieces
    assert [s for part in parts for s in part.slots] == slots.tolist()
    assert [b for part in parts for b in part.blocks] == blocks.tolist()
    for part in parts:
        assert part.group == 3
        first = max(0, int(part.slots[0]) * per_chunk - skip)
        assert part.skip == (skip if part is parts[0] else 0)
        assert part.blocks.tolist() == blocks[first : first + len(part.blocks)].tolist()
