"""GPU block packing. Imported as ``lmkv_ray.kernels``; the kernels themselves are still to come."""
