"""The program that owns a NIXL agent: ``python -m`` this, started by ``helper``.

One thread makes all calls of NIXL, which is not thread-safe; others verify what has arrived. NIXL's
own progress thread is off: it spins, also when there is nothing to do, on a core that the model
needs. The process ends when its parent does.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from lmkv_ray.arena import SLOT, ArenaReader, DistantArena, Geometry, checksum
from lmkv_ray.keys import key_array
from lmkv_ray.transports.nixl.found import Found
from lmkv_ray.transports.nixl.looking import Looking, Scratch
from lmkv_ray.transports.nixl.transfers import Numbers, Transfers, descriptors
from lmkv_ray.transports.nixl.wire import (
    PACKAGES,
    ROW,
    SLOT_ROW,
    Answer,
    Arrived,
    Bring,
    Brought,
    Failed,
    Incoming,
    Meet,
    Met,
    Read,
    Ready,
    Register,
    Registered,
    Request,
    Result,
    Serve,
    Tables,
    send,
)

SHORTEST_PAUSE, LONGEST_PAUSE = 20e-6, 1e-3
"""Seconds between two looks at transfers under way."""
SERVING_SECONDS, SERVING_PAUSE = 2.0, 50e-6
"""For so long after a peer said that it will read, the agent is attended to so often. Where the
network does not read memory by itself (TCP), somebody must send it."""
IDLE_PAUSE = 0.02
"""Such peers do not always say so."""
RECEIVED_BYTES = 1 << 18
VERIFIERS = 4
"""Threads for what a network brings."""


class Process:
    """Serves one parent until it is gone.

    Args:
        api: the module ``nixl._api``.
        reader: the arena.
        link: to the parent.
    """

    def __init__(self, api: Any, reader: ArenaReader, link: socket.socket) -> None:
        self._reader = reader
        self._tables = reader.map_tables()
        self._link = link
        self._data = reader.data.ctypes.data
        geometry = reader.geometry
        index = self._tables.ctypes.data
        self._slots = index + geometry.slots_offset - geometry.index_offset
        name = f"lmkv-{reader.header.arena_id:x}-{os.getpid()}-{secrets.token_hex(4)}"
        self._agent = api.nixl_agent(
            name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        self._transfers = Transfers(self._agent, api.nixlBind.nixlRemoteDisconnectError)
        self._scratch = Scratch(self._agent)
        self._registered: set[int] = set()
        self._serves = False
        self._peers: dict[str, DistantArena] = {}
        self._serving_until = 0.0
        self._saying = threading.Lock()
        self._verifiers = ThreadPoolExecutor(VERIFIERS, "verify")
        self._say(0, Ready(agent=name, data=self._data, index=index, slots=self._slots))

    def run(self) -> None:
        """Obey until the parent is gone."""
        requests, pause = Incoming(Request), SHORTEST_PAUSE
        while True:
            if not self._transfers:
                self._agent.get_new_notifs()  # lets NIXL attend to peers; there are no notes
                serving = time.monotonic() < self._serving_until
                pause = SERVING_PAUSE if serving else IDLE_PAUSE
            if select.select([self._link], [], [], pause)[0]:
                data = self._hear()
                if not data:
                    return
                for request in requests.feed(data):
                    self._obey(request.command, partial(self._say, request.number))
                pause = SHORTEST_PAUSE
            elif self._transfers.look():
                pause = SHORTEST_PAUSE
            else:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _obey(self, command: object, say: Callable[[Result], None]) -> None:
        match command:
            case Serve():
                self._serving_until = time.monotonic() + SERVING_SECONDS
            case Bring(agent=agent) | Read(agent=agent) if agent not in self._peers:
                say(Failed(why="another agent has just taken its place"))
            case Bring() as bring:
                self._bring(bring, say)
            case Read() as read:
                rows = np.frombuffer(read.rows, np.uint64).reshape(-1, ROW)
                arrived = lambda intact: say(Arrived(intact=intact))  # noqa: E731
                self._read(read.agent, rows, arrived, lambda why: say(Failed(why=why)))
            case Meet() as meet:
                self._answer(say, partial(self._meet, meet))
            case Register(extents=extents):
                self._answer(say, partial(self._serve_extents, set(extents)))

    def _answer(self, say: Callable[[Result], None], work: Callable[[], Result]) -> None:
        try:
            say(work())
        except Exception as error:
            say(Failed(why=_why(error)))

    def _serve_extents(self, extents: set[int]) -> Result:
        """The tables as well: the index as a whole, of the slots the rows of those extents."""
        if not self._serves:
            nbytes = self._slots - self._tables.ctypes.data
            self._agent.register_memory([(self._tables.ctypes.data, nbytes, 0, "")], "DRAM")
            self._serves = True
        self._register(extents)
        return Registered(metadata=self._agent.get_agent_metadata())

    def _register(self, extents: set[int]) -> None:
        """Extent by extent: what is not allocated yet must not be touched, and several regions are
        faster than a large one.
        """
        geometry = self._reader.geometry
        nbytes, rows = geometry.extent_bytes, geometry.slots_per_extent * SLOT.itemsize
        new = sorted(extents - self._registered)
        if new:
            regions = [(self._data + extent * nbytes, nbytes, 0, "") for extent in new]
            regions += [(self._slots + extent * rows, rows, 0, "") for extent in new]
            self._agent.register_memory(regions, "DRAM")
            self._registered |= set(new)

    def _meet(self, peer: Meet) -> Result:
        if peer.replaces:
            self._peers.pop(peer.replaces, None)
            self._transfers.forget(peer.replaces)
        self._agent.add_remote_agent(peer.metadata)
        self._peers[peer.agent] = _arena_at(peer.tables)
        return Met()

    def _bring(self, bring: Bring, say: Callable[[Result], None]) -> None:
        slots = np.frombuffer(bring.slots, np.uint64).reshape(-1, SLOT_ROW)
        intact = np.zeros(len(slots), np.uint8)
        failed = lambda why: say(Failed(why=why))  # noqa: E731

        def found(chunks: Found, seconds: float) -> None:
            wanted = np.flatnonzero(chunks.fitting(slots[:, 1].astype(np.int64)))

            def arrived(these: bytes) -> None:
                intact[wanted] = np.frombuffer(these, np.uint8)
                nbytes, offsets, generations, checksums = (a.tobytes() for a in chunks.arrays)
                brought = Brought(
                    nbytes=nbytes, offsets=offsets, generations=generations, checksums=checksums,
                    intact=intact.tobytes(), seconds=seconds,
                )  # fmt: skip
                say(brought)

            if len(wanted):
                self._read(bring.agent, chunks.rows(wanted, slots[:, 0]), arrived, failed)
            else:
                arrived(b"")

        Looking(
            bring.agent, key_array(bring.keys), self._peers[bring.agent], self._transfers,
            self._scratch, found, failed,
        ).start()  # fmt: skip

    def _read(
        self,
        agent: str,
        rows: Numbers,
        arrived: Callable[[bytes], None],
        failed: Callable[[str], None],
    ) -> None:
        """Read and verify rows of ``Read``; ``arrived`` may be called by another thread."""
        extent_bytes = self._reader.geometry.extent_bytes
        try:
            self._register(set((rows[:, 0] // np.uint64(extent_bytes)).tolist()))
            peer = self._peers[agent]
        except Exception as error:
            failed(_why(error))
            return
        here, there = descriptors(rows, extent_bytes, peer.geometry.extent_bytes)
        here[:, 0] += np.uint64(self._data)
        there[:, 0] += np.uint64(peer.data)

        def verify(at_once: bool) -> None:
            # What this processor has copied is in its cache; of what a network brings, more comes.
            if at_once or not self._transfers:
                arrived(self._intact(rows))
            else:
                self._verifiers.submit(lambda: arrived(self._intact(rows)))

        self._transfers.post(agent, here, there, verify, failed)

    def _intact(self, rows: Numbers) -> bytes:
        data = self._reader.data
        return bytes(
            checksum(data[start : start + nbytes]) == expected
            for start, _, nbytes, expected in rows.tolist()
        )

    def _hear(self) -> bytes:
        try:
            return self._link.recv(RECEIVED_BYTES)
        except OSError:
            return b""  # the parent is gone

    def _say(self, number: int, result: Result) -> None:
        with self._saying, contextlib.suppress(OSError):  # the parent is gone, and we are next
            send(self._link, Answer(number=number, result=result))


def _why(error: Exception) -> str:
    """For instance: more than may be locked in memory."""
    return f"{type(error).__name__}: {error}"


def _arena_at(tables: Tables) -> DistantArena:
    return DistantArena(
        Geometry.of(tables.capacity, tables.extent_bytes),
        np.frombuffer(tables.slot_bytes, np.int64),
        tables.index,
        tables.slots,
        tables.data,
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
        send(link, Answer(number=0, result=Failed(why=_why(error))))
        return
    try:
        process.run()
    except Exception:
        logging.getLogger(__name__).exception("lmkv_ray: the NIXL process ends")
    os._exit(0)  # no farewell to peers: what is under way must end now


if __name__ == "__main__":
    main(*sys.argv[1:])
