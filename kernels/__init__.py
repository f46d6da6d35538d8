"""Packing of KV-cache pages on the GPU. Imported as ``lmkv_ray.kernels``.

``page_table`` says what one launch copies and checks it, with NumPy alone; ``pages`` compiles
``pages.cu`` for the device at hand and launches it; ``pages.cu`` is CUDA, HIP and, with the header
in tests/kernels, plain C++.
"""

from lmkv_ray.kernels.page_table import RUN, TARGET, PageAddresses, PageLaunch, PageTable

__all__ = ["RUN", "TARGET", "PageAddresses", "PageLaunch", "PageTable"]
