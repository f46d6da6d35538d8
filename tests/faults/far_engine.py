"""Two ends of an engine over two hosts: its link to the other host's shard, and a worker there."""

from __future__ import annotations

import time
from typing import Any

from lmkv_ray.arena import ArenaReader, this_process
from lmkv_ray.config import load_settings
from lmkv_ray.courier import Courier
from lmkv_ray.host import host_id
from lmkv_ray.messages import Hello, Owner, StageReply
from lmkv_ray.vllm.link.shard_link import ShardLink
from tests.faults.standin import SPACE, document

WAIT_SECONDS = 60.0


class FarWorker:
    """On the other host: says who it is, and writes and reads where it is told."""

    def __init__(self, chunk_bytes: int) -> None:
        self._nbytes = chunk_bytes
        self._reader: ArenaReader | None = None

    def identity(self) -> tuple[str, Owner]:
        """What a worker reports at start."""
        return host_id(), this_process()

    def write(self, path: str, slots: list[int], deadline: float) -> bool:
        """Fill slots, each with its number; whether it was in time."""
        if self._reader is None:
            self._reader = ArenaReader.attach(path)
        for slot in slots:
            self._reader.payload(slot, self._nbytes)[:] = slot % 251
        return time.monotonic() < deadline

    def holds(self, slots: list[int]) -> bool:
        """Whether that is what they hold."""
        assert self._reader is not None
        reader = self._reader
        return all((reader.payload(slot, self._nbytes) == slot % 251).all() for slot in slots)

    def close(self) -> None:
        """Let go of the arena."""
        if self._reader is not None:
            self._reader.close()


class FarLink:
    """On the engine's host: the link to the shard of another one."""

    def __init__(self, settings: dict[str, Any], chunk_bytes: int, host: str, owner: Owner) -> None:
        made = load_settings(settings)
        self._nbytes = chunk_bytes
        hello = Hello(
            engine_id="far", owner=owner, space=SPACE, model="far", slot_bytes=chunk_bytes, held=[]
        )
        self._courier = Courier(made)
        self._link = ShardLink(
            lambda: self._courier.shard(start=True, host=host),
            hello,
            want_slots=16,
            period=0.02,
            maps=False,
        )

    def granted(self, count: int) -> tuple[str, list[int], float]:
        """Path of the arena, so many slots in it, and the earliest of their deadlines there."""
        self._wait(lambda: len(self._link.slots) >= count)
        taken = [self._link.slots.take() for _ in range(count)]
        assert self._link.attachment is not None
        self._taken = {granted.slot: granted for granted in taken if granted is not None}
        deadline = min(granted.deadline for granted in self._taken.values())
        return self._link.attachment.path, [*self._taken], deadline

    def commit(self, number: int, slots: list[int]) -> None:
        """Make them the chunks of a document."""
        for key, slot in zip(document(number, len(slots)), slots, strict=True):
            self._link.slots.commit(self._taken[slot], key, self._nbytes)
        self._wait(lambda: self._link.slots.settled)

    def locate(self, number: int, chunks: int) -> StageReply | None:
        """Where the chunks of a document are."""
        keys = b"".join(document(number, chunks))
        ticket = self._link.stage(keys, 10.0, locate=True)
        assert ticket is not None
        self._wait(lambda: not ticket.pending)
        return ticket.reply

    def close(self) -> None:
        """End the link."""
        self._link.end()
        self._courier.close()
        self._link.stop()

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "not in time"
            time.sleep(0.01)
