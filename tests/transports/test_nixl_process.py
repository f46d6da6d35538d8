"""The process that owns a NIXL agent: what it is handed, and what it costs who does not need it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.arena import ArenaReader
from lmkv_ray.framing import Incoming, framed
from lmkv_ray.transports.nixl.process import NixlProcess
from lmkv_ray.transports.nixl.transfers import Transfers, descriptors
from lmkv_ray.transports.nixl.wire import (
    Meet,
    NotDone,
    PeerData,
    Read,
    Registered,
    Result,
)
from tests.transports.harness import CHUNK, Here

SECONDS = 60.0


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "import asyncio\n"
        "from lmkv_ray.arena import ArenaWriter\n"
        "from lmkv_ray.clock import SYSTEM_CLOCK\n"
        "from lmkv_ray.transports import Helper\n"
        "async def main():\n"
        "    helper = Helper(ArenaWriter.create('parent', 4 << 20), SYSTEM_CLOCK); helper.start()\n"
        "    print(helper.pid, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + SECONDS
        while child.exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        assert not child.exists()


def test_nothing_of_nixl_is_imported_until_it_is_used() -> None:
    program = "import sys, lmkv_ray.transports; print([m for m in sys.modules if 'nixl' in m])"
    found = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert all(name.startswith("lmkv_ray") for name in eval(found))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20))
def test_descriptors_cover_the_rows_and_stay_in_their_extents(
    places: list[tuple[int, int]],
) -> None:
    size, here, there = 4, 16, 32
    rows = np.array([(a * size, b * size, size) for a, b in places], np.uint64)
    ours, theirs = descriptors(rows, here, there)
    assert (ours[:, 1] == theirs[:, 1]).all()
    pairs = [
        (int(a[0]) + i, int(b[0]) + i)
        for a, b in zip(ours, theirs, strict=True)
        for i in range(0, int(a[1]), size)
    ]
    assert pairs == [(int(row[0]), int(row[1])) for row in rows]
    for spans, extent in ((ours, here), (theirs, there)):
        begin, end = spans[:, 0], spans[:, 0] + spans[:, 1] - np.uint64(1)
        assert (begin // np.uint64(extent) == end // np.uint64(extent)).all()


def test_neighbours_are_one_descriptor() -> None:
    rows = np.array([(i * CHUNK, (i + 3) * CHUNK, CHUNK) for i in range(8)], np.uint64)
    ours, theirs = descriptors(rows, 1 << 20, 1 << 20)
    assert ours.tolist() == [[0, 8 * CHUNK, 0]]
    assert theirs.tolist() == [[3 * CHUNK, 8 * CHUNK, 0]]


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(1, 30))
def test_messages_arrive_whole_in_whatever_pieces(contents: list[bytes], size: int) -> None:
    sent = [Registered(metadata=content) for content in contents]
    stream = b"".join(map(framed, sent))
    incoming = Incoming(Registered)
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [message for piece in pieces for message in incoming.feed(piece)] == sent


class LostError(Exception):
    """As NIXL says that a peer is gone."""


class FakeAgent:
    """States of transfers, by the peer's name; an exception is raised."""

    def __init__(self) -> None:
        self.states: dict[str, str | Exception] = {}
        self.removed: list[str] = []
        self.lockable = True
        """Whether memory can be registered."""

    def register_memory(self, regions: Any, kind: str) -> None:
        if not self.lockable:
            raise OSError("too much is locked in memory")

    def add_remote_agent(self, metadata: bytes) -> None:
        pass

    def get_xfer_descs(self, spans: Any, kind: str) -> Any:
        return spans

    def initialize_xfer(self, what: str, here: Any, there: Any, agent: str) -> Any:
        return SimpleNamespace(agent=agent, release=lambda: None)

    def check_xfer_state(self, handle: Any) -> str:
        state = self.states[handle.agent]
        if isinstance(state, Exception):
            raise state
        return state

    transfer = check_xfer_state

    def remove_remote_agent(self, agent: str) -> None:
        self.removed.append(agent)


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


class Events(list[str]):
    """What was said of transfers."""

    def post(self, transfers: Transfers, agent: str) -> None:
        spans = np.zeros((1, 3), np.uint64)
        transfers.post(agent, spans, spans, lambda _: self.append(f"{agent} arrived"), self.append)


@pytest.fixture
def process(agent: FakeAgent) -> Iterator[NixlProcess]:
    """Has met the agents a and b, of arenas like its own."""
    api = SimpleNamespace(
        nixl_agent=lambda name, config: agent,
        nixl_agent_config=lambda **_: None,
        nixlBind=SimpleNamespace(nixlRemoteDisconnectError=LostError),
    )
    here, (ours, theirs) = Here(), socket.socketpair()
    with ours, theirs:
        process = NixlProcess(api, ArenaReader.attach(here.writer.path), theirs)
        data = PeerData(address=0, extent_bytes=here.writer.geometry.extent_bytes)
        for name in ("a", "b"):
            meet = Meet(agent=name, metadata=b"", replaces="", data=data)
            process._obey(meet, list[Result]().append)
        yield process
    here.writer.close()


def test_an_error_that_may_leave_a_part_under_way_is_not_answered(
    agent: FakeAgent, process: NixlProcess
) -> None:
    """It ends the process, which is the only fence there is."""
    said: list[Result] = []
    read = Read(agent="a", rows=np.array([[0, 0, CHUNK, 1]], np.uint64).tobytes())
    agent.states = {"a": OSError("the third of 64 could not be posted")}
    with pytest.raises(OSError, match="third"):
        process._obey(read, said.append)
    agent.states = {"a": "PROC"}
    process._obey(read, said.append)
    agent.states = {"a": OSError("backend")}
    with pytest.raises(OSError, match="backend"):
        process._transfers.look()
    assert not said


def test_what_is_not_posted_costs_nobody_else(agent: FakeAgent, process: NixlProcess) -> None:
    said: list[Result] = []
    read = Read(agent="a", rows=np.array([[0, 0, CHUNK, 1]], np.uint64).tobytes())
    agent.lockable = False
    process._obey(read, said.append)
    process._obey(Read(agent="c", rows=b""), said.append)
    assert said == [
        NotDone(why="OSError: too much is locked in memory"),
        NotDone(why="another agent has just taken its place"),
    ]


def test_an_agent_is_removed_when_nothing_of_it_is_under_way(agent: FakeAgent) -> None:
    transfers, events = Transfers(agent, LostError), Events()
    agent.states = {"a": "PROC", "b": "PROC"}
    for name in ("a", "a", "b"):
        events.post(transfers, name)
    transfers.forget("a")
    assert not transfers.look()
    assert agent.removed == []
    agent.states["a"] = "DONE"
    assert transfers.look()
    assert agent.removed == ["a"]
    agent.states["b"] = LostError("connection reset")
    assert transfers.look()
    assert agent.removed == ["a", "b"]
    assert events == ["a arrived", "a arrived", "the peer is gone: connection reset"]
    assert len(transfers) == 0


def test_a_transfer_that_ends_and_begins_another_has_ended(agent: FakeAgent) -> None:
    """What follows is looked at again at once."""
    transfers, spans = Transfers(agent, LostError), np.zeros((1, 3), np.uint64)
    agent.states = {"a": "PROC", "b": "PROC"}
    follow = lambda _: transfers.post("b", spans, spans, lambda _: None, print)  # noqa: E731
    transfers.post("a", spans, spans, follow, print)
    agent.states["a"] = "DONE"
    assert transfers.look()
    assert not transfers.look()
    assert len(transfers) == 1
