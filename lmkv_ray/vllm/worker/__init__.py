"""What runs in each of vLLM's worker processes: copies, and a look at weights and adapters.

``half`` is the entrance. Nothing here knows an actor, a shard or Ray.
"""
