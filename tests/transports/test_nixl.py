"""NIXL where it differs from other transports: processes that die and hang, READs that cannot be
taken back. Over TCP, where READs take a while and the peer's process takes part.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Failure, Fetch, Outcome
from lmkv_ray.messages import MissReason, decode, encode
from lmkv_ray.transports import Answer, Helper, PeerInfo
from lmkv_ray.transports.nixl import Locate, Located, transport
from lmkv_ray.transports.nixl import helper as helper_module
from lmkv_ray.transports.nixl.helper import HelperError
from lmkv_ray.transports.nixl.wire import ROW, Meet, PeerData, Read, Register
from tests.transports.harness import COUNT, Here, Store, content_of, some_keys, until

KEYS = some_keys()
SECONDS = 60.0
AT_ONCE = 5.0
"""Seconds, on a machine that is busy with other things."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here(over_tcp: None) -> AsyncIterator[Here]:
    here = Here()
    here.helper.start()
    yield here
    await here.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(over_tcp: None) -> AsyncIterator[Store]:
    store = Store()
    store.helper.start()
    yield store
    await store.close()


@pytest_asyncio.fixture(loop_scope="module")
async def store(started: Store, here: Here) -> Store:
    """Both processes are ready to work."""
    started.reset()
    for helper in (started.helper, here.helper):
        await helper.call(Register(extents=[]), time.monotonic() + SECONDS)
    return started


@pytest_asyncio.fixture(loop_scope="module")
async def other(over_tcp: None) -> AsyncIterator[Store]:
    other = Store()
    yield other
    await other.close()


async def fetch(
    here: Here, peer: PeerInfo, within: float = SECONDS, start: int = 0
) -> list[Outcome]:
    wish = Fetch(KEYS, here.places(COUNT, start), within)
    outcomes = [outcome async for outcome in here.transport.fetch(peer, wish)]
    assert sorted(outcome.position for outcome in outcomes) == list(range(COUNT))
    return sorted(outcomes, key=lambda outcome: outcome.position)


def landed(here: Here, start: int = 0) -> list[bool]:
    """Which chunks are in their places."""
    slots = here.slots[start : start + COUNT]
    return [
        bool((here.writer.payload(slot)[: len(content)] == content).all())
        for slot, content in zip(slots, map(content_of, KEYS), strict=True)
    ]


async def test_an_agent_killed_in_a_read_is_noticed_at_once(here: Here, store: Store) -> None:
    assert all(outcome.ok for outcome in await fetch(here, store.info()))
    pid, life = store.helper.pid, here.helper._life
    assert pid is not None
    assert life is not None
    os.kill(pid, signal.SIGSTOP)  # so that the READ is under way when it dies
    reading = asyncio.create_task(fetch(here, store.info()))
    await until(lambda: life._open)
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    outcomes = await reading
    assert time.monotonic() - begin < AT_ONCE
    # What did not arrive is read from the next agent, once its shard has noticed.
    assert {outcome.failure for outcome in outcomes} <= {None, Failure.LOST}
    await until_all_arrive(here, store, start=16)
    assert store.helper.pid != pid


async def test_a_restarted_peer_is_found_under_its_new_name(here: Here, store: Store) -> None:
    await fetch(here, store.info())
    ours, before = here.helper.agent, store.helper.agent
    pid = store.helper.pid
    assert before is not None
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: store.helper.agent is None)
    outcomes = await fetch(here, store.info())
    assert [outcome.detail for outcome in outcomes] == [""] * COUNT
    assert all(outcome.ok for outcome in outcomes)
    assert all(landed(here))
    after = store.helper.agent
    assert after is not None
    assert after.agent != before.agent
    assert here.helper.agent == ours, "our process is the same"


