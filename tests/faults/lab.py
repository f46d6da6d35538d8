"""Hosts with Ray, a cache, and engines on them: what faults are tried on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from lmkv_ray.actors import CacheStatus
from lmkv_ray.errors import ConnectError
from serve_apps.model import CHECKOUT
from tests.faults.standin import Answer
from tests.hosts import Host, Hosts, Remote, ray_cluster

CHUNK_BYTES = 512 << 10
CAPACITY = 128 << 20
STAGE_SECONDS = 3.0
SLACK_SECONDS = 3.0
"""What a request may take beyond its deadline, on a machine that is busy with other things."""
RUN_UP_SECONDS = 180.0
PAUSE_SECONDS = 0.2
"""Between two looks; each look at the cache's health saves a chunk on each node."""

ARENAS = "find /proc/[0-9]*/fd -lname '/dev/shm/lmkv-*' -printf '%l\\n' 2>/dev/null | sort -u"
"""The arenas that any process of a host holds."""

NODE_ENV = {
    # Ray forgets a silent node after about 12 s, instead of a minute, so that tests need not wait;
    # not sooner, or it would give a node up after a cut of 3 s and TCP's own pause after that.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # A clock that can be turned.
    "PYTHONPATH": f"{CHECKOUT}/tests/faults/clock:{CHECKOUT}",
}


