"""Whether there is a GPU."""

import pytest

from tests.kernels.backends import gpu_missing


@pytest.fixture
def without_gpu() -> str:
    """Why no GPU can be used; empty where one can."""
    return gpu_missing()