async def test_nothing_arrives_after_a_read_was_late(here: Here, store: Store) -> None:
    """The peer's process hangs in the middle, and goes on when its reader has given up."""
    assert all(outcome.ok for outcome in await fetch(here, store.info()))
    pid, ours = store.helper.pid, here.helper.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    outcomes = await fetch(here, store.info(), within=0.5)
    assert time.monotonic() - begin < SECONDS / 2
    assert {outcome.failure for outcome in outcomes} <= {Failure.LATE, Failure.LOST}
    assert here.helper.pid != ours, "the process that read was ended"
    obstacle = here.transport.obstacle(store.info())
    assert obstacle is not None, "others may have more luck with that peer"
    assert "hung" in obstacle
    os.kill(pid, signal.SIGCONT)
    # Whether it survives that its reader is gone is UCX's affair; a later fetch works.
    await until_all_arrive(here, store, start=16)
    assert not any(here.writer.payload(slot).any() for slot in here.slots[:COUNT])


async def located_by(store: Store, keys: bytes) -> Located:
    """What a store answers to a reader that knows nothing yet."""
    question = encode(Locate(keys=keys, known=""))
    answer = await store.serve("nixl", question)
    assert isinstance(answer, bytes)
    return decode(answer, Located)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until_all_arrive(here: Here, store: Store, start: int) -> None:
    async with asyncio.timeout(SECONDS):
        while not all(o.ok for o in await fetch(here, store.info(), start=start)):
            pass
    assert all(landed(here, start))


async def test_our_own_process_may_die(here: Here, store: Store) -> None:
    await fetch(here, store.info())
    assert here.helper.pid is not None
    os.kill(here.helper.pid, signal.SIGKILL)
    await until(lambda: here.helper.agent is None)
    assert all(outcome.ok for outcome in await fetch(here, store.info()))
    assert all(landed(here))


async def test_an_agent_that_was_replaced_meanwhile_costs_nobody_else(
    here: Here, store: Store
) -> None:
    pid = here.helper.pid
    read = Read(agent="gone", rows=np.zeros((1, ROW), np.uint64).tobytes())
    with pytest.raises(HelperError, match="taken its place"):
        await here.helper.call(read, time.monotonic() + SECONDS)
    assert here.helper.pid == pid


async def test_two_fetches_at_once(here: Here, store: Store) -> None:
    one, two = await asyncio.gather(fetch(here, store.info()), fetch(here, store.info(), start=16))
    assert all(outcome.ok for outcome in [*one, *two])
    assert all(landed(here))
    assert all(landed(here, start=16))


@pytest.mark.parametrize("overwritten", [True, False])
async def test_chunks_evicted_between_locate_and_read(
    here: Here, store: Store, overwritten: bool
) -> None:
    async def ask(transport: str, question: bytes) -> Answer:
        answer = await store.serve(transport, question)
        if store.calls == 1:
            store.writer.retire(store.slots, MissReason.EVICTED)
            if overwritten:
                store.fill(some_keys(seed=1))
        return answer

    one = Fetch(KEYS[:1], here.places(1), SECONDS)
    peer = replace(store.info(), ask=ask)
    outcomes = [outcome async for outcome in here.transport.fetch(peer, one)]
    # Bytes that are still there are as good as ever.
    assert [outcome.failure for outcome in outcomes] == [Failure.CHANGED if overwritten else None]
    assert landed(here)[0] == (not overwritten)
    if not overwritten:
        store.fill(KEYS)  # for ``reset``


async def test_a_checksum_is_computed_once(here: Here, store: Store) -> None:
    await fetch(here, store.info())
    noted = store.reader.checksums(store.slots)
    assert noted.all()
    store.writer.set_checksum(int(store.slots[3]), 2**63, 1)  # not of this generation
    assert [outcome.checksum for outcome in await fetch(here, store.info())] == noted.tolist()


