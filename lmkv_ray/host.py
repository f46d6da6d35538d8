"""Which machine this process runs on, as other shards see it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def host_id() -> str:
    """Equal for two processes exactly when they can open each other's memory through /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return f"unknown/{secrets.token_hex(8)}"  # equal to no other
    return f"{boot}/{pids}/{os.geteuid()}"
