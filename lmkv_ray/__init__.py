"""lmkv_ray: the KV cache layer of Ray."""

__version__ = "0.1.0"
