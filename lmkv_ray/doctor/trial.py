"""A chunk of the doctor's own is written, read, and moved to every tier and every node."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator

import numpy as np

from lmkv_ray.actors.cache import CALL_SECONDS, Cache, wait_for
from lmkv_ray.arena import ArenaReader, this_process
from lmkv_ray.doctor.finding import Finding, bad, good, of_error
from lmkv_ray.errors import ArenaError, LmkvError
from lmkv_ray.keys import KEY_BYTES, key_array
from lmkv_ray.messages import (
    Commit,
    Exchange,
    ExchangeReply,
    Hello,
    Stage,
    StageReply,
    Welcome,
    decode,
    encode,
)
from lmkv_ray.status import CacheStatus

TRIAL_BYTES = 64 << 10
PAUSE_SECONDS = 0.1
_LOOK = "look at 'lmkv status' and at the shard's log."


class Trial:
    """An engine without a model, attached to the shard of this node, with one chunk.

    Args:
        cache: has a shard on this node.

    Raises:
        LmkvError: this node has no shard, or the shard has no room.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._engine_id = f"doctor-{secrets.token_hex(4)}"
        self._key = secrets.token_bytes(KEY_BYTES)
        self._data = np.frombuffer(secrets.token_bytes(TRIAL_BYTES), np.uint8)
        hello = Hello(
            engine_id=self._engine_id,
            owner=this_process(),
            space=int.from_bytes(secrets.token_bytes(4), "little"),
            model="lmkv doctor",
            slot_bytes=TRIAL_BYTES,
            held=[],
        )
        welcome = decode(self._call("hello", encode(hello)), Welcome)
        self._reader = ArenaReader.attach(welcome.arena_path, welcome.arena_id)
        self._slots = list(welcome.grant.slots)

    def run(self, status: CacheStatus) -> Iterator[Finding]:
        """Every way once. At the end the chunk is removed from memory; tiers keep their copies."""
        try:
            yield self._memory()
            here = self._cache.node_id
            for node in status.nodes:
                if node.node_id != here and node.problem is None:
                    yield self._there_and_back(f"node {node.name}", node.node_id)
            for tier in next((n.tiers for n in status.nodes if n.node_id == here), []):
                if tier.problem is None:
                    yield self._there_and_back(tier.name, tier.name)
        finally:
            self._reader.close()
            with contextlib.suppress(LmkvError):  # a node that does not answer was told above
                self._cache.evict([self._key])

    def _memory(self) -> Finding:
        began = time.monotonic()
        if not self._slots:
            reply = self._exchange(Exchange(engine_id=self._engine_id, want=1))
            self._slots = list(reply.grant.slots) if reply.grant is not None else []
        if not self._slots:
            return bad("self-test", "The shard of this node grants no slot.", _LOOK)
        slot = self._slots[0]
        self._reader.payload(slot, TRIAL_BYTES)[:] = self._data
        commit = Commit(slot=slot, key=self._key, nbytes=TRIAL_BYTES)
        self._exchange(Exchange(engine_id=self._engine_id, commits=[commit]))
        return self._verdict("memory", began)

    def _there_and_back(self, about: str, to: str) -> Finding:
        began = time.monotonic()
        try:
            if self._cache.move([self._key], to, CALL_SECONDS) != 1:
                return bad(about, "A chunk did not arrive there.", _LOOK)
            reply = self._back(began + CALL_SECONDS)
        except LmkvError as error:
            return of_error(about, error)
        if reply.ready != 1:
            why = reply.reason.value if reply.reason is not None else "no reason was given"
            return bad(about, f"A chunk went there and did not come back: {why}.", _LOOK)
        return self._verdict(about, began)

    def _back(self, deadline: float) -> StageReply:
        """Have the chunk in this node's memory again."""
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            stage = Stage(
                engine_id=self._engine_id, keys=self._key, slot_bytes=TRIAL_BYTES, within=left
            )
            reply = decode(self._call("stage", encode(stage)), StageReply)
            if reply.ready or not left:
                return reply
            time.sleep(PAUSE_SECONDS)  # the directory hears of a move with the next report

    def _verdict(self, about: str, began: float) -> Finding:
        """Whether the chunk is in this node's memory, with its bytes."""
        taken = (time.monotonic() - began) * 1e3
        hits = self._reader.lookup(key_array(self._key))
        if not hits.found[0]:
            return bad(about, "The chunk was written and is not found.", _LOOK)
        at = int(hits.offsets[0])
        same = np.array_equal(self._reader.data[at : at + TRIAL_BYTES], self._data)
        if not (same and self._reader.unchanged(hits.slots, hits.generations)[0]):
            return bad(
                about,
                "The chunk has other bytes than were written.",
                "end the cache with 'lmkv stop', test the machine's memory, and report it.",
            )
        way = "written and read" if about == "memory" else "there and back"
        return good(about, f"A chunk was {way} in {taken:.0f} ms.")

    def _exchange(self, exchange: Exchange) -> ExchangeReply:
        return decode(self._call("exchange", encode(exchange)), ExchangeReply)

    def _call(self, method: str, message: bytes) -> bytes:
        if self._cache.shard is None:
            raise ArenaError(
                "This node has no shard.",
                next_step="run 'lmkv doctor' on a node of the cluster that has one.",
            )
        return wait_for(getattr(self._cache.shard, method).remote(message), CALL_SECONDS)
