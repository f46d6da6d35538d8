"""The counters of an engine, which vLLM exports: name and meaning."""

from __future__ import annotations

ENGINE_COUNTERS = {
    "hit_tokens": "Prompt tokens found in the cache (load_failed ones among them).",
    "reused_tokens": "Prompt tokens copied from stored text that is no prefix (`anywhere`).",
    "recomputed_tokens": "Prompt tokens computed between and within such text, in one step.",
    "rows_given_up": "Requests computed without such text: no step had room for what lies between.",
    "load_bytes": "Bytes copied from the arena into the engine's pages.",
    "load_seconds": "Seconds spent copying from the arena.",
    "save_bytes": "Bytes copied from the engine's pages into the arena.",
    "save_seconds": "Seconds spent copying into the arena.",
    "saved_chunks": "Chunks committed to the arena.",
    "dropped_chunks": "Chunks that could not be saved (no free slot in time).",
    "failed_loads": "Loads that were thrown away and recomputed.",
    "refused_hints": "Requests whose hints (kv_transfer_params) were ignored as wrong.",
    "swallowed_errors": "Errors of the connector that cost the cache something, and no request.",
}
"""Counters of an engine, on vLLM's own ``/metrics`` as ``vllm:lmkv_..._total``: name -> meaning."""
MISSED_TOKENS = "missed_tokens"
MISSED_TOKENS_TEXT = "Prompt tokens that had to be computed, by reason."
