"""Asks a Serve app on the host where it runs (``Host.remote``)."""

from __future__ import annotations

import time
from pathlib import Path

import ray

from lmkv_ray.actors import connect
from lmkv_ray.config import load_settings
from serve_apps import replicas, saved
from serve_apps.client import Answer, ask
from serve_apps.documents import Library

APP, PORT = "llm", 8000


class Visitor:
    """Args: the app's model, for cutting prompts, and its name in requests."""

    def __init__(self, model: str, name: str) -> None:
        ray.init(address="auto", log_to_driver=False, configure_logging=False)
        self._name = name
        self._library = Library(Path(model))
        self._document = self._library.document(64)

    def wait_nodes(self, count: int) -> list[str]:
        """Addresses of the cluster's nodes, as soon as there are so many."""
        deadline = time.monotonic() + 100
        while True:
            found = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
            if len(found) >= count or time.monotonic() > deadline:
                return sorted(found)
            time.sleep(0.2)

    def replicas(self, count: int) -> list[str]:
        """The app's replicas, as soon as there are so many."""
        return replicas.wait(APP, count, timeout_s=480)

    def new_document(self, tokens: int) -> None:
        """Ask about another document from now on."""
        self._document = self._library.document(tokens)

    def ask(self, replica: str) -> Answer:
        """What a replica says about the document."""
        return ask(PORT, self._name, self._document.messages, replica=replica, max_tokens=8)

    def wait_saved(self, chunks: int) -> None:
        """Until the cache has taken everything in, which is so many chunks."""
        saved.wait(connect(settings=load_settings(), start=False), chunks)

    def staged(self) -> int:
        """Chunks that shards have fetched from one another."""
        status = connect(settings=load_settings(), start=False).status()
        return int(sum(node.counters["staged"] for node in status.nodes))

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()
