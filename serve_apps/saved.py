"""When has the cache taken everything in, and do all know that there is something?"""

from __future__ import annotations

import time

from lmkv_ray.actors import Cache

QUIET_S = 2.5  # engines commit ten times a second; in two all have heard that others have chunks
TIMEOUT_S = 30.0


def wait(cache: Cache, at_least: int = 0) -> None:
    """Return when no chunk has been added for some seconds; TimeoutError if that does not happen.

    Args:
        cache: whose.
        at_least: chunks that it has then.
    """
    deadline = time.monotonic() + TIMEOUT_S
    last, since = -1, time.monotonic()
    while time.monotonic() < deadline:
        chunks = cache.status().chunks
        if chunks != last or chunks < at_least:
            last, since = chunks, time.monotonic()
        elif time.monotonic() > since + QUIET_S:
            return
        time.sleep(0.1)
    raise TimeoutError(
        f"after {TIMEOUT_S:.0f} s the cache has {last} chunks, and still takes some in"
    )
