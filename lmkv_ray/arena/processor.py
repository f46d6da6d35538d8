"""Processors on which the arena's protocol holds."""

from __future__ import annotations

import platform

from lmkv_ray.errors import UnsupportedError

PROCESSORS = frozenset({"x86_64", "AMD64"})
"""Names of x86-64. Readers and writer go by the order of loads and stores, without fences."""


def check_processor() -> None:
    """Refuse processors that may reorder loads or stores.

    Raises:
        UnsupportedError: this is one.
    """
    machine = platform.machine()
    if machine not in PROCESSORS:
        raise UnsupportedError(
            f"lmkv_ray does not run on processors of the kind {machine}: they may reorder loads "
            "and stores of its shared memory.",
            next_step="use x86-64 hosts, or serve without lmkv_ray.",
        )
