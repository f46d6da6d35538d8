"""The arena that a shard starts with: its predecessor's, or a new one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lmkv_ray.arena import ArenaHeldError, ArenaWriter
from lmkv_ray.arena.capacity import capacity_for
from lmkv_ray.arena.machine import machine_limits
from lmkv_ray.clock import Clock
from lmkv_ray.config import Settings

logger = logging.getLogger(__name__)

ADOPT_SECONDS = 2.0
"""How long a restarted shard waits for its predecessor's process to let go of the arena."""
UNMAP_SECONDS = 1.0
"""And so much more a GiB of its arena, once that process is ending: 0.3 s were seen."""
PAUSE_SECONDS = 0.1


async def open_arena(
    settings: Settings,
    name: str,
    clock: Clock,
    *,
    restarted: bool,
    ray: int | None = None,
    object_store: int = 0,
    say: Callable[[str], None] = logger.info,
) -> ArenaWriter:
    """The predecessor's arena if an engine still maps it, else a new one.

    Args:
        settings: those of this node.
        name: name of the arena.
        clock: the machine's.
        restarted: the predecessor may still be ending.
        ray: memory that Ray counts on this node, in bytes.
        object_store: what Ray's object store may take of /dev/shm, in bytes.
        say: is told once what was taken, and why.

    Raises:
        ArenaError: there is none and none can be made.
    """
    directory = settings.arena_dir
    wanted = int(settings.capacity) if settings.capacity is not None else None
    began, patience = clock.monotonic(), ADOPT_SECONDS if restarted else 0
    waits = False
    while True:
        writer = None
        try:
            writer = await asyncio.to_thread(
                ArenaWriter.find_and_adopt, name, wanted, directory=directory
            )
        except ArenaHeldError as held:
            patience = ADOPT_SECONDS + held.nbytes / 2**30 * UNMAP_SECONDS
            if not waits:
                waits = True
                logger.info("lmkv_ray: waits up to %.0f s to adopt: %s", patience, held)
        if writer is not None:
            say(f"keeps the {writer.geometry.capacity >> 20} MiB of the shard before it")
            return writer
        if clock.monotonic() >= began + patience:
            break
        await clock.sleep(PAUSE_SECONDS)

    def create() -> tuple[ArenaWriter, str]:
        limits = machine_limits(directory, ray=ray, object_store=object_store)
        capacity = capacity_for(limits, wanted)
        return ArenaWriter.create(name, capacity.nbytes, directory=directory), capacity.why

    made, why = await asyncio.to_thread(create)
    say(why)
    return made
