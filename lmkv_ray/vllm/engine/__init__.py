"""What both halves know of their vLLM engine, and tell each other: runs in all its processes."""
