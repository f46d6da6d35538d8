"""One-sided READs between nodes, by NIXL (RDMA, TCP or whatever UCX finds).

The agent lives in a process of its own, one that serves reads of our arena and one that reads from
peers, each started when it is first needed (half a second, 60 MiB) and ended with us. Because:

* Where UCX has no hardware to read with (TCP), it emulates READs, and then a reader that dies in
  the middle can take the process it reads from with it (seen with UCX 1.21: SIGABRT and SIGSEGV
  within a few tries). Only a process that holds nothing may be exposed to that.
* A READ cannot be taken back: after ``release`` and ``remove_remote_agent`` the bytes of a frozen
  peer still arrived when it woke up (seen over TCP). The end of the reading process is a fence that
  holds for every kind of network.
* The calls block for as long as some transfers take, and some of them keep the GIL.

    transport   ``NixlTransport``: the peer's actor is asked where chunks are, then they are read
    peer_chunks   what is known of chunks of the peer
    server      ``NixlServer``: the answer of the peer's shard (``Locate``)
    helper      the process, as its parent sees it
    process     the program it runs: it alone knows NIXL, with
    reads         READs of known offsets, and verifying what has arrived
    transfers     READs under way
    regions       what is registered
    wire        what the two say to each other

Targets are slots of the arena, in DRAM. GPU memory as a target needs no other protocol: a row of
``Read`` would name a region of VRAM that the process has opened (CUDA IPC) and registered.
"""

from lmkv_ray.transports.nixl.helper import Helper
from lmkv_ray.transports.nixl.server import Locate, Located, NixlServer
from lmkv_ray.transports.nixl.transport import NixlTransport

__all__ = ["Helper", "Locate", "Located", "NixlServer", "NixlTransport"]
