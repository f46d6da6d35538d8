"""Chunks on a local disk: they survive eviction, restarts and reboots.

What a shard does with this package:

    tier = await DiskTier.open(directory, capacity, make_policy=lambda: make_policy("lru"))
    if not (await tier.lookup(keys, within)).all(): ...
    async with contextlib.aclosing(tier.fetch(Fetch(keys, slots, within))) as outcomes: ...
    stored = await tier.store([TierChunk(key, space, slot_bytes, intact)])

    (../format.py, ../cipher.py: what a chunk's file is called and holds; encryption at rest)
    medium.py       what is needed of an operating system: the seam for simulations
    local.py        the disks of this machine
    folder.py       the tier's folder: whose it is, what is in it, whether it works
    files.py        chunks between files and slots: verification, publication
    index.py        what is there, within the budget; pure
    mount.py        files and index, kept in step; recovery
    health.py       whether the disk can be used; pure
    workers.py      functions in threads
    reads.py        one fetch
    writes.py       what changes the disk: chunks stored, erased, cleared
    tier.py         DiskTier
"""

from lmkv_ray.tiers.counters import DiskCounters
from lmkv_ray.tiers.disk.tier import DiskTier

__all__ = ["DiskCounters", "DiskTier"]
