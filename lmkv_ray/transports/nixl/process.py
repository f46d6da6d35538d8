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
from functools import partial
from typing import Any

from lmkv_ray.arena import ArenaReader
from lmkv_ray.framing import Incoming, send
from lmkv_ray.transports.nixl.reads import Reads, Say
from lmkv_ray.transports.nixl.regions import Regions
from lmkv_ray.transports.nixl.transfers import Transfers
from lmkv_ray.transports.nixl.wire import (
    PACKAGES,
    HelperAnswer,
    HelperRequest,
    Meet,
    Met,
    NotDone,
    PeerData,
    Read,
    Ready,
    Register,
    Registered,
    Result,
    Serve,
)

SHORTEST_PAUSE, LONGEST_PAUSE = 20e-6, 1e-3
"""Seconds between two looks at transfers under way."""
SERVING_SECONDS, SERVING_PAUSE = 2.0, 50e-6
"""For so long after a peer said that it will read, the agent is attended to so often. Where the
network does not read memory by itself (TCP), this process must send it."""
IDLE_PAUSE = 0.02
"""Such peers do not always say so."""
RECEIVED_BYTES = 1 << 18


class NixlProcess:
    """Serves one parent until it is gone.

    Args:
        api: the module ``nixl._api``.
        reader: the arena.
        link: to the parent.
    """

    def __init__(self, api: Any, reader: ArenaReader, link: socket.socket) -> None:
        self._link = link
        name = f"lmkv-{reader.header.arena_id:x}-{os.getpid()}-{secrets.token_hex(4)}"
        self._agent = api.nixl_agent(
            name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        self._regions = regions = Regions(self._agent, reader)
        self._transfers = Transfers(self._agent, api.nixlBind.nixlRemoteDisconnectError)
        self._reads = Reads(reader, regions, self._transfers)
        self._peers: dict[str, PeerData] = {}
        self._serving_until = 0.0
        self._saying = threading.Lock()
        self._say(0, Ready(agent=name, data=regions.address))

    def run(self) -> None:
        """Obey until the parent is gone."""
        requests, pause = Incoming(HelperRequest), SHORTEST_PAUSE
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

    def _obey(self, command: object, say: Say) -> None:
        match command:
            case Serve():
                self._serving_until = time.monotonic() + SERVING_SECONDS
            case Read(agent=agent) if agent not in self._peers:
                say(NotDone(why="another agent has just taken its place"))
            case Read(agent=agent) as read:
                self._reads.read(read, self._peers[agent], say)
            case Meet() as meet:
                self._answer(say, lambda: say(self._meet(meet)))
            case Register(extents=extents):
                self._answer(say, lambda: say(self._register(set(extents))))

    def _answer(self, say: Say, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # for instance: more than may be locked in memory
            say(NotDone(why=_why(error)))

    def _register(self, extents: set[int]) -> Result:
        self._regions.add(extents)
        return Registered(metadata=self._agent.get_agent_metadata())

    def _meet(self, peer: Meet) -> Result:
        if peer.replaces:
            self._peers.pop(peer.replaces, None)
            self._transfers.forget(peer.replaces)
        if not (0 < peer.data.extent_bytes < 1 << 63 and 0 <= peer.data.address < 1 << 64):
            raise ValueError("what the peer says of its payloads is of no arena")
        self._agent.add_remote_agent(peer.metadata)
        self._peers[peer.agent] = peer.data
        return Met()

    def _hear(self) -> bytes:
        try:
            return self._link.recv(RECEIVED_BYTES)
        except OSError:
            return b""  # the parent is gone

    def _say(self, number: int, result: Result) -> None:
        with self._saying, contextlib.suppress(OSError):  # the parent is gone, and we are next
            send(self._link, HelperAnswer(number=number, result=result))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
    # The parent may have thousands of files open, and select() takes only low numbers.
    link = socket.socket(fileno=os.dup(int(descriptor)))
    try:
        api = load_nixl()
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)
        process = NixlProcess(api, ArenaReader.attach(arena_path, int(arena_id)), link)
    except Exception as error:
        send(link, HelperAnswer(number=0, result=NotDone(why=_why(error))))
        return
    try:
        process.run()
    except Exception:
        logging.getLogger(__name__).exception("lmkv_ray: the NIXL process ends")
    os._exit(0)  # no farewell to peers: what is under way must end now


if __name__ == "__main__":
    main(*sys.argv[1:])
