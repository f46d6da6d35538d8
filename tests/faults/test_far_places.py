"""An engine's link to the shard of another host, where it can map nothing."""

from __future__ import annotations

import pytest

from tests.faults.lab import CHUNK_BYTES, Lab

pytestmark = [pytest.mark.ray, pytest.mark.faults]


def test_a_worker_on_another_host_fills_what_the_engine_is_granted_there(lab: Lab) -> None:
    here, there = lab.hosts
    worker = there.remote("tests.faults.far_engine:FarWorker", CHUNK_BYTES)
    link = None
    try:
        host, owner = worker.call("identity")
        link = here.remote(
            "tests.faults.far_engine:FarLink", lab.settings, CHUNK_BYTES, host, owner
        )
        path, slots, deadline = link.call("granted", 8)
        assert worker.call("write", path, slots, deadline)
        document = lab.new_document()
        link.call("commit", document, slots)
        assert lab.engines[1].call("count", document, 8) == 8, "the other host's engines see them"
        found = link.call("locate", document, 9)
        assert (found.ready, found.slots) == (8, [*slots, -1])
        assert worker.call("holds", found.slots[:8])
        own = lab.shared(by=0)
        staged = link.call("locate", own, 8)
        assert (staged.ready, staged.reason) == (8, None), "brought there from the engine's host"
    finally:
        if link is not None:
            link.close()
        worker.close()
