"""The process that owns a NIXL agent: what it is handed, and what it costs who does not need it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmkv_ray.transports.nixl.transfers import descriptors
from lmkv_ray.transports.nixl.wire import Incoming, Registered, framed
from tests.transports.harness import CHUNK

SECONDS = 60.0


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "import asyncio\n"
        "from lmkv_ray.arena import ArenaWriter\n"
        "from lmkv_ray.transports import Helper\n"
        "async def main():\n"
        "    helper = Helper(ArenaWriter.create('parent', 4 << 20)); helper.start()\n"
        "    print(helper.pid, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + SECONDS
        while child.exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        assert not child.exists()


def test_nothing_of_nixl_is_imported_until_it_is_used() -> None:
    program = "import sys, lmkv_ray.transports; print([m for m in sys.modules if 'nixl' in m])"
    found = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert all(name.startswith("lmkv_ray") for name in eval(found))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20))
def test_descriptors_cover_the_rows_and_stay_in_their_extents(
    places: list[tuple[int, int]],
) -> None:
    size, here, there = 4, 16, 32
    rows = np.array([(a * size, b * size, size) for a, b in places], np.uint64)
    ours, theirs = descriptors(rows, here, there)
    assert (ours[:, 1] == theirs[:, 1]).all()
    pairs = [
        (int(a[0]) + i, int(b[0]) + i)
        for a, b in zip(ours, theirs, strict=True)
        for i in range(0, int(a[1]), size)
    ]
    assert pairs == [(int(row[0]), int(row[1])) for row in rows]
    for spans, extent in ((ours, here), (theirs, there)):
        begin, end = spans[:, 0], spans[:, 0] + spans[:, 1] - np.uint64(1)
        assert (begin // np.uint64(extent) == end // np.uint64(extent)).all()


def test_neighbours_are_one_descriptor() -> None:
    rows = np.array([(i * CHUNK, (i + 3) * CHUNK, CHUNK) for i in range(8)], np.uint64)
    ours, theirs = descriptors(rows, 1 << 20, 1 << 20)
    assert ours.tolist() == [[0, 8 * CHUNK, 0]]
    assert theirs.tolist() == [[3 * CHUNK, 8 * CHUNK, 0]]


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(1, 30))
def test_messages_arrive_whole_in_whatever_pieces(contents: list[bytes], size: int) -> None:
    sent = [Registered(metadata=content) for content in contents]
    stream = b"".join(map(framed, sent))
    incoming = Incoming(Registered)
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [message for piece in pieces for message in incoming.feed(piece)] == sent
