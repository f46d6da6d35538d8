"""Moving chunks from the shard of another node into slots of our own arena.

What a shard actor does with this package:

    # As the peer that is read from: answer ``read`` calls.
    chunks = ChunkReader(ArenaReader.attach(writer.path))
    async def read(self, keys: bytes) -> Batch:
        return await asyncio.to_thread(chunks.read, key_array(keys))

    # As the one that fetches: know your peers, choose, fetch into reserved slots.
    peer = PeerInfo(node_id, host, arena_path, arena_id, read=lambda keys: handle.read.remote(keys))
    known = all_transports(writer, Helper(writer, clock), clock)
    transports = Transports(known, settings.transport, clock)
    fetch = Fetch(keys, [writer.payload(slot) for slot in slots], within=seconds)
    async with contextlib.aclosing(transports.choose(peer).fetch(peer, fetch)) as outcomes:
        async for outcome in outcomes:
            if outcome.ok:
                ...  # publish slots[outcome.position] (outcome.nbytes, outcome.checksum) at once
            else:
                ...  # free the slot, count outcome.failure

``lmkv_ray.host.host_id()`` is what a shard tells others as its ``host``. What a fetch promises:
``Transport``.
"""

from lmkv_ray.transports.base import Capabilities, PeerInfo, Transport
from lmkv_ray.transports.chunk_reader import Batch, ChunkReader
from lmkv_ray.transports.nixl import Helper, NixlSource, NixlTransport
from lmkv_ray.transports.object_store import ObjectStoreTransport
from lmkv_ray.transports.select import Transports, all_transports
from lmkv_ray.transports.shared_memory import SharedMemoryTransport

__all__ = [
    "Batch",
    "Capabilities",
    "ChunkReader",
    "Helper",
    "NixlSource",
    "NixlTransport",
    "ObjectStoreTransport",
    "PeerInfo",
    "SharedMemoryTransport",
    "Transport",
    "Transports",
    "all_transports",
]
