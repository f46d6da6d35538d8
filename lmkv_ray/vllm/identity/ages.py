"""Identity: in which namespaces an engine's keys are made, while it may be unknown and may change.

What a namespace is made of can be known later than the engine runs (the digest of large weights
takes a while) and can change while it runs (weights that are updated in place). So its fields are
*learnt*, from any thread, and *doubted*; the engine's thread *adopts* what there is, only between
two calls of vLLM's scheduler. While a field is not known, which is so from the moment of the doubt,
the engine neither looks up nor saves.

Every adoption of other namespaces begins a new *age*. What was computed in one age has no key in
another: chunks saved or loaded in an earlier age are neither committed nor found any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from msgspec import structs

from lmkv_ray.keys import Namespace
from lmkv_ray.tenants import space_of


class Identity:
    """One per engine.

    Args:
        namespaces: of the engine, by place.
        pending: fields of them that are not known yet.
    """

    def __init__(self, namespaces: Sequence[Namespace], pending: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._learnt = tuple(namespaces)
        self._pending = set(pending)
        self.places = len(namespaces)
        self._spaces = (0,) * self.places
        self.namespaces: Sequence[bytes] = ()
        """Digests (16 bytes) by place, as last adopted; none before the first adoption."""
        self.age = 0
        """How many times other namespaces were adopted."""
        self.known = False
        """Whether chunks may be looked up and saved now, as last adopted."""

    # -- any thread -----------------------------------------------------------------------------

    def learn(self, **fields: str) -> None:
        """These fields of all namespaces are known."""
        with self._lock:
            self._learnt = tuple(
                structs.replace(fields_of_host, **fields) for fields_of_host in self._learnt
            )
            self._pending.difference_update(fields)

    def doubt(self, *fields: str) -> None:
        """These fields are not known until they are learnt, maybe with the value they had."""
        with self._lock:
            self._pending.update(fields)
            self.known = False

    # -- the engine's thread --------------------------------------------------------------------

    def adopt(self) -> bool:
        """Take in what was learnt and doubted.

        Returns:
            whether a new age has begun.
        """
        with self._lock:
            known, learnt = not self._pending, self._learnt
            self.known = known
        if not known:
            return False
        namespaces = tuple(fields_of_host.digest() for fields_of_host in learnt)
        if namespaces == self.namespaces:
            return False
        self.namespaces = namespaces
        self._spaces = tuple(map(space_of, namespaces))
        self.age += 1
        return True

    def fields(self, place: int) -> dict[str, str]:
        """The fields of the namespace of a place, for people; none before the first adoption."""
        with self._lock:
            return self._learnt[place].fields() if self.namespaces else {}

    def space(self, place: int) -> int:
        """What shards call the namespace of a place; 0: not known yet."""
        return self._spaces[place]
