"""What this package says of itself, in the log of the engine."""

from __future__ import annotations

import logging


def show() -> None:
    """Show what is logged from vLLM's own level on, through vLLM's own handlers.

    vLLM arranges for the loggers below ``vllm`` only. Does nothing where the program has
    arranged for all loggers, or for ours.
    """
    ours, vllm_log = logging.getLogger("lmkv_ray"), logging.getLogger("vllm")
    if ours.level == logging.NOTSET:
        ours.setLevel(vllm_log.getEffectiveLevel())
    if not ours.hasHandlers():
        for handler in vllm_log.handlers:
            ours.addHandler(handler)
