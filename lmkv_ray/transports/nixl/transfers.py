"""READs under way, of one agent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]
Then = Callable[[bool], None]


@dataclass(frozen=True, eq=False)
class _Transfer:
    agent: str
    handle: Any
    then: Then
    failed: Callable[[str], None]


class Transfers:
    """Posts READs and asks for their state until they have ended.

    Args:
        agent: ours. Only the thread that calls us uses it: it is not thread-safe.
        lost: the exception by which NIXL says that a peer is gone.
    """

    def __init__(self, agent: Any, lost: type[Exception]) -> None:
        self._agent = agent
        self._lost = lost
        self._under_way: list[_Transfer] = []
        self._gone: set[str] = set()
        """Agents to be removed."""

    def __len__(self) -> int:
        return len(self._under_way)

    def post(
        self,
        agent: str,
        here: Numbers,
        there: Numbers,
        then: Then,
        failed: Callable[[str], None],
    ) -> None:
        """Begin to read; it may have ended already when this returns.

        Args:
            agent: the peer's.
            here: uint64[n, 3]: address, bytes, 0.
            there: the same of the peer.
            then: called when all has arrived, with whether that was at once: then this thread has
                copied it, and no network.
            failed: called when it did not, and nothing arrives any more, with the reason.
        """
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(here, "DRAM"),
                self._agent.get_xfer_descs(there, "DRAM"),
                agent,
            )
        except Exception as error:
            # Nothing was posted. A wrong descriptor, or an agent that is not known (any more).
            failed(f"{type(error).__name__} {error}")
            return
        self._look_at(_Transfer(agent, handle, then, failed), self._agent.transfer, at_once=True)

    def look(self) -> bool:
        """Ask for the state of all; whether one has ended."""
        before = [*self._under_way]
        for transfer in before:
            if transfer in self._under_way:  # not lost with another one
                self._under_way.remove(transfer)
                self._look_at(transfer, self._agent.check_xfer_state)
        if self._gone:
            self._remove()
        return not set(before) <= set(self._under_way)

    def forget(self, agent: str) -> None:
        """A peer is gone. What NIXL still reads from it (it may hang) has to end first: without the
        agent there would be no way to tell when it has.
        """
        self._gone.add(agent)
        self._remove()

    def _remove(self) -> None:
        busy = {transfer.agent for transfer in self._under_way}
        for agent in self._gone - busy:
            with contextlib.suppress(Exception):  # it is not known
                self._agent.remove_remote_agent(agent)
        self._gone &= busy

    def _look_at(
        self, transfer: _Transfer, state: Callable[[Any], str], *, at_once: bool = False
    ) -> None:
        try:
            if state(transfer.handle) == "PROC":
                self._under_way.append(transfer)
                return
        except self._lost as error:
            # UCX has closed the connection by force: nothing arrives any more. Any other error may
            # leave a part of the transfer under way, so it ends this process.
            lost = [transfer, *(t for t in self._under_way if t.agent == transfer.agent)]
            self._under_way = [t for t in self._under_way if t.agent != transfer.agent]
            for transfer in lost:
                with contextlib.suppress(Exception):
                    transfer.handle.release()
            self.forget(transfer.agent)
            for transfer in lost:
                transfer.failed(f"the peer is gone: {error}")
            return
        transfer.handle.release()
        transfer.then(at_once)


def descriptors(rows: Numbers, extent_here: int, extent_there: int) -> tuple[Numbers, Numbers]:
    """Descriptors (offset, bytes, 0), here and there, of rows; neighbours are one descriptor.

    Rows are neighbours if each begins where the one before it ends, here and there, and both are in
    one extent (which is one registered region), here and there.

    Args:
        rows: uint64[n, ROW].
        extent_here: bytes of an extent.
        extent_there: the same of the peer.
    """
    here, there, nbytes = rows[:, 0], rows[:, 1], rows[:, 2]
    follows = (here[1:] == here[:-1] + nbytes[:-1]) & (there[1:] == there[:-1] + nbytes[:-1])
    for offsets, extent in ((here, extent_here), (there, extent_there)):
        numbers = offsets // np.uint64(extent)
        follows &= numbers[1:] == numbers[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    sizes = np.add.reduceat(nbytes, starts)
    zeros = np.zeros(len(starts), np.uint64)
    return (
        np.stack([here[starts], sizes, zeros], axis=1),
        np.stack([there[starts], sizes, zeros], axis=1),
    )
