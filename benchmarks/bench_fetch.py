"""Fetches of 1 to 256 chunks between two Ray nodes of this machine, against the raw transport.

The floor of NIXL is a READ of the same bytes by an agent of our own, one descriptor a chunk, and
nothing verified: where the bytes are is known to it, and the peer's process has just been told to
attend to it. The floor of the object store is a ``ray.get`` of an array of the same bytes that the
same actor returns: no lookup, no slots, nothing verified. Floor and fetch take turns; medians. Read
the ratios on a machine that has nothing else to do: a fetch is a relay of several processes.

    python -m benchmarks.bench_fetch             what UCX chooses (on one machine: shared memory)
    UCX_TLS=tcp python -m benchmarks.bench_fetch    as between hosts without RDMA

Writes build/fetch-all.json or build/fetch-tcp.json.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.table import Row, show, write
from lmkv_ray.arena import ArenaReader, ArenaWriter, this_process
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.fetch import Fetch
from lmkv_ray.host import host_id
from lmkv_ray.messages import decode, encode
from lmkv_ray.orders import Offer
from lmkv_ray.transports import (
    Answer,
    Helper,
    NixlTransport,
    ObjectStoreTransport,
    PeerInfo,
    Servers,
    Transport,
    all_servers,
)
from lmkv_ray.transports.nixl import Locate, Located
from lmkv_ray.transports.nixl.process import load_nixl

BATCHES = {1: (1, 4, 16, 64, 256), 8: (1, 4, 16, 32)}
"""Chunks fetched together, by their size in MiB: 1 is SmolLM2's, 8 a small model's on a GPU."""
ROUNDS = 9
SECONDS = 60.0
GOALS = {"nixl": 0.85, "object_store": 0.8}


def some_keys(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The keys of the chunks there are."""
    return np.random.default_rng(0).integers(0, 1 << 63, (count, 2), dtype=np.uint64)


