"""The courier's program: ``python -m`` this, started by ``client``.

The main thread joins the Ray cluster and finds shards, which blocks; another one hears the engine
and passes calls on, which does not. When the engine is gone the courier ends, whatever hangs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError

from lmkv_ray.actors.cache import Cache
from lmkv_ray.actors.cluster import cluster_id, join
from lmkv_ray.actors.connect import connect
from lmkv_ray.actors.launch import Handle
from lmkv_ray.child import watch
from lmkv_ray.config import Settings
from lmkv_ray.courier.wire import (
    Answer,
    Begin,
    Call,
    Failed,
    Find,
    FoundShard,
    Reply,
    Request,
    Result,
)
from lmkv_ray.errors import ConnectError, LmkvError
from lmkv_ray.framing import Incoming, send

NICENESS = 5
"""Ray's threads give way to the engine's: what is urgent in the cache does not pass here."""
LEAVE_SECONDS = 5.0
"""For a farewell to the cluster."""
RECEIVED_BYTES = 1 << 18
MOST_SHARDS = 256
"""Found ones that can be called; those found first are forgotten."""


class CourierProcess:
    """Serves one engine until it is gone.

    Args:
        link: to the engine.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._saying = threading.Lock()
        self._finds: queue.SimpleQueue[tuple[int, Find] | None] = queue.SimpleQueue()
        self._settings: Settings | None = None
        self._cluster = ""
        self._shards: OrderedDict[int, Handle] = OrderedDict()
        self._found = 0

    def run(self) -> None:
        """Work until the engine is gone, or the cluster is."""
        threading.Thread(target=self._hear, name="hear", daemon=True).start()
        while (wanted := self._finds.get()) is not None:
            number, find = wanted
            try:
                self._say(number, self._find(find))
            except Exception as error:
                self._say(number, _failed(error))
                if not self._still_joined():
                    break  # Ray cannot leave one cluster for another for sure: a new process can
        end = threading.Timer(LEAVE_SECONDS, os._exit, [0])
        end.daemon = True
        end.start()
        ray.shutdown()
        os._exit(0)

    def _find(self, find: Find) -> FoundShard:
        if not self._still_joined():
            raise ConnectError(
                "The Ray cluster is gone, or another one has taken its place.",
                next_step="none: the engine joins again by itself.",
            )
        assert self._settings is not None, "the engine begins with its settings"
        join(self._settings.ray_address, start=find.start)
        self._cluster = cluster_id(ray.get_runtime_context().gcs_address)
        start = find.start or find.known not in ("", self._cluster)
        cache = connect(settings=self._settings, start=start)
        shard = self._shard(cache, find.host)
        if shard is None:
            raise ConnectError(
                f"{'This node' if find.host is None else 'A node of this engine'} has no shard "
                "yet.",
                next_step="wait for the directory, or see whether the node is in the Ray cluster.",
            )
        self._found += 1
        self._shards[self._found] = shard
        if len(self._shards) > MOST_SHARDS:  # links that look again for ever
            self._shards.popitem(last=False)
        return FoundShard(shard=self._found, cluster=self._cluster)

    def _shard(self, cache: Cache, host: str | None) -> Handle | None:
        return cache.shard if host is None else cache.shard_of(host)

    def _still_joined(self) -> bool:
        """Whether this process is in no cluster, or where it has joined is there: head and node."""
        if not ray.is_initialized():
            return True
        try:
            there = cluster_id(ray.get_runtime_context().gcs_address)
        except LmkvError:
            return False
        here, nodes = ray.get_runtime_context().get_node_id(), cast(Any, ray.nodes)()
        lives = any(node["NodeID"] == here and node["Alive"] for node in nodes)
        return lives and self._cluster in ("", there)

    def _hear(self) -> None:
        try:
            self._obey()
        finally:  # the engine is gone, or speaks another language
            end = threading.Timer(LEAVE_SECONDS, os._exit, [0])  # the main thread may hang
            end.daemon = True
            end.start()
            self._finds.put(None)

    def _obey(self) -> None:
        requests = Incoming(Request)
        while data := self._receive():
            for request in requests.feed(data):
                match request.command:
                    case Begin(settings=settings):
                        self._settings = pickle.loads(settings)
                    case Find() as find:
                        self._finds.put((request.number, find))
                    case Call() as call:
                        self._call(request.number, call)

    def _receive(self) -> bytes:
        try:
            return self._link.recv(RECEIVED_BYTES)
        except OSError:
            return b""

    def _call(self, number: int, call: Call) -> None:
        try:
            method = getattr(self._shards[call.shard], call.method)
            answer: Future[bytes] = method.remote(call.payload).future()
        except Exception as error:
            self._say(number, _failed(error))
        else:
            answer.add_done_callback(partial(self._called, number))

    def _called(self, number: int, answer: Future[bytes]) -> None:
        try:
            self._say(number, Reply(payload=answer.result()))
        except Exception as error:
            self._say(number, _failed(error))

    def _say(self, number: int, result: Result) -> None:
        with self._saying, contextlib.suppress(OSError):  # the engine is gone, and we are next
            send(self._link, Answer(number=number, result=result))


def _failed(error: Exception) -> Failed:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, LmkvError):
        return Failed(kind=type(error).__name__, what=error.what, next_step=error.next_step)
    return Failed(kind="", what=f"{type(error).__name__}: {error}")


def main(engine: str, descriptor: str, *, kind: type[CourierProcess] = CourierProcess) -> None:
    """Run.

    Args:
        engine: pid of the engine that started this process.
        descriptor: number of the file descriptor of the socket to the engine.
        kind: the class that serves the engine; tests have others.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the engine
    os.nice(NICENESS)
    link = socket.socket(fileno=int(descriptor))
    watch(int(engine), link)
    kind(link).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
