"""What may be known of a chunk besides its key, for those who decide how long it stays."""

from __future__ import annotations

import msgspec


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
    """Whose it is: the first 8 bytes of its namespace, which contains the tenant's salt."""
    category: str = ""
    """Kind of traffic, for instance ``chat`` or ``batch``: reuse times are learnt by category."""


NO_HINTS = Hints()
"""Nothing is known."""
