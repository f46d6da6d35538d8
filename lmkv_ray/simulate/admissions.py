"""Rules for what is written below memory: the shard's own, and those they are compared with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal, Protocol

from lmkv_ray.shard import Admission

AdmissionRule = Literal["all", "second_hit", "hit_in_memory", "evicted"]


class Admits(Protocol):
    """What the replay needs of a rule; see ``shard.Admission``."""

    def committed(self, keys: Iterable[bytes]) -> None:
        """Chunks are ready in memory."""

    def touched(self, keys: Iterable[bytes]) -> None:
        """Chunks in memory were used."""

    def removed(self, keys: Iterable[bytes]) -> None:
        """Chunks left memory."""

    def take(self) -> bytes | None:
        """The next chunk to write."""
        ...


class HitInMemory:
    """What is used again while it is in memory."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()

    def committed(self, keys: Iterable[bytes]) -> None:
        pass

    def touched(self, keys: Iterable[bytes]) -> None:
        self._waiting.extend(keys)

    def removed(self, keys: Iterable[bytes]) -> None:
        pass

    def take(self) -> bytes | None:
        return self._waiting.popleft() if self._waiting else None


class OnEviction:
    """What was used twice, in this life in memory or an earlier one, when memory evicts it."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._used_twice: set[bytes] = set()
        self._waiting: deque[bytes] = deque()

    def committed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            (self._used_twice if key in self._seen else self._seen).add(key)

    def touched(self, keys: Iterable[bytes]) -> None:
        self._used_twice.update(keys)

    def removed(self, keys: Iterable[bytes]) -> None:
        self._waiting.extend(key for key in keys if key in self._used_twice)

    def take(self) -> bytes | None:
        return self._waiting.popleft() if self._waiting else None


def make_admission(rule: AdmissionRule) -> Admits:
    """A new rule by name."""
    match rule:
        case "hit_in_memory":
            return HitInMemory()
        case "evicted":
            return OnEviction()
        case _:
            return Admission(rule)
