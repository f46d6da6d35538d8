"""Chunks on a local disk: they survive eviction, restarts and reboots.

What a shard does with this package:

    tier = await DiskTier.open(directory, capacity, make_policy=lambda: make_policy("lru"))
    if not (await tier.lookup(keys, within)).all(): ...
    async with contextlib.aclosing(tier.fetch(Fetch(keys, slots, within))) as outcomes: ...
    stored = await tier.store([TierChunk(key, space, slot_bytes, intact)])

    (../format.py, ../cipher.py: what a chunk's file is called and holds; encryption at rest)
    directory.py    the tier's directory: lock, scan, probe
    files.py        chunks between files and slots: O_DIRECT, verification, publication
    index.py        what is there, within the budget; pure
    mount.py        files and index, kept in step; recovery
    health.py       whether the disk can be used; pure
    workers.py      threads
    counters.py     what is counted
    reading.py      one fetch
    writing.py      what is being stored
    clearing.py     what was cleared
    mending.py      trouble, and the way out of it
    tier.py         DiskTier
"""

from lmkv_ray.tiers.disk.counters import DiskCounters
from lmkv_ray.tiers.disk.tier import DiskTier

__all__ = ["DiskCounters", "DiskTier"]
