"""The line to the shard: nothing on the engine's side waits, nothing of a dead shard survives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import pairwise

import numpy as np
import pytest

from lmkv_ray.arena import this_process
from lmkv_ray.errors import ArenaError, ChunkSizeError
from lmkv_ray.keys import chunk_key, key_array
from lmkv_ray.messages import Hello
from lmkv_ray.vllm.link.device_watch import DeviceWatch
from lmkv_ray.vllm.link.shard_link import MAX_STAGES, RETRY_SECONDS, ShardLink
from tests.vllm.conftest import wait_for
from tests.vllm.local_shard import LocalShard
from tests.vllm.test_device import Pool, track

SLOT_BYTES = 64 << 10


def hello(engine: str = "e") -> Hello:
    return Hello(
        engine_id=engine,
        owner=this_process(),
        space=1,
        model="m",
        slot_bytes=SLOT_BYTES,
        held=[],
    )


@pytest.fixture
def make_link() -> Iterator[Callable[..., ShardLink]]:
    links: list[ShardLink] = []
    shards: list[LocalShard] = []

    def make(
        shard: LocalShard, want: int = 8, device: DeviceWatch | None = None, engine: str = "e"
    ) -> ShardLink:
        shards.append(shard)
        link = ShardLink(lambda: shard, hello(engine), want_slots=want, period=0.01, device=device)
        links.append(link)
        wait_for(lambda: len(link.slots) > 0)
        return link

    yield make
    for link in links:
        link.stop()
    for shard in dict.fromkeys(shards):
        shard.close()


def key(i: int) -> bytes:
    return chunk_key(b"n" * 16, bytes([i]))


def commit(link: ShardLink, i: int) -> None:
    taken = link.slots.take()
    assert taken is not None
    link.slots.commit(taken, key(i), SLOT_BYTES)
    wait_for(lambda: not link.slots.committing(key(i)))


def visible(link: ShardLink, i: int) -> bool:
    assert link.readable is not None
    return bool(link.readable.lookup(key_array(key(i))).found[0])


def test_a_commit_becomes_visible_and_slots_are_replenished(
    make_link: Callable[..., ShardLink],
) -> None:
    link = make_link(LocalShard(16 << 20))
    for i in range(30):
        wait_for(lambda: len(link.slots) > 0)
        commit(link, i)
    assert all(visible(link, i) for i in range(30))


def test_a_frozen_shard_never_blocks_the_engine(make_link: Callable[..., ShardLink]) -> None:
    shard = LocalShard(16 << 20)
    link = make_link(shard)
    commit(link, 1)
    shard.frozen.set()
    began = time.monotonic()
    for i in range(1000):
        if taken := link.slots.take():
            link.slots.commit(taken, key(i % 250), SLOT_BYTES)
        link.slots.touch([key(1)])
    tickets = [link.stage(key(1), 5.0) for _ in range(2 * MAX_STAGES)]
    assert time.monotonic() - began < 1
    assert sum(t is not None for t in tickets) <= MAX_STAGES
    assert visible(link, 1)
    shard.frozen.clear()


def test_slots_past_their_deadline_are_never_handed_out(
    make_link: Callable[..., ShardLink],
) -> None:
    shard = LocalShard(16 << 20, grant_seconds=0.3)
    link = make_link(shard)
    shard.frozen.set()
    wait_for(lambda: all(deadline < time.monotonic() for deadline in link.slots._free.values()))
    assert link.slots.take() is None
    shard.frozen.clear()


def test_an_engine_that_was_idle_has_slots_that_it_may_fill(
    make_link: Callable[..., ShardLink],
) -> None:
    link = make_link(LocalShard(16 << 20, grant_seconds=0.3))
    first = set(link.slots._free)
    assert first
    wait_for(lambda: first.isdisjoint(link.slots._free) and len(link.slots) > 0)


def test_a_link_that_sleeps_wakes_when_its_slots_expire() -> None:
    """Else the first chunks of the next prompt would find no slot that may be filled."""
    shard = LocalShard(16 << 20, grant_seconds=0.2)
    link = ShardLink(lambda: shard, hello(), want_slots=8, period=60.0)
    try:
        wait_for(lambda: len(link.slots) == 8)
        first = shard.shard.state.counters.granted
        wait_for(lambda: shard.shard.state.counters.granted > first + 8)
    finally:
        link.stop()
        shard.close()


def test_a_commit_after_the_deadline_changes_nothing(make_link: Callable[..., ShardLink]) -> None:
    shard = LocalShard(16 << 20, grant_seconds=0.3)
    link = make_link(shard)
    tries = []

    def take() -> bool:
        """On a busy machine a grant may be over before anything is taken: then comes another."""
        tries.append(link.slots.take())
        return tries[-1] is not None

    wait_for(take)
    taken = tries[-1]
    assert taken is not None
    wait_for(lambda: time.monotonic() > taken.deadline + 0.01)
    link.slots.commit(taken, key(7), SLOT_BYTES)
    wait_for(lambda: not link.slots.committing(key(7)))
    assert not visible(link, 7)
    assert shard.state.counters.refused == 1


def test_after_a_restart_with_the_same_arena_chunks_and_slots_are_kept(
    make_link: Callable[..., ShardLink],
) -> None:
    shard = LocalShard(16 << 20)
    link = make_link(shard)
    commit(link, 1)
    held = link.slots.take()
    assert held is not None
    shard.restart()
    wait_for(lambda: "e" in shard.state.engines())
    assert visible(link, 1)
    link.slots.commit(held, key(2), SLOT_BYTES)
    wait_for(lambda: visible(link, 2))


def test_after_a_restart_with_another_arena_nothing_old_is_used(
    make_link: Callable[..., ShardLink],
) -> None:
    old, new = LocalShard(16 << 20), LocalShard(16 << 20)
    current = [old]
    link = ShardLink(lambda: current[0], hello(), want_slots=8, period=0.01)
    wait_for(lambda: len(link.slots) > 0)
    commit(link, 1)
    held = link.slots.take()
    assert held is not None
    current[0] = new
    old.restart()
    wait_for(
        lambda: link.attachment is not None and link.attachment.arena_id == new.writer.arena_id
    )
    link.slots.commit(held, key(2), SLOT_BYTES)
    wait_for(lambda: len(link.slots) > 0)
    commit(link, 3)
    assert [visible(link, i) for i in (1, 2, 3)] == [False, False, True]
    link.stop()
    for shard in (old, new):
        shard.close()


def test_a_clear_forgets_and_refuses_what_was_being_filled(
    make_link: Callable[..., ShardLink],
) -> None:
    shard = LocalShard(16 << 20)
    link = make_link(shard)
    commit(link, 1)
    filling = link.slots.take()
    assert filling is not None
    shard.call("clear", (1).to_bytes(8, "little")).result()
    link.slots.commit(filling, key(2), SLOT_BYTES)
    wait_for(lambda: not link.slots.committing(key(2)))
    assert not visible(link, 1)
    assert not visible(link, 2)
    wait_for(lambda: len(link.slots) > 0)
    commit(link, 3)
    assert visible(link, 3)


def test_after_a_rename_nothing_is_committed_in_the_old_space_and_no_slot_is_given_away(
    make_link: Callable[..., ShardLink],
) -> None:
    shard = LocalShard(16 << 20)
    link = make_link(shard)
    commit(link, 1)
    filling = link.slots.take()
    assert filling is not None
    link.rename(2, {"weights": "b"})
    wait_for(lambda: {engine.space for engine in shard.state._leases.engines().values()} == {2})
    [holder] = shard.state._leases.engines().values()
    assert filling.slot in holder.leases, "a worker may be writing into it"
    link.slots.commit(filling, key(2), SLOT_BYTES)
    wait_for(lambda: not link.slots.committing(key(2)))
    assert not visible(link, 2)
    assert visible(link, 1)
    wait_for(lambda: len(link.slots) > 0)
    commit(link, 3)
    assert visible(link, 3)
    assert shard.state.chunks.space(key(3)) == 2


def test_engines_of_one_model_that_share_nothing_are_told_why(
    make_link: Callable[..., ShardLink], caplog: pytest.LogCaptureFixture
) -> None:
    shard = LocalShard(16 << 20)
    link, other = make_link(shard, engine="e"), make_link(shard, engine="f")
    assert link.differs == []
    other.rename(2, {"weights": "b"})
    link.rename(3, {"weights": "a"})
    wait_for(lambda: link.differs == other.differs == ["weights"])
    assert "differ in weights" in caplog.text
    other.rename(3, {"weights": "a"})
    wait_for(lambda: link.differs == other.differs == [])


def test_payload_written_through_one_mapping_is_read_through_another(
    make_link: Callable[..., ShardLink],
) -> None:
    shard = LocalShard(16 << 20)
    writer, reader = make_link(shard), None
    taken = writer.slots.take()
    assert taken is not None
    assert writer.attachment is not None
    assert writer.readable is not None
    data = np.random.default_rng(0).integers(0, 256, SLOT_BYTES, np.uint8)
    writer.readable.payload(taken.slot, SLOT_BYTES)[:] = data
    writer.slots.commit(taken, key(1), SLOT_BYTES)
    wait_for(lambda: visible(writer, 1))
    reader = type(writer.readable).attach(writer.attachment.path)
    hits = reader.lookup(key_array(key(1)))
    assert (reader.data[hits.offsets[0] : hits.offsets[0] + SLOT_BYTES] == data).all()
    reader.close()


def test_a_reason_for_having_no_shard_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    def connect() -> LocalShard:
        attempts.append(1)
        raise ArenaError("/dev/shm is too small.", next_step="Make it larger.")

    with caplog.at_level(logging.WARNING):
        link = ShardLink(connect, hello(), want_slots=8, period=0.01)
        wait_for(lambda: len(attempts) >= 3)
        link.stop()
    assert link.slots.take() is None
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "Make it larger." in caplog.text


class WrappedError(ChunkSizeError):
    """As Ray hands over what an actor raised: of its type, with a traceback as its text."""

    def __init__(self, cause: ChunkSizeError) -> None:
        super().__init__(cause.what, next_step=cause.next_step)
        self.cause = cause

    def __str__(self) -> str:
        return f"ray::hello() (pid={time.monotonic_ns()}) Traceback (most recent call last): ..."


def test_chunks_that_do_not_fit_are_said_once_and_tried_seldom(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv_ray.vllm.link.shard_link.MISFIT_SECONDS", 0.02, raising=False)
    attempts = []

    def connect() -> LocalShard:
        attempts.append(time.monotonic())
        raise WrappedError(ChunkSizeError("A chunk does not fit.", next_step="Take 80MiB."))

    with caplog.at_level(logging.WARNING):
        link = ShardLink(connect, hello(), want_slots=8, period=0.01)
        wait_for(lambda: len(attempts) >= 3)
        monkeypatch.setattr("lmkv_ray.vllm.link.shard_link.MISFIT_SECONDS", 60.0, raising=False)
        before = time.monotonic()
        link.stop()
    assert time.monotonic() - before < 5, "a long pause does not keep an engine from ending"
    (record,) = caplog.records
    assert "Take 80MiB." in record.getMessage()
    assert "Traceback" not in record.getMessage()


def test_a_shard_is_told_of_the_device_and_told_again_after_its_restart(
    make_link: Callable[..., ShardLink],
) -> None:
    shard, watch, pool, tracked = LocalShard(16 << 20), DeviceWatch(), Pool(), track(1, 16)
    watch.pool = pool
    pool.cached = {(block, 0) for block in tracked.request.block_hashes}
    make_link(shard, device=watch)
    watch.note(tracked.runs_to_note(256))
    wait_for(lambda: shard.state.devices.count("e") == 4)
    shard.restart()
    assert shard.state.devices.count("e") == 0
    wait_for(lambda: shard.state.devices.count("e") == 4)
    pool.cached.clear()
    wait_for(lambda: shard.state.devices.count("e") == 0)


def test_a_thread_that_cannot_be_started_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    shard = LocalShard(8 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        link = ShardLink(lambda: shard, hello(), want_slots=8, period=0.01)
        assert link.readable is None
        assert link.stage(bytes(16), 1.0) is None
        assert link.slots.take() is None
        link.stop()
    link = ShardLink(lambda: shard, hello(), want_slots=8, period=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        patch.setattr("lmkv_ray.vllm.link.shard_link.RETRY_SECONDS", (0.01, 0.01))
        late = ShardLink(lambda: shard, hello(), want_slots=8, period=0.01)
    wait_for(lambda: late.readable is not None)
    for each in (link, late):
        each.stop()
    shard.close()


def test_an_engine_with_much_to_tell_does_not_hurry_a_shard_that_is_away() -> None:
    looked: list[float] = []

    def nowhere() -> LocalShard:
        looked.append(time.monotonic())
        link.slots.take()  # as an engine does that wants to save
        raise ConnectionError("no shard")

    link = ShardLink(nowhere, hello(), want_slots=8, period=0.01)
    wait_for(lambda: len(looked) >= 3)
    link.stop()
    pauses = [later - earlier for earlier, later in pairwise(looked)]
    assert pauses[0] >= RETRY_SECONDS[0]
    assert pauses[1] >= 2 * RETRY_SECONDS[0]


def test_what_could_not_be_asked_is_not_under_way_for_ever(
    make_link: Callable[..., ShardLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = LocalShard(16 << 20)
    link = make_link(shard)
    call, broken = shard.call, threading.Event()
    broken.set()

    def refuse(method: str, payload: bytes) -> Future[bytes]:
        if broken.is_set() and method != "exchange":
            raise MemoryError
        return call(method, payload)

    monkeypatch.setattr(shard, "call", refuse)
    asked = 0
    while asked < MAX_STAGES:
        asked += link.stage(key(1), 0.0) is not None
    broken.clear()
    wait_for(lambda: link.stage(key(1), 0.0) is not None)
    assert shard.stages <= 1, "the shard was asked for what no request waits for any more"
