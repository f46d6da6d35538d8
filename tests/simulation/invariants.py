"""What must hold at every moment, and some seconds after the last fault."""

from __future__ import annotations

from collections import Counter

import numpy as np
from xxhash import xxh3_64_intdigest

from lmkv_ray.directory import DirectoryState
from lmkv_ray.directory.table import NO_NODE
from lmkv_ray.keys import key_array, key_list, parts_of
from lmkv_ray.node import Node
from lmkv_ray.shard import ShardState
from tests.simulation.cluster import Cluster
from tests.simulation.content import CHUNK_BYTES
from tests.simulation.story import Violation

WHOLE_SECONDS = 3.0
"""So often everything is looked at, changed or not: what a fingerprint does not cover."""


class Checks:
    """What must hold whenever no callback is running.

    Services are compared with themselves when their tables have changed since they were last seen,
    and all of them once in ``WHOLE_SECONDS``.

    Args:
        cluster: what is checked.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._whole_at = 0.0
        self._seen: dict[object, tuple[int, ...]] = {}
        """Fingerprints of services."""
        self._verified: dict[tuple[int, int, int], int] = {}
        """Versions of chunks that were looked at, by arena, slot and generation: such a chunk is
        immutable, and is not read again."""

    def check(self, *, whole: bool = False) -> None:
        """Look at what has changed; call after a callback.

        Args:
            whole: look at everything.

        Raises:
            Violation: something does not hold.
        """
        cluster, now = self._cluster, self._cluster.loop.time()
        if whole or now >= self._whole_at:
            self._seen.clear()
            self._whole_at = now + WHOLE_SECONDS
        clears = len(cluster.contents.clears)
        for name, shard in cluster.shards.items():
            node = shard.node
            if node is not None:
                slots = xxh3_64_intdigest(node.shard.writer._slots.data)
                seen = slots, node.shard.cleared, clears, len(node.shard.state.chunks)
                if self._is_news(node, seen):
                    self._check_node(name, node)
                    _validate(name, node.shard.state)
        for number, part in cluster.directory.items():
            state = part.service.state
            table = state.table
            holders, keys = (xxh3_64_intdigest(a.data) for a in (table._holders, table._keys))
            if self._is_news(state, (holders, keys, state.clears.highest)):
                _validate(f"directory {number}", state)

    def _is_news(self, service: object, seen: tuple[int, ...]) -> bool:
        if self._seen.get(service) == seen:
            return False
        self._seen[service] = seen
        return True

    def _check_node(self, name: str, node: Node) -> None:
        state, writer = node.shard.state, node.shard.writer
        content = writer.scan()
        ready = dict(zip(key_list(content.keys), content.ready.tolist(), strict=True))
        known = {key: state.chunks.slot(key) for key in state.chunks}
        if ready != known:
            raise Violation(f"{name}: the arena holds {len(ready)} chunks, the state {len(known)}")
        leased = Counter(
            slot
            for slots in (
                *(holder.leases for holder in state._leases.holders.values()),
                *state._leases.orphans.values(),
                *(slots for _, slots in state._leases.resting),
            )
            for slot in slots
        )
        if twice := [slot for slot, count in leased.items() if count > 1]:
            raise Violation(f"{name}: slots {twice} have two owners")
        if both := leased.keys() & set(ready.values()):
            raise Violation(f"{name}: slots {both} are leased and ready")
        if leased.keys() != content.reserved.keys():
            odd = leased.keys() ^ content.reserved.keys()
            raise Violation(f"{name}: arena and state do not agree on the reserved slots {odd}")
        if state.chunks.nbytes > node.shard.capacity:
            raise Violation(f"{name}: more bytes than capacity")
        generations = writer._slots["generation"][content.ready].tolist()
        for (key, slot), generation in zip(ready.items(), generations, strict=True):
            at = writer.arena_id, slot, generation
            version = self._verified.get(at)
            if version is None:
                view = writer.payload(slot)[:CHUNK_BYTES]
                version = self._cluster.contents.version(view, key, f"{name}, slot {slot}")
                self._verified[at] = version
            self._cluster.contents.check_age(version, node.shard.cleared, name)


def _validate(name: str, state: ShardState | DirectoryState) -> None:
    try:
        state.validate()
    except AssertionError as error:
        raise Violation(f"{name}: {error}") from error


def check_calm(cluster: Cluster) -> None:
    """What must hold when nothing has gone wrong for a while and engines are idle.

    Raises:
        Violation: something has leaked, or is stuck.
    """
    for name in cluster.machines:
        shard = cluster.shards.get(name)
        if shard is None or shard.node is None:
            raise Violation(f"{name} has no shard")
        node = shard.node
        staging, leases = node._staging, node.shard.state._leases
        if staging._flights:
            raise Violation(f"{name}: {len(staging._flights)} chunks are still awaited")
        if busy := [at for at, room in staging._rooms.items() if room.windows]:
            raise Violation(f"{name}: windows of {busy} were not released")
        alive = {engine.name for engine in cluster.engines.values()}
        if strangers := leases.engines().keys() - alive:
            raise Violation(f"{name}: leases of dead engines {strangers}")
        if leases.orphans or leases.resting:
            raise Violation(f"{name}: {leases.orphans} orphans, {leases.resting} resting")
        held = {
            slot
            for engine in cluster.engines.values()
            if engine.machine.name == name
            for slot in engine.slots.held()
        }
        leased = {slot for holder in leases.holders.values() for slot in holder.leases}
        if leased != held:
            raise Violation(f"{name}: {len(leased)} slots are leased, engines hold {len(held)}")
        for engine in cluster.engines.values():
            if not len(engine.slots):
                raise Violation(f"{engine.name} has no slot to save into")
        newest = max(cluster.contents.clears, default=0)
        if node.shard.cleared < newest:
            raise Violation(f"{name}: clear {newest} was never carried out")
    for number, part in cluster.directory.items():
        _check_told(cluster, number, part.service.state)


def _check_told(cluster: Cluster, number: int, state: DirectoryState) -> None:
    """A part of the directory knows of every node exactly what that node holds."""
    table, names = state.table, state._holders.names()
    keys = key_list(table._keys)
    rows, _ = np.nonzero(table._holders != NO_NODE)
    numbers = table._holders[table._holders != NO_NODE]
    told = {
        (names[holder], keys[row])
        for row, holder in zip(rows.tolist(), numbers.tolist(), strict=True)
        if holder in names
    }
    held = {
        (name, key)
        for name, shard in cluster.shards.items()
        if shard.node is not None
        for key in shard.node.shard.state.chunks
        if parts_of(key_array(key), cluster.parts)[0] == number
    }
    if told != held:
        raise Violation(
            f"directory {number} does not know of {sorted(held - told)[:2]}, and takes "
            f"{sorted(told - held)[:2]} for true"
        )
