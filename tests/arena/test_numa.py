"""Where pages are taken from is decided from the kernel's files; the call is behind a seam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.arena.numa import Placement, choose, gpu_nodes, online_nodes, set_policy


@pytest.mark.parametrize(
    ("gpus", "online", "expected"),
    [
        ([0, 0], [0], None),  # no choice
        ([], [0, 1], None),  # no GPU
        ([-1, -1], [0, 1], None),  # not known
        ([1], [0, 1], (1,)),
        ([1, 0, 0, 1], [0, 1], (0, 1)),
        ([2, -1], [0, 1, 2, 3], (2,)),
        ([7], [0, 1], None),  # a node without memory
    ],
)
def test_pages_come_from_the_nodes_of_the_gpus(
    gpus: list[int], online: list[int], expected: tuple[int, ...] | None
) -> None:
    assert choose(gpus, online) == (None if expected is None else Placement(expected))


def test_gpus_are_found_among_pci_devices(tmp_path: Path) -> None:
    devices = [
        ("0000:0a:00.0", "0x030200", "0x10de", "1"),  # an H100
        ("0000:0b:00.0", "0x030000", "0x1002", "0"),  # of AMD
        ("0000:0c:00.0", "0x030000", "0x1a03", "0"),  # the board's own display
        ("0000:0d:00.0", "0x020000", "0x10de", "1"),  # a network card of NVIDIA
        ("0000:0e:00.0", "0x030200", "0x10de", "-1"),
    ]
    for name, kind, vendor, node in devices:
        (tmp_path / name).mkdir()
        for file, text in (("class", kind), ("vendor", vendor), ("numa_node", node)):
            (tmp_path / name / file).write_text(text + "\n")
    (tmp_path / "0000:0f:00.0").mkdir()  # going away
    assert gpu_nodes(tmp_path) == [1, 0, -1]
    assert gpu_nodes(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0\n", [0]), ("0-1\n", [0, 1]), ("0,2-3\n", [0, 2, 3]), ("", [0]), (None, [0])],
)
def test_nodes_are_read_as_the_kernel_writes_them(
    tmp_path: Path, text: str | None, expected: list[int]
) -> None:
    if text is not None:
        (tmp_path / "online").write_text(text)
    assert online_nodes(tmp_path / "online") == expected


@pytest.mark.parametrize(("nodes", "mode", "mask"), [((1,), 1, 2), ((0, 2), 3, 5)])
def test_one_node_is_preferred_and_several_take_turns(
    nodes: tuple[int, ...], mode: int, mask: int
) -> None:
    calls = []

    def mbind(*call: int) -> int:
        calls.append(call)
        return 0

    memory = np.zeros(4096, np.uint8)
    assert set_policy(memory, Placement(nodes), mbind)
    assert calls == [(memory.ctypes.data, 4096, mode, mask)]


def test_refusal_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert not set_policy(np.zeros(8, np.uint8), Placement((1,)), lambda *_: 22)
    assert "Next step" in caplog.text
