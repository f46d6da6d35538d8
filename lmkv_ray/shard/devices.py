"""What the engines of a node hold on their devices, as they tell it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

from lmkv_ray.keys import KEY_BYTES
from lmkv_ray.shard.deltas import DeltaLog

MAX_KEYS = 1 << 16
"""Chunks of one engine that are known; it tells no more than that either."""


class NodeDevices:
    """Keys by engine; hints for the directory, and nothing the shard itself relies on.

    Args:
        deltas: told of what comes and goes.
    """

    def __init__(self, deltas: DeltaLog) -> None:
        self._deltas = deltas
        self._keys: dict[str, dict[bytes, None]] = {}

    @property
    def content(self) -> Mapping[str, Collection[bytes]]:
        """Keys of chunks, by engine."""
        return self._keys

    def count(self, engine_id: str) -> int:
        """Chunks on the device of one engine."""
        return len(self._keys.get(engine_id, ()))

    def told(self, engine_id: str, added: bytes, removed: bytes) -> None:
        """Chunks came to an engine's device, then others went; known ones do so again."""
        if not added and not removed:
            return
        held = self._keys.setdefault(engine_id, {})
        fresh = [key for key in _whole(added) if key not in held][: MAX_KEYS - len(held)]
        held.update(dict.fromkeys(fresh))
        gone = [key for key in _whole(removed) if held.pop(key, 0) is None]
        self._deltas.added(fresh, engine_id)
        self._deltas.removed(gone, engine_id)
        if not held:
            del self._keys[engine_id]

    def forget(self, engine_ids: Iterable[str]) -> None:
        """Nothing is known of these engines (any more)."""
        for engine_id in engine_ids:
            self._deltas.removed([*self._keys.pop(engine_id, ())], engine_id)

    def keep(self, engine_ids: Container[object]) -> None:
        """There are no other engines."""
        self.forget([name for name in self._keys if name not in engine_ids])

    def validate(self, engine_ids: Container[object]) -> None:
        """Check bounds, and that only attached engines are known, for tests and simulations.

        Args:
            engine_ids: those of all attached engines.

        Raises:
            AssertionError: something does not hold; the text says what.
        """
        for engine_id, keys in self._keys.items():
            assert engine_id in engine_ids, f"{engine_id} is not attached"
            assert 0 < len(keys) <= MAX_KEYS, f"{engine_id} holds {len(keys)} chunks"


def _whole(keys: bytes) -> Iterable[bytes]:
    whole = len(keys) - len(keys) % KEY_BYTES
    return dict.fromkeys(keys[i : i + KEY_BYTES] for i in range(0, whole, KEY_BYTES))
