"""Moving chunks from the shard of another node into slots of our own arena.

What a shard does with this package:

    # As the peer that is read from: tell how, and answer readers.
    servers = Servers(all_servers(reader, writer, Helper(writer, clock), clock))
    offers = servers.offers(host_of_the_reader)
    answer = await servers.answer(name_of_a_transport, question)

    # As the one that fetches: know the peer, choose, fetch into reserved slots.
    peer = PeerInfo(node_id, host, arena_id, offers, ask=lambda *asked: handle.serve.remote(*asked))
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
CONTRIBUTING.md says how to add a transport.
"""

from lmkv_ray.transports.base import Answer, Capabilities, PeerInfo, Server, Transport
from lmkv_ray.transports.chunk_reader import ChunkBatch, ChunkReader
from lmkv_ray.transports.nixl import Helper, NixlServer, NixlTransport
from lmkv_ray.transports.object_store import ObjectStoreServer, ObjectStoreTransport
from lmkv_ray.transports.select import Transports, all_servers, all_transports
from lmkv_ray.transports.servers import Servers
from lmkv_ray.transports.shared_memory import SharedMemoryServer, SharedMemoryTransport

__all__ = [
    "Answer",
    "Capabilities",
    "ChunkBatch",
    "ChunkReader",
    "Helper",
    "NixlServer",
    "NixlTransport",
    "ObjectStoreServer",
    "ObjectStoreTransport",
    "PeerInfo",
    "Server",
    "Servers",
    "SharedMemoryServer",
    "SharedMemoryTransport",
    "Transport",
    "Transports",
    "all_servers",
    "all_transports",
]
