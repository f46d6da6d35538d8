"""The choice of a transport, and the peer's side of the object store."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.arena import checksum
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.errors import TransportError
from lmkv_ray.fetch import groups
from lmkv_ray.host import host_id
from lmkv_ray.messages import MissReason
from lmkv_ray.orders import Offer
from lmkv_ray.transports import (
    ChunkReader,
    Helper,
    PeerInfo,
    Transport,
    Transports,
    all_transports,
    select,
)
from lmkv_ray.transports.chunk_reader import MISSING
from lmkv_ray.waits import all_ended, to_the_end
from tests.transports.harness import CHUNK, COUNT, LocalPeer, content_of, some_keys


@pytest.fixture
async def known(peer: LocalPeer) -> AsyncIterator[list[Transport]]:
    helper = Helper(peer.store.writer, SYSTEM_CLOCK)
    yield all_transports(peer.store.writer, helper, SYSTEM_CLOCK)
    await helper.close()


@pytest.fixture
async def peer() -> AsyncIterator[LocalPeer]:
    peer = LocalPeer()
    yield peer
    await peer.close()


def refused(info: PeerInfo, transport: str, obstacle: str) -> PeerInfo:
    """The same peer, which cannot be read from by one of the transports."""
    return replace(info, offers={**info.offers, transport: Offer(obstacle=obstacle)})


async def test_what_a_peer_does_not_offer_is_not_chosen(
    peer: LocalPeer, known: list[Transport]
) -> None:
    info = peer.info()
    of_old = replace(info, offers={"object_store": info.offers["object_store"]})
    assert Transports(known, "auto", SYSTEM_CLOCK).choose(of_old).name == "object_store"
    strangers = replace(info, offers={})
    with pytest.raises(TransportError, match="does not offer it"):
        Transports(known, "auto", SYSTEM_CLOCK).choose(strangers)


async def test_a_question_for_a_transport_that_is_not_here_is_a_typed_error(
    peer: LocalPeer,
) -> None:
    with pytest.raises(TransportError, match="no transport 'pigeon'"):
        await peer.store.servers.answer("pigeon", b"")


async def test_the_choice_is_logged_once_with_its_reason(
    peer: LocalPeer, known: list[Transport], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    transports = Transports(known, "auto", SYSTEM_CLOCK)
    assert transports.choose(peer.info()).name == "shared_memory"
    assert transports.choose(peer.info()).name == "shared_memory"
    assert [r.getMessage() for r in caplog.records] == [
        "Fetching from node peer by shared_memory: it is the best there is"
    ]
    caplog.clear()
    elsewhere = replace(refused(peer.info(), "nixl", "it has none"), host="another", arena_id=1)
    assert transports.choose(elsewhere).name == "object_store"
    assert "not shared_memory, as the peer is on another host" in caplog.text
    assert "not nixl, as the peer says: it has none" in caplog.text


async def test_memory_that_cannot_be_opened_is_an_obstacle(
    peer: LocalPeer, known: list[Transport]
) -> None:
    info = peer.info()
    elsewhere = Offer(address=b"/proc/1/fd/99999")
    hidden = replace(info, offers={**info.offers, "shared_memory": elsewhere})
    assert Transports(known, "auto", SYSTEM_CLOCK).choose(hidden).name == "nixl"


async def test_a_setting_that_cannot_work_is_a_typed_error(
    peer: LocalPeer, known: list[Transport]
) -> None:
    with pytest.raises(TransportError, match="LMKV_TRANSPORT"):
        Transports(known, "pigeon", SYSTEM_CLOCK)
    with pytest.raises(TransportError, match=r"No transport reaches.*LMKV_TRANSPORT=auto"):
        Transports(known, "shared_memory", SYSTEM_CLOCK).choose(
            replace(peer.info(), host="another")
        )


async def test_a_forgotten_peer_is_chosen_anew(peer: LocalPeer, known: list[Transport]) -> None:
    transports = Transports(known, "auto", SYSTEM_CLOCK)
    transports.choose(peer.info())
    transports.forget("peer")
    assert transports.choose(replace(peer.info(), host="another")).name == "nixl"


async def test_a_better_transport_is_found_when_its_obstacle_is_gone(
    peer: LocalPeer,
    known: list[Transport],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A READ that failed leaves a peer to the object store for a minute, not for ever."""
    caplog.set_level(logging.INFO)
    transports, elsewhere = (
        Transports(known, "auto", SYSTEM_CLOCK),
        replace(peer.info(), host="another"),
    )
    refusing = refused(elsewhere, "nixl", "a READ has just failed")
    assert transports.choose(refusing).name == "object_store"
    assert transports.choose(elsewhere).name == "object_store"
    monkeypatch.setattr(select, "AGAIN_SECONDS", 0.0)
    caplog.clear()
    assert transports.choose(refusing).name == "object_store"
    assert not caplog.records, "nothing new"
    assert transports.choose(elsewhere).name == "nixl"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Fetching from node peer by nixl"
    ]


def test_host_id_is_stable() -> None:
    assert host_id() == host_id()


@given(st.lists(st.integers(0, 100)), st.integers(1, 200))
def test_groups_cover_everything_within_the_limit(sizes: list[int], limit: int) -> None:
    parts = groups(sizes, limit)
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    assert all(len(p) == 1 or sum(sizes[i] for i in p) <= limit for p in parts)


def test_groups_may_grow() -> None:
    assert [len(group) for group in groups([1] * 20, 8, 2)] == [2, 4, 8, 6]


def test_a_batch_is_bounded(peer: LocalPeer) -> None:
    keys = some_keys()
    batch = ChunkReader(peer.store.reader, limit=3 * CHUNK).read(keys)
    assert sum(map(len, batch.chunks)) <= 3 * CHUNK
    assert batch.nbytes.tolist() == [CHUNK - 4096] * 3 + [MISSING] * (COUNT - 3)
    assert ChunkReader(peer.store.reader, limit=1).read(keys).nbytes[0] > 0, "always one"
    empty = ChunkReader(peer.store.reader).read(keys[:0])
    assert empty.chunks == []


def test_a_noted_checksum_is_sent_along(peer: LocalPeer) -> None:
    """So that damage since the chunk was stored is noticed by whoever fetches it."""
    keys, store = some_keys(), peer.store
    hits = store.reader.lookup(keys)
    store.writer.set_checksum(int(hits.slots[0]), int(hits.generations[0]), 5)
    batch = ChunkReader(store.reader).read(keys)
    assert batch.checksums.tolist() == [5, *(checksum(content_of(k)) for k in keys[1:])]


def test_evicted_chunks_are_missing(peer: LocalPeer) -> None:
    peer.store.writer.retire(peer.store.slots[:1], MissReason.EVICTED)
    batch = ChunkReader(peer.store.reader).read(some_keys())
    assert np.flatnonzero(batch.nbytes == MISSING).tolist() == [0]


async def test_a_cancelled_copy_is_waited_for() -> None:
    started, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    done = []

    def copy() -> None:
        loop.call_soon_threadsafe(started.set)
        release.wait()
        done.append(True)

    task = asyncio.create_task(to_the_end(copy))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_what_a_cancelled_wait_missed_is_not_logged() -> None:
    said: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context["message"]))

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise OSError

    async def give_up() -> None:
        waiting = asyncio.create_task(all_ended([asyncio.ensure_future(fail())]))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    await give_up()
    gc.collect()
    assert not said
