"""``make bench-gpu``: what the GPU data path does on this machine. See docs/gpu.md."""
