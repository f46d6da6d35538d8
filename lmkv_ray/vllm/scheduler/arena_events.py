"""KV events about this node's arena, in vLLM's own form (``medium`` CPU).

vLLM publishes what its prefix cache holds (medium GPU) if ``--kv-events-config`` asks for it; with
these beside it, a program that follows the stream (llm-d, Dynamo, Ray's KVAwareRouter, an indexer)
sees both tiers of an engine. Stored: what this engine saved or loaded. Removed: noticed by looking
the keys up again, some of them every second, so that an eviction needs no message. Bounded: of the
chunks told of longest ago, the oldest are withdrawn first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmkv_ray.arena import ArenaReader
from lmkv_ray.keys import key_array
from lmkv_ray.vllm.engine.groups import Group
from lmkv_ray.vllm.link.watch_list import Watched
from lmkv_ray.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent

MAX_TOLD = 1 << 16
"""Chunks that followers believe to be here."""
CHECK_SECONDS = 1.0
CHECKED = 2048
"""Chunks that are looked up again at a time; 0.2 ms."""


class ArenaEvents:
    """Tells what came to the arena through this engine, and what of it is gone."""

    def __init__(self) -> None:
        self._told: Watched[tuple[int, list[Any]]] = Watched(MAX_TOLD)
        self._checked_at = 0.0
        self._pending: list[KVCacheEvent] = []

    def stored(self, tracked: TrackedRequest, group: Group, chunks: Iterable[int]) -> None:
        """Chunks of a request are in the arena."""
        from vllm.distributed.kv_events import MEDIUM_CPU, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        request, keys = tracked.request, tracked.keys(group)
        lora = request.lora_request
        per_block = group.block_tokens // group.hash_tokens
        for chunk in chunks:
            key = keys[chunk].tobytes()
            if key in self._told:
                continue
            last = group.hash_index(chunk)
            first = last - (group.blocks - 1) * per_block
            hashes: list[Any] = [
                maybe_convert_block_hash(request.block_hashes[i])
                for i in range(first, last + 1, per_block)
            ]
            before = first - per_block
            self._told.add(key, (group.number, hashes))
            self._pending.append(
                BlockStored(
                    block_hashes=hashes,
                    parent_block_hash=(
                        maybe_convert_block_hash(request.block_hashes[before])
                        if before >= 0
                        else None
                    ),
                    token_ids=list(
                        request.all_token_ids[chunk * group.tokens : (chunk + 1) * group.tokens]
                    ),
                    block_size=group.block_tokens,
                    lora_id=lora.adapter_id if lora else None,
                    medium=MEDIUM_CPU,
                    lora_name=lora.name if lora else None,
                    group_idx=group.number,
                )
            )
        for key in self._told.excess():
            self._removed(key)

    def check(self, reader: ArenaReader) -> None:
        """Look some chunks up again, if it is time."""
        now = time.monotonic()
        if not self._told or now < self._checked_at + CHECK_SECONDS:
            return
        self._checked_at = now
        keys = [key for key, _ in self._told.turn(CHECKED)]
        found = reader.lookup(key_array(keys)).found.tolist()
        for key, here in zip(keys, found, strict=True):
            if not here:
                self._removed(key)

    def cleared(self) -> None:
        """Nothing is in the arena any more."""
        for key in list(self._told):
            self._removed(key)

    def take(self) -> list[KVCacheEvent]:
        """Events since the last call."""
        events, self._pending = self._pending, []
        return events

    def _removed(self, key: bytes) -> None:
        from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved

        told = self._told.pop(key)
        if told is not None:
            group, hashes = told
            self._pending.append(
                BlockRemoved(block_hashes=hashes, medium=MEDIUM_CPU, group_idx=group)
            )