class Slots:
    """An arena with a slot for each chunk."""

    def __init__(self, name: str, count: int, chunk: int) -> None:
        self.writer = ArenaWriter.create(name, count * chunk, extent_bytes=64 << 20)
        extents = range(-(-count * chunk // (64 << 20)))
        slots = [self.writer.assign_extent(extent, chunk) for extent in extents]
        self.slots = np.concatenate(slots)[:count]
        self.views = [self.writer.payload(slot) for slot in self.slots.tolist()]
        for view in self.views:
            view[:] = 1  # every page is there


class Peer:
    """What a shard actor does for its peers."""

    def __init__(self, count: int, chunk: int) -> None:
        self._chunk = chunk
        self._here = Slots("peer", count, chunk)
        writer, slots = self._here.writer, self._here.slots
        noise = np.random.default_rng(1)
        for view in self._here.views:
            view[:] = noise.integers(0, 256, chunk, np.uint8)
        writer.reserve(slots, this_process())
        writer.publish(slots, some_keys(count), chunk, 1)
        reader = ArenaReader.attach(writer.path)
        helper = Helper(writer, SYSTEM_CLOCK)
        self._servers = Servers(all_servers(reader, writer, helper, SYSTEM_CLOCK))
        self._raw = np.concatenate(self._here.views)

    async def describe(self) -> tuple[str, int, dict[str, Offer]]:
        """What a ``PeerInfo`` says."""
        return host_id(), self._here.writer.arena_id, self._servers.offers(host_id())

    async def serve(self, transport: str, question: bytes) -> Answer:
        """See ``Servers.answer``."""
        return await self._servers.answer(transport, question)

    async def raw(self, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of some chunks."""
        return self._raw[: count * self._chunk]


class RawReader:
    """READs without lmkv_ray: the same bytes, from the same registered memory."""

    def __init__(self, located: Located, count: int, chunk: int) -> None:
        self._chunk = chunk
        api = load_nixl()
        # NIXL's own progress thread would take the second of two processors from the peer.
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = api.nixl_agent("raw", config)
        self._memory = np.frombuffer(mmap.mmap(-1, count * chunk), np.uint8)
        self._memory[:] = 1
        self._agent.register_memory(
            [(self._memory.ctypes.data, self._memory.nbytes, 0, "")], "DRAM"
        )
        self._peer = self._agent.add_remote_agent(located.metadata).decode()
        self._there = np.frombuffer(located.offsets, np.uint64) + np.uint64(located.data.address)

    def read(self, count: int) -> None:
        """Read the first chunks."""
        rows = np.zeros((2, count, 3), np.uint64)
        rows[:, :, 1] = self._chunk
        rows[0, :, 0] = self._memory.ctypes.data + np.arange(count) * self._chunk
        rows[1, :, 0] = self._there[:count]
        here, there = (self._agent.get_xfer_descs(side, "DRAM") for side in rows)
        handle = self._agent.initialize_xfer("READ", here, there, self._peer)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        handle.release()


def run(batches: Mapping[int, Sequence[int]] = BATCHES, rounds: int = ROUNDS) -> list[Row]:
    """Rows in GB/s; floor: the raw transport."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 1 << 30}
    )
    other = cluster.add_node(num_cpus=1, object_store_memory=1 << 30)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        where = NodeAffinitySchedulingStrategy(other.node_id, soft=False)
        actor_class: Any = ray.remote(Peer)
        actor = actor_class.options(num_cpus=0, max_concurrency=16, scheduling_strategy=where)
        rows = []
        for mib, counts in batches.items():
            peer = actor.remote(max(counts), mib << 20)
            rows += asyncio.run(_compare(peer, counts, mib << 20, rounds))
            ray.kill(peer)
        return rows
    finally:
        ray.shutdown()
        cluster.shutdown()


async def _compare(actor: Any, batches: Sequence[int], chunk: int, rounds: int) -> list[Row]:
    count = max(batches)
    here, keys = Slots("here", count, chunk), some_keys(count)
    helper = Helper(here.writer, SYSTEM_CLOCK)
    host, arena_id, offers = await actor.describe.remote()
    peer = PeerInfo("peer", host, arena_id, offers, lambda *asked: actor.serve.remote(*asked))

    async def locate(keys: bytes) -> bytes:
        question = encode(Locate(keys=keys, known=""))
        answer: bytes = await actor.serve.remote(NixlTransport.name, question)
        return answer

    async def fetch(transport: Transport, n: int) -> None:
        wish = Fetch(keys[:n], here.views[:n], SECONDS)
        async with aclosing(transport.fetch(peer, wish)) as outcomes:
            bad = [outcome async for outcome in outcomes if not outcome.ok]
        assert not bad, bad[0]

    nixl, store = (
        NixlTransport(here.writer, helper, SYSTEM_CLOCK),
        ObjectStoreTransport(SYSTEM_CLOCK),
    )
    await fetch(nixl, count)  # starts and connects everything, and all checksums are noted
    raw = RawReader(decode(await locate(keys.tobytes()), Located), count, chunk)

    async def get(n: int) -> None:
        assert len(await actor.raw.remote(n)) == n * chunk

    async def read(n: int) -> None:
        raw.read(n)  # nothing else waits for the event loop

    async def wake(_: int) -> None:
        await locate(b"")

    rows = []
    pairs: list[tuple[Transport, Callable[[int], Any], Callable[[int], Any]]]
    pairs = [(nixl, wake, read), (store, get, get)]
    for transport, prepare, floor in pairs:
        for n in batches:
            fetched, floors = [], []
            for _ in range(rounds + 1):
                await prepare(n)
                floors.append(await _seconds(floor(n)))
                fetched.append(await _seconds(fetch(transport, n)))
            # The first round warms up.
            ours, least = (statistics.median(times[1:]) for times in (fetched, floors))
            rate = n * chunk / 1e9
            name = f"fetch of {n} chunks of {chunk >> 20} MiB by {transport.name}"
            rows.append(Row(name, rate / ours, "GB/s", rate / least, least / ours))
    await helper.close()
    return rows


async def _seconds(work: Any) -> float:
    begin = time.perf_counter()
    await work
    return time.perf_counter() - begin


if __name__ == "__main__":
    networks = os.environ.get("UCX_TLS", "all")
    print(f"UCX_TLS={networks}; goals {GOALS}")
    rows = run()
    show(rows)
    write(rows, Path(f"build/fetch-{networks}.json"))
