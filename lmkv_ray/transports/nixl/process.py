"""The program that owns a NIXL agent: ``python -m`` this, started by ``helper``.

One thread owns the agent and makes all calls of NIXL (which is not thread-safe); another one
verifies what has arrived. NIXL's own progress thread is off: it spins, also when there is nothing
to do, on a core that the model needs. The process ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lmkv_ray.arena import ArenaReader, checksum
from lmkv_ray.transports.nixl.wire import (
    PACKAGES,
    ROW,
    Answer,
    Arrived,
    Failed,
    Read,
    Ready,
    Register,
    Registered,
    Request,
    Result,
    Serve,
    receive,
    send,
)

SHORTEST_PAUSE, LONGEST_PAUSE = 20e-6, 1e-3
"""Seconds between two looks at transfers under way."""
SERVING_SECONDS, SERVING_PAUSE = 2.0, 50e-6
"""For so long after a peer said that it will read, the agent is attended to so often. Where the
network does not read memory by itself (TCP), somebody must send it."""
IDLE_PAUSE = 0.05

Rows = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Transfer:
    number: int
    agent: str
    handle: Any
    rows: Rows


class Process:
    """Serves one parent until it is gone.

    Args:
        api: the module ``nixl._api``.
        reader: the arena.
        link: to the parent.
    """

    def __init__(self, api: Any, reader: ArenaReader, link: socket.socket) -> None:
        self._reader = reader
        self._link = link
        self._base = reader.data.ctypes.data
        self._lost: type[Exception] = api.nixlBind.nixlRemoteDisconnectError
        name = f"lmkv-{reader.header.arena_id:x}-{os.getpid()}-{secrets.token_hex(4)}"
        self._agent = api.nixl_agent(
            name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        self._registered: set[int] = set()
        self._under_way: list[_Transfer] = []
        self._serving_until = 0.0
        self._saying = threading.Lock()
        self._verifier = ThreadPoolExecutor(1, "verify")
        self._say(0, Ready(agent=name, base=self._base))

    def run(self) -> None:
        """Obey until the parent is gone."""
        requests, pause = msgspec.msgpack.Decoder(Request), SHORTEST_PAUSE
        while True:
            if not self._under_way:
                self._agent.get_new_notifs()  # lets NIXL attend to peers; there are no notes
                serving = time.monotonic() < self._serving_until
                pause = SERVING_PAUSE if serving else IDLE_PAUSE
            if select.select([self._link], [], [], pause)[0]:
                request = receive(self._link, requests)
                if request is None:
                    return
                self._obey(request)
                pause = SHORTEST_PAUSE
            elif self._look():
                pause = SHORTEST_PAUSE
            else:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _obey(self, request: Request) -> None:
        match request.command:
            case Register(extents=extents):
                try:
                    self._register(set(extents))
                    metadata = self._agent.get_agent_metadata()
                except Exception as error:  # for instance: more than may be locked in memory
                    self._say(request.number, Failed(why=f"{type(error).__name__}: {error}"))
                    return
                self._say(request.number, Registered(metadata=metadata))
            case Serve():
                self._serving_until = time.monotonic() + SERVING_SECONDS
            case Read() as read:
                self._read(request.number, read)

    def _register(self, extents: set[int]) -> None:
        """Extent by extent: what is not allocated yet must not be touched, and several regions are
        faster than a large one.
        """
        nbytes = self._reader.geometry.extent_bytes
        new = sorted(extents - self._registered)
        if new:
            regions = [(self._base + extent * nbytes, nbytes, 0, "") for extent in new]
            self._agent.register_memory(regions, "DRAM")
            self._registered |= set(new)

    def _read(self, number: int, read: Read) -> None:
        rows = np.frombuffer(read.rows, np.uint64).reshape(-1, ROW)
        extent_bytes = self._reader.geometry.extent_bytes
        try:
            if read.replaces:
                self._forget(read.replaces)
            if read.metadata:
                self._agent.add_remote_agent(read.metadata)
            self._register(set((rows[:, 0] // np.uint64(extent_bytes)).tolist()))
            here, there = descriptors(rows, extent_bytes, read.extent_bytes)
            here[:, 0] += np.uint64(self._base)
            there[:, 0] += np.uint64(read.base)
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(here, "DRAM"),
                self._agent.get_xfer_descs(there, "DRAM"),
                read.agent,
            )
        except Exception as error:
            # Nothing was posted. A wrong descriptor, or an agent that is not known (any more).
            self._say(number, Failed(why=f"{type(error).__name__} {error}"))
            return
        self._look_at(_Transfer(number, read.agent, handle, rows), self._agent.transfer)

    def _look(self) -> bool:
        """Ask for the state of all transfers; whether one has ended."""
        before, self._under_way = self._under_way, []
        for transfer in before:
            self._look_at(transfer, self._agent.check_xfer_state)
        return len(self._under_way) < len(before)

    def _look_at(self, transfer: _Transfer, state: Any) -> None:
        try:
            if state(transfer.handle) == "PROC":
                self._under_way.append(transfer)
                return
        except self._lost as error:
            # UCX has closed the connection by force: nothing arrives any more. Any other error may
            # leave a part of the transfer under way, so it ends this process.
            with contextlib.suppress(Exception):
                transfer.handle.release()
            self._forget(transfer.agent)
            self._say(transfer.number, Failed(why=f"the peer is gone: {error}"))
            return
        transfer.handle.release()
        self._verifier.submit(self._verify, transfer.number, transfer.rows)

    def _forget(self, agent: str) -> None:
        with contextlib.suppress(Exception):  # it is not known
            self._agent.remove_remote_agent(agent)

    def _verify(self, number: int, rows: Rows) -> None:
        data = self._reader.data
        intact = bytes(
            checksum(data[start : start + nbytes]) == expected
            for start, _, nbytes, expected in rows.tolist()
        )
        self._say(number, Arrived(intact=intact))

    def _say(self, number: int, result: Result) -> None:
        with self._saying, contextlib.suppress(OSError):  # the parent is gone, and we are next
            send(self._link, Answer(number=number, result=result))


def descriptors(rows: Rows, extent_here: int, extent_there: int) -> tuple[Rows, Rows]:
    """Descriptors (offset, bytes, 0), here and there, of rows; neighbours are one descriptor.

    Rows are neighbours if each begins where the one before it ends, here and there, and both are in
    one extent (which is one registered region), here and there.
    """
    here, there, nbytes = rows[:, 0], rows[:, 1], rows[:, 2]
    follows = (here[1:] == here[:-1] + nbytes[:-1]) & (there[1:] == there[:-1] + nbytes[:-1])
    for offsets, extent in ((here, extent_here), (there, extent_there)):
        numbers = offsets // np.uint64(extent)
        follows &= numbers[1:] == numbers[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    sizes = np.add.reduceat(nbytes, starts)
    zeros = np.zeros(len(starts), np.uint64)
    return (
        np.stack([here[starts], sizes, zeros], axis=1),
        np.stack([there[starts], sizes, zeros], axis=1),
    )


def load_nixl() -> Any:
    """The module ``nixl._api``.

    Raises:
        ImportError: no wheel of NIXL is installed.
    """
    for package in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{package}._api")
    raise ImportError("none of the packages " + ", ".join(PACKAGES) + " is installed")


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends: it writes into the parent's slots."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(arena_path: str, arena_id: str, parent: str, descriptor: str) -> None:
    """Run for an arena.

    Args:
        arena_path: see ``ArenaReader.attach``.
        arena_id: the arena that is expected.
        parent: process that started us.
        descriptor: of the socket to it.
    """
    end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent
    link = socket.socket(fileno=int(descriptor))
    try:
        api = load_nixl()
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)
        process = Process(api, ArenaReader.attach(arena_path, int(arena_id)), link)
    except Exception as error:
        send(link, Answer(number=0, result=Failed(why=f"{type(error).__name__}: {error}")))
        return
    try:
        process.run()
    except Exception:
        logging.getLogger(__name__).exception("lmkv_ray: the NIXL process ends")
    os._exit(0)  # no farewell to peers: what is under way must end now


if __name__ == "__main__":
    main(*sys.argv[1:])