class Lab:
    """Some hosts in one Ray cluster, each with a stand-in engine.

    Args:
        count: hosts; the first is Ray's head.
        settings: of the cache, on top of the usual ones.
        env: of Ray, on top of the usual one.
    """

    def __init__(
        self, count: int = 2, *, shm: str = "1g", env: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self.hosts = Hosts(count, shm=shm)
        self.env = NODE_ENV | (env or {})
        self.engines: list[Remote] = []
        self._documents = 0
        self._frozen: list[tuple[Host, int]] = []
        try:
            head, *others = self.hosts
            ray_cluster.start_head(head, **self.env)
            self.settings: dict[str, Any] = {
                "ray_address": ray_cluster.address(head),
                "capacity": CAPACITY,
                "stage_seconds": STAGE_SECONDS,
                "reconcile_seconds": 0.5,
                **settings,
            }
            for host in others:
                ray_cluster.join(host, head, **self.env)
            self.engines = [self.start_engine(host) for host in self.hosts]
            for engine in self.engines:
                engine.wait_made()
            self.wait_healthy(RUN_UP_SECONDS)
        except BaseException:
            self.close()
            raise

    def start_engine(self, host: Host) -> Remote:
        """A stand-in on a host."""
        return host.remote("tests.faults.standin:StandIn", self.settings, CHUNK_BYTES)

    def rejoin(self, number: int) -> None:
        """Start a host's Ray anew, as whatever watches it would, and an engine on it."""
        host = self.hosts[number]
        ray_cluster.stop(host)
        ray_cluster.join(host, self.hosts[0], **self.env)
        self.engines[number].close()
        self.engines[number] = self.start_engine(host).wait_made()

    def nodes(self) -> int:
        """Nodes that the cache has a working shard on; 0 while the directory cannot say."""
        try:
            return len(self.status().nodes)
        except ConnectError:  # it was on a node that died, and starts on another one
            return 0

    def new_document(self) -> int:
        """The number of a document that nobody has seen."""
        self._documents += 1
        return self._documents

    def ask(self, engine: int, number: int, chunks: int = 8) -> Answer:
        """A request, and what must be true of its answer whatever happens."""
        return self.check(self.engines[engine].call("request", number, chunks))

    def check(self, answer: Answer) -> Answer:
        """Right bytes, in time."""
        assert answer.wrong == 0, f"{answer.wrong} of {answer.hits} chunks were wrong"
        allowed = self.settings["stage_seconds"] + SLACK_SECONDS
        assert answer.seconds < allowed, f"a request took {answer.seconds:.1f} s"
        return answer

    def replace_engine(self, number: int) -> None:
        """Kill an engine, if it lives, and start another in its place."""
        host, engine = self.hosts[number], self.engines[number]
        host.run(f"kill -KILL {engine.pid} || true")
        engine.close()
        self.engines[number] = self.start_engine(host).wait_made()
        self.eventually(lambda: self.engines[number].call("attached"))

    def shared(self, chunks: int = 8, by: int = 0) -> int:
        """A new document that one engine has read and the directory knows."""
        number = self.new_document()
        assert self.engines[by].call("save", number, chunks) == chunks
        self.eventually(lambda: self.engines[0].call("known", number, chunks))
        self.eventually(lambda: self.engines[1 - by].call("peers") > 0)
        return number

    def fill(self, engine: int) -> None:
        """Let an engine read so much that all it had before is evicted."""
        for _ in range(2 * CAPACITY // (16 * CHUNK_BYTES)):
            assert self.engines[engine].call("save", self.new_document(), 16) == 16

    def status(self) -> CacheStatus:
        """Of the cache."""
        status: CacheStatus = self.engines[0].call("status")
        return status

    def wait_healthy(self, within: float) -> float:
        """Until what one engine has read is a hit on each other, both ways; returns seconds."""
        began = time.monotonic()
        self.eventually(self._is_healthy, within)
        return time.monotonic() - began

    def actor_pid(self, host: Host, kind: str) -> int:
        """The process of a host's shard or directory ("ShardActor", "DirectoryActor"); 0: none."""
        found = host.pids(f"^ray::{kind}")
        return found[0] if found else 0

    def directory(self) -> tuple[Host, int]:
        """Where the directory runs, and its process there; waits for it."""
        self.eventually(lambda: bool(self._directories()))
        return self._directories()[0]

    def freeze(self, host: Host, pid: int) -> Callable[[], None]:
        """Stop a process; returns what lets it go on (as ``heal`` does)."""
        host.kill(pid, signal.SIGSTOP)
        frozen = host, pid
        self._frozen.append(frozen)

        def resume() -> None:
            if frozen in self._frozen:
                self._frozen.remove(frozen)
                host.run(f"kill -CONT {pid} || true")  # it may be gone by then

        return resume

    def heal(self) -> None:
        """The network is good, and nothing is frozen."""
        self.hosts.heal()
        while self._frozen:
            host, pid = self._frozen.pop()
            host.run(f"kill -CONT {pid} || true")

    def stop_in(self, engine: int, copy: str, number: int, chunks: int) -> None:
        """Begin a request whose engine stops in the middle of a "load" or "save"; wait for that."""
        self.engines[engine].start("request", number, chunks, stop_in=copy)
        host, pid = self.hosts[engine], self.engines[engine].pid
        self.eventually(lambda: host.run(f"ps -o state= -p {pid}").strip() == "T")

    def fetch_in_the_middle(self, number: int, chunks: int) -> None:
        """Begin a request of engine 1 for what engine 0 has read; no more than a quarter of it
        passes the network until it heals. Wait for that.
        """
        source, target = self.hosts
        self.hosts.switch.cut_after(source.number, target.number, chunks * CHUNK_BYTES // 4)
        self.engines[1].start("request", number, chunks)
        self.eventually(lambda: self.hosts.switch.is_cut(source.number, target.number))

    def eventually(self, condition: Callable[[], bool], within: float = 60) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"the condition was not true within {within} s"
            time.sleep(PAUSE_SECONDS)

    def left_behind(self) -> list[str]:
        """What should not be there: surplus actors and arenas, names in /dev/shm."""
        left = []
        for host in self.hosts:
            if len(shards := host.pids("^ray::ShardActor")) > 1:
                left.append(f"{host.name}: {len(shards)} shards")
            arenas = set(host.run(ARENAS).split("\n")) - {""}
            if len(arenas) > 1:
                left.append(f"{host.name}: {sorted(arenas)}")
            left += [f"{host.name}: {n}" for n in host.run("ls /dev/shm").split() if "lmkv" in n]
        if len(all_directories := self._directories()) > 1:
            left.append(f"directories: {all_directories}")
        return left

    def close(self) -> None:
        """End everything."""
        self.hosts.close()

    def _directories(self) -> list[tuple[Host, int]]:
        return [(host, pid) for host in self.hosts for pid in host.pids("^ray::DirectoryActor")]

    def _is_healthy(self) -> bool:
        for a, engine in enumerate(self.engines):
            number = self.new_document()
            if engine.call("save", number, 1) < 1:
                return False
            time.sleep(PAUSE_SECONDS)  # until the directory has heard of it
            others = [b for b in range(len(self.engines)) if b != a]
            if any(self.ask(b, number, 1).hits < 1 for b in others):
                return False
        return True