async def test_files_threads_and_processes_are_given_back(here: Here, store: Store) -> None:
    await fetch(here, store.info())
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        await fetch(here, store.info())
    assert (open_files(), threading.active_count()) == (files, threads)
    helper = Helper(store.writer, SYSTEM_CLOCK)
    await helper.call(Register(extents=[0]), time.monotonic() + SECONDS)
    pid = helper.pid
    assert pid is not None
    await helper.close()
    await until(lambda: (open_files(), threading.active_count()) == (files, threads))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(HelperError, match="ends"):
        await helper.call(Register(extents=[]), time.monotonic() + SECONDS)


async def test_without_the_package_there_is_an_obstacle(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.0)
    assert here.transport.obstacle(store.info()) is None
    monkeypatch.setattr(helper_module, "PACKAGES", ("nixl_of_another_planet",))
    assert here.transport.obstacle(store.info()) == "the package nixl is not installed"
    assert store.servers.offers("")["nixl"].obstacle == "the package nixl is not installed"


@pytest.mark.parametrize(
    ("address", "extent_bytes"), [(0, 0), (0, -1), (-1, 1 << 20), (1 << 64, 1 << 20), (7, 1 << 20)]
)
async def test_payloads_that_are_of_no_arena_are_the_peers_fault_alone(
    here: Here, store: Store, monkeypatch: pytest.MonkeyPatch, address: int, extent_bytes: int
) -> None:
    async def lying(transport: str, question: bytes) -> Answer:
        located = await located_by(store, decode(question, Locate).keys)
        data = PeerData(address=address, extent_bytes=extent_bytes)
        return encode(msgspec.structs.replace(located, data=data))

    pid = here.helper.pid
    here.transport._known.clear()
    for _ in range(2):
        outcomes = await fetch(here, replace(store.info(), ask=lying))
        assert {outcome.failure for outcome in outcomes} == {Failure.LOST}
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.0)
    assert all(outcome.ok for outcome in await fetch(here, store.info()))
    assert here.helper.pid == pid


async def test_an_agent_is_replaced_while_a_read_from_it_hangs(
    here: Here, store: Store, other: Store
) -> None:
    """Its transfers end by themselves, or with our process; those from others go on."""
    await fetch(here, store.info())
    known, pid, ours = here.transport._known["peer"], store.helper.pid, here.helper.pid
    assert pid is not None
    await fetch(here, replace(other.info(), node_id="other"))
    os.kill(pid, signal.SIGSTOP)
    hanging = asyncio.create_task(fetch(here, store.info()))
    await asyncio.sleep(0.2)
    located = await located_by(other, KEYS.tobytes())
    meet = Meet(
        agent=located.agent,
        metadata=located.metadata,
        replaces=known.agent,
        data=located.data,
    )
    await here.helper.call(meet, time.monotonic() + SECONDS)
    await asyncio.sleep(0.2)
    assert here.helper.pid == ours
    os.kill(pid, signal.SIGCONT)
    outcomes = await hanging
    under_way, later = outcomes[: 2 * transport.IN_FLIGHT], outcomes[2 * transport.IN_FLIGHT :]
    assert all(outcome.ok for outcome in under_way)
    # Batches that were asked for before the replacement are refused by our process; the transport
    # itself refuses those that it would ask for after the peer was forgotten.
    assert {outcome.detail for outcome in later} <= {
        "another agent has just taken its place",
        "its agent, or ours, has just gone",
    }
    assert {outcome.failure for outcome in later} == {Failure.LOST}


async def test_processes_with_nothing_to_do_leave_the_processor_alone(
    here: Here, store: Store
) -> None:
    def asleep() -> bool:
        """No thread wants the processor."""
        tasks = [
            task
            for helper in (store.helper, here.helper)
            for task in Path(f"/proc/{helper.pid}/task").iterdir()
        ]
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        return "R" not in states

    assert all(outcome.ok for outcome in await fetch(here, store.info()))
    # They go on attending to peers for a little while; then they must come to rest.
    calm = 0
    async with asyncio.timeout(SECONDS):
        while calm < 20:
            await asyncio.sleep(0.02)
            calm = calm + 1 if asleep() else 0
