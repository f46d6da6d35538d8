"""Clearing a disk: what was cleared is not found from then on, and its files are erased.

A clear has been carried out when no file of it is left, not even one that was being written. Only
then its number is noted in the directory, so that whoever comes after us need not repeat it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from lmkv_ray.tiers.clears import PendingClears
from lmkv_ray.tiers.disk.index import Entry
from lmkv_ray.tiers.disk.mount import Mount
from lmkv_ray.tiers.disk.workers import Workers


class Clearing:
    """The clears of one tier.

    Args:
        workers: who write.
        erase: removes the files of forgotten entries; what it cannot remove makes the files
            ``littered``, until a new mount has removed it.
        failed: told what the medium said.
    """

    def __init__(
        self,
        workers: Workers,
        erase: Callable[[Mount, Sequence[Entry]], Awaitable[bool]],
        failed: Callable[[Exception], None],
    ) -> None:
        self.pending = PendingClears()
        self._workers = workers
        self._erase = erase
        self._failed = failed
        self._going: list[Entry] = []
        self._cleared = 0

    def hide(self, mount: Mount, *, new: bool = False) -> None:
        """Let nobody find what is to be cleared.

        Args:
            mount: where.
            new: it was just opened, and what had been forgotten was erased.
        """
        if new:
            self._going = []
            if mount.cleared < self._cleared:  # of another time: who knows what it missed
                self.pending.add(None, self._cleared)
        self._cleared = max(self._cleared, mount.cleared)
        for space, clear in self.pending.items():
            if 0 < clear.number <= mount.cleared:  # by our predecessor
                self.pending.done(space, clear)
                continue
            forgotten = map(mount.index.forget, mount.index.keys(space))
            self._going += [entry for entry in forgotten if entry]

    async def carry_out(self, mount: Mount, writing: set[asyncio.Task[Any]]) -> bool:
        """Erase what is hidden, and note it; False if the medium is in the way.

        Args:
            mount: where.
            writing: what began before; who writes a forgotten chunk erases it.
        """
        clears, going, self._going = self.pending.items(), self._going, []
        if writing:
            await asyncio.wait(writing)
        if not await self._erase(mount, going) or mount.files.littered:
            return False
        number = max([mount.cleared, *(clear.number for _, clear in clears)])
        if number > mount.cleared:
            problem = await self._workers.run(partial(mount.files.folder.note_cleared, number))
            if problem is not None:
                self._failed(problem)
                return False
            mount.cleared = self._cleared = number
        for space, clear in clears:
            self.pending.done(space, clear)
        return True
