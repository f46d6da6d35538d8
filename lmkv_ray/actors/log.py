"""What this package says of itself, in the logs of its actors."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def show() -> None:
    """Show what is logged from INFO on, on standard error, which Ray keeps in the actor's log.

    Does nothing where the process has handlers for logs already.
    """
    ours = logging.getLogger("lmkv_ray")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        ours.addHandler(handler)
