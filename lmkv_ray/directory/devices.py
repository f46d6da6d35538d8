"""Which engine holds which chunk on its device.

Only that engine can use these chunks: they cannot be fetched, but a router sends requests there.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from lmkv_ray.directory.named import NamedTable
from lmkv_ray.keys import KeyArray, key_array
from lmkv_ray.messages import DeviceDelta


class EngineOfNode(NamedTuple):
    """One engine of the cluster."""

    node_id: str
    engine_id: str


class ClusterDevices:
    """Fed with the devices' part of the shards' deltas, once these are known to be in order.

    An engine is known as long as it holds anything.

    Args:
        capacity: chunks it remembers at most.
    """

    def __init__(self, capacity: int) -> None:
        self._engines: NamedTable[EngineOfNode] = NamedTable(capacity)
        self._numbers: dict[EngineOfNode, int] = {}
        self.nbytes = self._engines.table.nbytes
        """Bytes of the table."""

    def __len__(self) -> int:
        """Engines that are known."""
        return len(self._numbers)

    def apply(self, node_id: str, deltas: Sequence[DeviceDelta]) -> None:
        """What changed on the devices of a node."""
        table = self._engines.table
        table.sweep()
        for delta in deltas:
            engine = EngineOfNode(node_id, delta.engine_id)
            number = self._numbers.get(engine)
            if number is None:
                if not delta.added:
                    continue
                number = self._numbers[engine] = self._new_number(engine)
            table.remove(key_array(delta.removed), number)
            table.add(key_array(delta.added), number)

    def node_lost(self, node_id: str) -> None:
        """Nothing is known of a node's engines any more."""
        for engine in [engine for engine in self._numbers if engine.node_id == node_id]:
            self._engines.retire(self._numbers.pop(engine))

    def lookup(self, keys: KeyArray) -> Iterator[tuple[EngineOfNode, list[int]]]:
        """Engines and the positions of the keys that they hold."""
        return self._engines.lookup(keys)

    def validate(self, node_ids: Container[object]) -> None:
        """Compare engines and table with each other, for tests and simulations.

        Args:
            node_ids: those of all nodes that are known.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        self._engines.validate()
        names = {number: engine for engine, number in self._numbers.items()}
        assert self._engines.names() == names, "numbers of engines that are not known"
        strangers = [engine for engine in self._numbers if engine.node_id not in node_ids]
        assert not strangers, f"{strangers} are on nodes that are not known"

    def _new_number(self, engine: EngineOfNode) -> int:
        table = self._engines.table
        for known, number in [*self._numbers.items()]:
            if table.count(number) == 0:
                del self._numbers[known]
                self._engines.retire(number)
        return self._engines.new_number(engine)
