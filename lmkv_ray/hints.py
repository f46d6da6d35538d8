"""What a request may say about a chunk besides its key; eviction policies use it."""

from __future__ import annotations

import math

import msgspec

from lmkv_ray.keys import KEY_BYTES

MAX_PRIORITY = 16
"""Priorities go as far up and down."""
MAX_TTL = 10 * 365.25 * 86400
"""Seconds from now that a deadline may lie ahead: ten years."""
MAX_NAME_BYTES = 128
"""Of the name of a session or a category, as UTF-8."""


class Hints(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Hints about one chunk. All are optional; a wrong one costs hits, never correctness."""

    after: bytes = b""
    """Key of the chunk before it in the prompt; empty for a prompt's first chunk, or unknown."""
    deadline: float | None = None
    """``time.monotonic()`` seconds after which it will not be asked for any more (its ttl)."""
    priority: int = 0
    """Each step up makes it worth keeping twice as much as its like, each step down half."""
    session: str = ""
    """Conversation or agent run it belongs to. In a session that came back once, chunks are worth
    more than in one that did not."""
    pinned: bool = False
    """Never evicted to make room."""
    space: int = 0
    """Whose it is: see ``tenants``. The shard believes it of a tenant of the engine's namespace."""
    category: str = ""
    """Kind of traffic, for instance ``chat`` or ``batch``: reuse times are learnt by category."""

    def sound(self, now: float) -> bool:
        """Whether all is within its bounds: policies calculate with it, and it is kept.

        Args:
            now: ``time.monotonic()`` seconds.
        """
        return (
            len(self.after) in (0, KEY_BYTES)
            and (self.deadline is None or -math.inf < self.deadline <= now + MAX_TTL)
            and -MAX_PRIORITY <= self.priority <= MAX_PRIORITY
            and is_name(self.session)
            and is_name(self.category)
            and 0 <= self.space < 1 << 64
        )


NO_HINTS = Hints()
"""Nothing is known."""


def is_name(value: object) -> bool:
    """Whether a value is text that may name a session or a category."""
    return (
        type(value) is str
        and len(value) <= MAX_NAME_BYTES
        and value.isprintable()  # so there is no surrogate in it, which cannot be encoded
        and len(value.encode()) <= MAX_NAME_BYTES
    )
