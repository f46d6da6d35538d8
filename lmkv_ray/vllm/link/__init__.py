"""What runs on the thread that talks to a shard, and the queues between it and the engine's thread.

``shard_link`` is the thread. Only the courier's client stands between it and a shard.
"""
