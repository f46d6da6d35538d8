"""Why a key is gone: a bounded, lossy memory of removed keys.

A direct-mapped table of uint64 entries: 61 bits of the key's tag and 3 bits of reason, so that one
store replaces an entry and a reader never sees half of one. A later removal may take the place of
an earlier one; then the earlier key counts as never stored. It lives in the arena, so that engines
name the reason of a miss without a call.
"""

from __future__ import annotations

import numpy as np

from lmkv_ray.index import Buffer, key_tags
from lmkv_ray.keys import KeyArray
from lmkv_ray.messages import MissReason

_REASONS = (MissReason.NEVER_STORED, MissReason.EVICTED, MissReason.CLEARED)
_REASON_BITS = np.uint64(7)


class GhostTable:
    """Removed keys and why they were removed.

    Args:
        buffer: at least ``8 * entries`` bytes; zeroed memory is an empty table.
        entries: a power of two.
    """

    def __init__(self, buffer: Buffer, entries: int) -> None:
        self._entries = np.frombuffer(buffer, np.uint64, entries)
        self._shift = np.uint64(64 - entries.bit_length() + 1)

    @staticmethod
    def entries_for(slots: int) -> int:
        """A table size that remembers about as many keys as a quarter of the slots."""
        return 1 << (max(slots // 4, 4096) - 1).bit_length()

    def remember(self, keys: KeyArray, reason: MissReason) -> None:
        """Note why keys were removed (``EVICTED`` or ``CLEARED``)."""
        tags = key_tags(keys)
        code = np.uint64(_REASONS.index(reason))
        self._entries[tags >> self._shift] = tags & ~_REASON_BITS | code

    def reasons(self, keys: KeyArray) -> list[MissReason]:
        """Why each key is missing: ``NEVER_STORED`` also means "not that this table remembers"."""
        tags = key_tags(keys)
        entries = self._entries[tags >> self._shift]
        same = (entries & ~_REASON_BITS) == (tags & ~_REASON_BITS)
        codes = np.where(same, entries & _REASON_BITS, 0)
        return [_REASONS[code] if code < len(_REASONS) else _REASONS[0] for code in codes.tolist()]
