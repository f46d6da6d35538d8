"""What a fetch by NIXL saves if the peer's index is read and its actor is not asked, over TCP.

Two hosts made of namespaces, joined by a network that delays (tests/hosts), a Ray cluster across
them. A fetch of the same chunks takes turns between three ways to know where they are:

    read   two READs: the peer's index, then the slots that it names; the actor is never asked
    ask    the peer's actor is asked (``locate``), then the slots are read
    auto   what ``Attention`` chooses

``awake``: fetch follows fetch. ``asleep``: the peer's process was left alone for some seconds.

    python -m benchmarks.bench_asking    as root; writes build/asking.json
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from benchmarks.bench_fetch import Peer, Slots, some_keys
from benchmarks.table import Row, show, write
from tests.hosts import Hosts, ray_cluster
from tests.hosts import Path as Cable

OUTPUT = Path("build/asking.json")
ROUND_TRIPS = (0.0, 0.001, 0.1)
"""Seconds that the network adds; the switch itself takes about 0.1 ms."""
BATCHES = (1, 8, 64)
CHUNK = 1 << 20
ROUNDS = 15
SLEEPY_ROUNDS = 5
SLEEP_SECONDS = 2.5
MEASURE_SECONDS = 600.0
"""That one measurement may last: TCP is slow on long lines."""
WAYS = ("read", "ask", "auto")


class Reader:
    """The fetching side: a driver of Ray on one host, a peer on the other."""

    def __init__(self, address: str, node_ip: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from lmkv_ray.clock import SYSTEM_CLOCK
        from lmkv_ray.transports import Helper, NixlTransport, PeerInfo
        from lmkv_ray.transports.nixl.attention import Attention

        class Never(Attention):
            def wants_asking(self, now: float) -> bool:
                return False

        class Always(Attention):
            def wants_asking(self, now: float) -> bool:
                return True

        ray.init(address=address, log_to_driver=False)
        node = next(n for n in ray.nodes() if n["NodeManagerAddress"] == node_ip)
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor_class: Any = ray.remote(Peer)
        options = actor_class.options(num_cpus=0, max_concurrency=16, scheduling_strategy=where)
        actor = options.remote(max(BATCHES), CHUNK)
        host, arena_id, offers = ray.get(actor.describe.remote())
        self._peer = PeerInfo(
            "peer", host, arena_id, offers, lambda *asked: actor.serve.remote(*asked)
        )
        self._here = Slots("here", max(BATCHES), CHUNK)
        self._keys = some_keys(max(BATCHES))
        self._loop = asyncio.new_event_loop()
        helper = Helper(self._here.writer, SYSTEM_CLOCK)
        self._transport = NixlTransport(self._here.writer, helper, SYSTEM_CLOCK)
        self._attention = {"read": Never(), "ask": Always(), "auto": Attention()}
        self._actor = actor

    def warm_up(self) -> None:
        """Connect, and let the peer note all checksums."""
        for _ in range(5):
            for way in WAYS:
                self.fetch(way, max(BATCHES))

    def forget(self) -> None:
        """The network is another one."""
        self._attention["auto"] = type(self._attention["auto"])()

    def fetch(self, way: str, n: int) -> tuple[float, float]:
        """Seconds to the first and to the last of some chunks."""
        self._transport._attention["peer"] = self._attention[way]
        return self._loop.run_until_complete(self._fetch(n))

    def measure(self, n: int, pause: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
        """The ways in turn."""
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                time.sleep(pause)
                taken[way].append(self.fetch(way, n))
        return taken

    def ask_seconds(self) -> float:
        """The median of an empty call of the peer's actor."""
        import ray

        taken = []
        for _ in range(15):
            began = time.perf_counter()
            ray.get(self._actor.describe.remote())
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def close(self) -> None:
        """End the driver of Ray."""
        import ray

        ray.shutdown()

    async def _fetch(self, n: int) -> tuple[float, float]:
        from lmkv_ray.fetch import Fetch

        began, first = time.perf_counter(), 0.0
        fetch = Fetch(self._keys[:n], self._here.views[:n], 60.0)
        async with aclosing(self._transport.fetch(self._peer, fetch)) as outcomes:
            async for outcome in outcomes:
                assert outcome.ok, outcome
                first = first or time.perf_counter() - began
        return first, time.perf_counter() - began


def run() -> list[Row]:
    """Milliseconds to the last chunk; floor: the same by asking."""
    rows = []
    env = {"UCX_TLS": "tcp"}
    with Hosts(2, shm="1g") as hosts:
        here, there = hosts
        ray_cluster.start_head(here, **env)
        ray_cluster.join(there, here, **env)
        address = ray_cluster.address(here)
        reader = here.remote("benchmarks.bench_asking:Reader", address, there.ip)
        reader.wait_made()
        reader.call("warm_up")
        for round_trip in ROUND_TRIPS:
            hosts.degrade(Cable(delay=round_trip / 2))
            reader.call("forget")
            reader.call("warm_up")
            asked = reader.call("ask_seconds")
            print(f"+{1e3 * round_trip:g} ms: a call of the actor takes {1e3 * asked:.1f} ms")
            for state, pause, rounds in (
                ("awake", 0.0, ROUNDS),
                ("asleep", SLEEP_SECONDS, SLEEPY_ROUNDS),
            ):
                for n in BATCHES if not pause else BATCHES[:2]:
                    reader.start("measure", n, pause, rounds)
                    taken = reader.result(timeout=MEASURE_SECONDS)
                    last = {way: 1e3 * statistics.median(t for _, t in taken[way]) for way in WAYS}
                    for way in WAYS:
                        name = f"+{1e3 * round_trip:g} ms, {state}, {n} of 1 MiB: {way}"
                        ratio = last[way] / last["ask"]
                        rows.append(Row(name, last[way], "ms", last["ask"], ratio))
                        print(name, [round(1e3 * t, 1) for _, t in sorted(taken[way])], flush=True)
        reader.close()
    return rows


if __name__ == "__main__":
    rows = run()
    show(rows)
    write(rows, OUTPUT)
    print(f"Written to {OUTPUT}.")
