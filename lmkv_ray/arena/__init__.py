"""The shared memory of one node: ``format`` says what its bytes mean.

writer = ArenaWriter.find_and_adopt(node) or ArenaWriter.create(node, capacity)   # the shard
slots = writer.assign_extent(0, writer.geometry.slot_size(chunk_bytes))
writer.reserve(slots[:8], owner)            # the owner fills reader.payload(slot, nbytes)
writer.publish(slots[:8], keys, chunk_bytes, space)

reader = ArenaReader.attach(writer.path, writer.arena_id)                         # any process
hits = reader.lookup(keys)
copy = reader.data[hits.offsets[0] : hits.offsets[0] + hits.nbytes[0]].copy()
intact = reader.unchanged(hits.slots, hits.generations)                           # after it
"""

from lmkv_ray.arena.discovery import find_arena
from lmkv_ray.arena.format import SLOT, Geometry, Header, SlotState, checksum
from lmkv_ray.arena.owners import is_alive, process, this_process
from lmkv_ray.arena.reader import ArenaReader, Hits, Summed
from lmkv_ray.arena.recovery import ArenaContent
from lmkv_ray.arena.writer import ArenaHeldError, ArenaWriter

__all__ = [
    "SLOT",
    "ArenaContent",
    "ArenaHeldError",
    "ArenaReader",
    "ArenaWriter",
    "Geometry",
    "Header",
    "Hits",
    "SlotState",
    "Summed",
    "checksum",
    "find_arena",
    "is_alive",
    "process",
    "this_process",
]
