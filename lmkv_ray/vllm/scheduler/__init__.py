"""What runs on the engine's thread, inside vLLM's scheduler: nothing here waits.

``half`` is the entrance: requests come and go, ``hits`` orders loads, ``saves`` orders saves.
"""
