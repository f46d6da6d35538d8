"""Ray Serve applications over ray.serve.llm, and the demo that measures them."""
