"""What a node needs of the machine that it runs on: time, processes, memory, disks, a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lmkv_ray.arena import ArenaReader, ArenaWriter, is_alive, this_process
from lmkv_ray.arena.names import arena_name
from lmkv_ray.clock import SYSTEM_CLOCK, Clock
from lmkv_ray.config import Settings
from lmkv_ray.host import host_id
from lmkv_ray.messages import Owner
from lmkv_ray.node.arena import open_arena
from lmkv_ray.node.tiers import open_tiers
from lmkv_ray.status import TierStatus
from lmkv_ray.tiers import Tier
from lmkv_ray.transports import Helper, Server, Transport, all_servers, all_transports


class Machine(Protocol):
    """The seam between a node and its machine. The simulation has one of its own."""

    @property
    def clock(self) -> Clock:
        """Time and chance."""
        ...

    @property
    def host(self) -> str:
        """Equal for two shards exactly if they can map each other's arenas."""
        ...

    @property
    def process(self) -> Owner:
        """The process of the shard, which reserves slots for what it stages."""
        ...

    def is_alive(self, process: Owner) -> bool:
        """Whether a process of this machine may still write; True if that cannot be known."""
        ...

    async def open_arena(self, settings: Settings, say: Callable[[str], None]) -> ArenaWriter:
        """The memory of this node; ``say`` is told what was taken, and why.

        Raises:
            ArenaError: there is none.
        """
        ...

    async def open_tiers(self, settings: Settings) -> tuple[list[Tier], list[TierStatus]]:
        """The tiers that are configured, the quickest first, and those that were refused."""
        ...

    def transports(self, arena: ArenaWriter) -> list[Transport]:
        """The ways to fetch chunks into an arena, the best first."""
        ...

    def servers(self, reader: ArenaReader, arena: ArenaWriter) -> list[Server]:
        """The other ends of these transports, from which other nodes read."""
        ...


@dataclass(frozen=True)
class ThisMachine:
    """The machine that this process runs on. See ``Machine``.

    Args:
        node_id: the Ray node of this process.
        restarted: a predecessor of this shard may still be ending.
        ray_memory: memory that Ray counts on this node, in bytes; None if that is not known.
        object_store: what Ray's object store may take of /dev/shm, in bytes.
    """

    node_id: str
    restarted: bool
    ray_memory: int | None = None
    object_store: int = 0
    clock: Clock = SYSTEM_CLOCK

    @property
    def host(self) -> str:
        """See ``Machine``."""
        return host_id()

    @property
    def process(self) -> Owner:
        """See ``Machine``."""
        return this_process()

    def is_alive(self, process: Owner) -> bool:
        """See ``Machine``."""
        return is_alive(process)

    async def open_arena(self, settings: Settings, say: Callable[[str], None]) -> ArenaWriter:
        """See ``Machine``."""
        return await open_arena(
            settings,
            arena_name(settings.ray_namespace, self.node_id),
            self.clock,
            restarted=self.restarted,
            ray=self.ray_memory,
            object_store=self.object_store,
            say=say,
        )

    async def open_tiers(self, settings: Settings) -> tuple[list[Tier], list[TierStatus]]:
        """See ``Machine``."""
        return await open_tiers(settings, self.clock)

    def transports(self, arena: ArenaWriter) -> list[Transport]:
        """See ``Machine``."""
        return all_transports(arena, Helper(arena, self.clock), self.clock)

    def servers(self, reader: ArenaReader, arena: ArenaWriter) -> list[Server]:
        """See ``Machine``."""
        return all_servers(reader, arena, Helper(arena, self.clock), self.clock)
