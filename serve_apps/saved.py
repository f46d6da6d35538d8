"""When has the cache taken everything in?"""

from __future__ import annotations

import time

from lmkv_ray.actors import Cache

QUIET_S = 1.0  # engines commit ten times a second
TIMEOUT_S = 30.0


def wait(cache: Cache) -> None:
    """Return when no chunk has been added for a second; TimeoutError if that does not happen."""
    deadline = time.monotonic() + TIMEOUT_S
    last, since = -1, time.monotonic()
    while time.monotonic() < deadline:
        chunks = cache.status().chunks
        if chunks != last:
            last, since = chunks, time.monotonic()
        elif time.monotonic() - since > QUIET_S:
            return
        time.sleep(QUIET_S / 10)
    raise TimeoutError(f"the cache still takes chunks in after {TIMEOUT_S:.0f} s ({last} so far)")
