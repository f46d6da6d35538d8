"""Bugs that the simulation must find: most are from our own history.

Each is a small change of one module, made while the module is imported:

    python -m tests.simulation --mutation worker_forgotten --seeds 0:200
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Mutation:
    """A change of a module's source.

    Args:
        name: for the command line.
        module: the module that is changed.
        before: text that stands in its source once.
        after: what stands there instead.
        what: what the change breaks.
    """

    name: str
    module: str
    before: str
    after: str
    what: str


MUTATIONS = [
    Mutation(
        "slot_freed_while_hello_is_answered",
        "lmkv_ray.vllm.link.slots",
        "told = {commit.slot for commit in self._news.commits} | {*self._news.released}",
        "told: set[int] = set()",
        "a slot that was filled while a Hello was answered counts as free again",
    ),
    Mutation(
        "worker_forgotten",
        "lmkv_ray.arena.crews",
        "return self._is_alive(owner) or any(",
        "return self._is_alive(owner) or False and any(",
        "slots of a dead engine are given away while its worker may still write",
    ),
    Mutation(
        "reservations_forgotten_at_restart",
        "lmkv_ray.shard.state",
        "elif row.owner is not None and alive(row.owner):",
        "elif row.owner is not None and not alive(row.owner):",
        "a restarted shard gives slots away that a living engine is filling",
    ),
    Mutation(
        "late_exchange_counts",
        "lmkv_ray.shard.state",
        "if holder is None or holder.attachment != exchange.attachment:",
        "if holder is None:",
        "an exchange that was sent before a Hello is carried out after it",
    ),
    Mutation(
        "clear_spares_what_is_being_filled",
        "lmkv_ray.shard.state",
        "if spoiled := self._leases.spoil(space):",
        "if spoiled := []:",
        "a chunk that was being filled during a clear is published after it",
    ),
    Mutation(
        "successor_accepts_what_a_clear_came_for",
        "lmkv_ray.shard.state",
        "deadline = SPOILED if row.spoiled else now",
        "deadline = now",
        "a restarted shard publishes what was being filled when its predecessor cleared",
    ),
    Mutation(
        "clear_forgotten_by_the_directory",
        "lmkv_ray.directory.service",
        "        self.state.clears.restore(self._kept)\n",
        "",
        "a restarted directory does not know the clears that were answered",
    ),
    Mutation(
        "taken_from_a_node_that_missed_a_clear",
        "lmkv_ray.node.node",
        " or take.cleared < self.shard.cleared",
        "",
        "a node fetches what was cleared, because the node that holds it asks for that",
    ),
    Mutation(
        "read_from_a_node_that_missed_a_clear",
        "lmkv_ray.directory.state",
        "return node.cleared >= self.clears.highest and now",
        "return now",
        "the directory names nodes that have not carried out the last clear",
    ),
    Mutation(
        "disk_not_told_of_clears",
        "lmkv_ray.node.clears",
        "await asyncio.gather(*(tier.clear(which, number) for tier in self._tiers))",
        "pass",
        "the disk keeps what was cleared in memory",
    ),
    Mutation(
        "torn_chunk_goes_to_disk",
        "lmkv_ray.node.demotion",
        "return bool(reader.unchanged(hits.slots, hits.generations)[0])",
        "return True",
        "a chunk that was replaced while it was written to disk is kept there",
    ),
    Mutation(
        "damage_not_noticed",
        "lmkv_ray.transports.object_store",
        "if checksum(destination[:nbytes]) == expected:",
        "if checksum(destination[:nbytes]):",
        "bytes that the network damaged are published",
    ),
    Mutation(
        "flight_never_lands",
        "lmkv_ray.node.staging",
        "                if self._flights.get(key) is flight:\n                    self._land(key)",
        "                pass",
        "a chunk that could not be fetched is awaited for ever",
    ),
    Mutation(
        "window_not_released",
        "lmkv_ray.node.staging",
        "        room.windows -= 1\n",
        "",
        "a fetch that ended still counts as one that has slots",
    ),
    Mutation(
        "bad_commit_leaks_its_slot",
        "lmkv_ray.shard.state",
        "                refused.append(commit.slot)\n                back.append(commit.slot)\n",
        "                refused.append(commit.slot)\n",
        "the slot of a commit that is refused is never free again",
    ),
    Mutation(
        "gap_not_noticed",
        "lmkv_ray.directory.state",
        "and delta.seq == node.seq + 1",
        "and delta.seq > node.seq",
        "the directory does not notice that a delta was lost",
    ),
    Mutation(
        "resync_not_obeyed",
        "lmkv_ray.node.reports",
        "            if reply.resync:\n                state.deltas.resync(part)\n",
        "",
        "a shard does not tell its whole content when the directory asks for it",
    ),
    Mutation(
        "changed_chunk_is_used",
        "lmkv_ray.arena.reader",
        "same: npt.NDArray[np.bool_] = self._generations[slots] == generations",
        "same: npt.NDArray[np.bool_] = self._generations[slots] > 0",
        "readers do not notice that a chunk was replaced while they copied",
    ),
    Mutation(
        "unnamed_slots_leak",
        "lmkv_ray.shard.leases",
        "        return holder, list(old)\n",
        "        return holder, []\n",
        "slots that an engine does not name in its Hello are never free again",
    ),
    Mutation(
        "lost_peer_is_believed",
        "lmkv_ray.node.sources",
        "        self._peers.forget(node_id)\n",
        "",
        "a peer that was restarted with another arena is read as if it were the old one, for ever",
    ),
]


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._mutation.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(name, found.origin, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def get_filename(self, name: str) -> str:
        spec = importlib.machinery.PathFinder.find_spec(name)
        return str(spec and spec.origin)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        with open(module.__file__) as file:  # noqa: PTH123
            source = file.read()
        exec(compile(mutated(source, self._mutation), module.__file__, "exec"), vars(module))


def mutated(source: str, mutation: Mutation) -> str:
    """The source with the change.

    Raises:
        ValueError: the text to be changed does not stand there exactly once.
    """
    if source.count(mutation.before) != 1:
        raise ValueError(f"{mutation.name}: its text is not once in {mutation.module}")
    return source.replace(mutation.before, mutation.after)


def apply(name: str) -> None:
    """Change a module; call before anything imports it."""
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.name == name)
    if mutation.module in sys.modules:
        raise ValueError(f"{mutation.module} has been imported already")
    sys.meta_path.insert(0, _Importer(mutation))
