"""An engine without a model: the real link, the real arena, and chunks whose bytes are known.

A request names a *document*: a run of chunks whose keys and bytes follow from its number. Like a
vLLM replica, the stand-in takes from the arena what is there, asks other nodes for the rest up to a
deadline, computes what did not come, and saves what it computed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import ray

from lmkv_ray.actors import CacheStatus, connect
from lmkv_ray.actors.names import directory_name
from lmkv_ray.arena import this_process
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.courier import Courier
from lmkv_ray.directory import Holding
from lmkv_ray.errors import ConnectError
from lmkv_ray.keys import key_array
from lmkv_ray.messages import Delta, Hello, MissReason, encode
from lmkv_ray.vllm.link.shard_link import ShardLink
from lmkv_ray.vllm.link.ticket import StageTicket

T = TypeVar("T")
SPACE = 7
WANT_SLOTS = 64
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    hits: int
    """Chunks that came out of the cache."""
    wrong: int
    """Of these, how many had other bytes than their document."""
    seconds: float
    """Until the last chunk was there or given up."""
    reason: MissReason | None = None
    """Why not all were staged, if the shard said so."""


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    rss: int
    """Bytes, without shared memory."""
    files: int
    threads: int


class StandIn:
    """See the module.

    Args:
        settings: of the cache.
        chunk_bytes: size of its chunks.
    """

    def __init__(self, settings: dict[str, Any], chunk_bytes: int) -> None:
        self._settings = load_settings(settings)
        self._courier = Courier(self._settings)
        self._nbytes = chunk_bytes
        self._stop_in = ""
        self._observer: ProcessPoolExecutor | None = None
        self._pool = np.random.default_rng(1).integers(0, 256, 2 * chunk_bytes, np.uint8)
        hello = Hello(
            engine_id=f"standin-{uuid.uuid4().hex[:8]}",
            owner=this_process(),
            space=SPACE,
            model="stand-in",
            slot_bytes=chunk_bytes,
            held=[],
        )
        self._link = ShardLink(
            # As the connector does: a cache that was stopped stays so.
            lambda: self._courier.shard(start=not self.attached()),
            hello,
            want_slots=WANT_SLOTS,
            period=0.02,
        )

    def attached(self) -> bool:
        """Whether there is an arena."""
        return hasattr(self, "_link") and self._link.attachment is not None

    def peers(self) -> int:
        """Other nodes that hold chunks, as the shard says."""
        return self._link.peers

    def request(self, number: int, chunks: int, *, stop_in: str = "") -> Answer:
        """Answer a request for a document of so many chunks.

        Args:
            number: of the document.
            chunks: of it.
            stop_in: stop this process (SIGSTOP) in the middle of a "load" or a "save".
        """
        began = time.monotonic()
        self._stop_in = stop_in
        keys = document(number, chunks)
        ticket = self._stage(keys)
        hits, wrong = self._take(keys)
        reason = None if ticket is None else _reason(ticket)
        answer = Answer(hits, wrong, time.monotonic() - began, reason)
        self._save(keys[hits:])
        return answer

    def gather(self, numbers: Sequence[int], chunks: int) -> tuple[float, float, int]:
        """Stage documents, all at once.

        Returns:
            seconds until the first chunk was here, until the last one was, and how many are.
        """
        documents = [document(number, chunks) for number in numbers]
        began = time.monotonic()
        for keys in documents:
            assert self._link.stage(b"".join(keys), self._settings.stage_seconds) is not None
        first, present = 0.0, 0
        while present < chunks * len(documents):
            present = sum(self._run(keys) for keys in documents)
            taken = time.monotonic() - began
            first = first or taken * (present > 0)
            if taken > self._settings.stage_seconds:
                break
            time.sleep(0.001)
        return first, taken, present

    def save(self, number: int, chunks: int) -> int:
        """Compute a document and wait until it is in the arena; returns how many chunks are."""
        keys = document(number, chunks)
        deadline = time.monotonic() + SAVE_SECONDS
        while (present := self._run(keys)) < len(keys) and time.monotonic() < deadline:
            self._save(keys[present:])
            time.sleep(0.01)
        return present

    def count(self, number: int, chunks: int) -> int:
        """Leading chunks of a document that are in the arena."""
        return self._run(document(number, chunks))

    def status(self) -> CacheStatus:
        """Of the whole cache."""
        return self._observe(_status)

    def known(self, number: int, chunks: int) -> bool:
        """Whether the directory knows a node that holds a whole document."""
        keys = b"".join(document(number, chunks))
        return self._observe(_longest, keys) == chunks

    def damage(self, number: int, chunks: int) -> None:
        """Flip a bit in each chunk of a document, in the arena, as bad memory does."""
        reader = self._link.readable
        assert reader is not None
        hits = reader.lookup(key_array(document(number, chunks)))
        assert hits.run == chunks
        reader.data[hits.offsets] ^= 1

    def lie(self, node_id: str, number: int, chunks: int) -> None:
        """Tell the directory that a node holds a document, and nothing else."""
        delta = Delta(
            node_id=node_id,
            epoch=time.time_ns(),
            seq=1,
            added=b"".join(document(number, chunks)),
            removed=b"",
            begin=True,
            end=True,
        )
        self._observe(_tell, encode(delta))

    def node_id(self) -> str:
        """Ray's name of this node."""
        return self._observe(_node_id)

    def usage(self) -> Usage:
        """What this process holds."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return Usage(
            rss=int(status["RssAnon"].split()[0]) << 10,
            files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            threads=int(status["Threads"]),
        )

    def close(self) -> None:
        """End the link."""
        self._end_observer()
        self._link.end()
        self._courier.close()
        self._link.stop()

    def _observe(self, question: Callable[..., T], *args: object) -> T:
        """Ask Ray in a process of its own: an engine is no driver, and outlives its cluster.

        Raises:
            ConnectError: the cluster is gone, or was.
        """
        if self._observer is None:
            self._observer = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            return self._observer.submit(question, self._settings, *args).result()
        except Exception as error:
            self._end_observer()  # the next one joins whatever cluster there is then
            raise ConnectError(f"{error!r}.", next_step="ask again.") from None

    def _end_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            for process in observer._processes.values():
                process.kill()
            observer.shutdown()

    def _stage(self, keys: list[bytes]) -> StageTicket | None:
        if self._run(keys) == len(keys) or self._link.peers == 0:
            return None
        ticket = self._link.stage(b"".join(keys), self._settings.stage_seconds)
        if ticket is not None:
            while ticket.pending:
                time.sleep(0.002)
        return ticket

    def _run(self, keys: list[bytes]) -> int:
        reader = self._link.readable
        return reader.lookup(key_array(keys)).run if reader is not None else 0

    def _take(self, keys: list[bytes]) -> tuple[int, int]:
        """Copy the leading chunks out; how many, and how many of them were wrong."""
        reader = self._link.readable
        if reader is None:
            return 0, 0
        hits = reader.lookup(key_array(keys))
        copies = [
            reader.data[int(at) : int(at) + self._nbytes].copy() for at in hits.offsets[: hits.run]
        ]
        self._maybe_stop("load")
        same = reader.unchanged(hits.slots[: hits.run], hits.generations[: hits.run])
        intact = len(same) if same.all() else int(same.argmin())
        wrong = sum(
            not np.array_equal(copy, self._payload(key))
            for copy, key in zip(copies[:intact], keys, strict=False)
        )
        self._link.slots.touch(list(reversed(keys[:intact])))
        return intact, wrong

    def _save(self, keys: list[bytes]) -> None:
        """Save what there are slots for."""
        for key in keys:
            if self._link.slots.committing(key):
                continue
            granted, reader = self._link.slots.take(), self._link.readable
            if granted is None or reader is None or reader.arena_id != granted.arena_id:
                return
            slot, half = reader.payload(granted.slot, self._nbytes), self._nbytes // 2
            slot[:half] = self._payload(key)[:half]
            self._maybe_stop("save")
            slot[half:] = self._payload(key)[half:]
            self._link.slots.commit(granted, key, self._nbytes)

    def _maybe_stop(self, copy: str) -> None:
        if self._stop_in == copy:
            self._stop_in = ""
            os.kill(os.getpid(), signal.SIGSTOP)

    def _payload(self, key: bytes) -> npt.NDArray[np.uint8]:
        """The bytes of a chunk: a part of a random pool that its key chooses."""
        start = int.from_bytes(key[:8], "little") % self._nbytes
        return self._pool[start : start + self._nbytes]


def _status(settings: Settings) -> CacheStatus:
    return connect(settings=settings, start=False).status()


def _node_id(settings: Settings) -> str:
    return connect(settings=settings, start=False).node_id


def _directory(settings: Settings) -> Any:
    connect(settings=settings, start=False)
    return ray.get_actor(directory_name(0), settings.ray_namespace)


def _longest(settings: Settings, keys: bytes) -> int:
    found = ray.get(_directory(settings).lookup.remote(keys, "", 0), timeout=5)
    return max(
        (holding.run for holding in msgspec.msgpack.decode(found, type=list[Holding])), default=0
    )


def _tell(settings: Settings, delta: bytes) -> None:
    ray.get(_directory(settings).delta.remote(delta), timeout=5)


@lru_cache(4096)
def document(number: int, chunks: int) -> list[bytes]:
    """The keys of a document."""
    rng = np.random.default_rng(number)
    return [rng.bytes(16) for _ in range(chunks)]


def _reason(ticket: StageTicket) -> MissReason | None:
    return ticket.reply.reason if ticket.reply is not None else MissReason.STAGE_TIMEOUT
