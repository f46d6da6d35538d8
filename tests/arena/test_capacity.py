"""What an arena takes of a machine: below every limit by default, and a clear refusal."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lmkv_ray.arena.capacity import MachineLimits, capacity_for
from lmkv_ray.arena.machine import cgroup_limit, machine_limits, memory
from lmkv_ray.errors import ArenaError

GIB = 1 << 30
BIG = MachineLimits(Path("/dev/shm"), memory=1024 * GIB, free=1000 * GIB)


@pytest.mark.parametrize(
    ("machine", "nbytes", "why"),
    [
        (replace(BIG, memory=10 * GIB), 2 * GIB, r"a fifth of the machine's memory \(10240 MiB\)"),
        (
            replace(BIG, memory=23 * GIB, container=3 * GIB),
            3 * GIB // 5,
            r"a fifth of this container's memory limit \(3072 MiB\)",
        ),
        (replace(BIG, free=64 << 20), 32 << 20, r"half of what is free there \(64 MiB\)"),
        (
            replace(BIG, free=10 * GIB, object_store=4 * GIB),
            3 * GIB,
            r"10240 MiB beside 4096 MiB of Ray's object store",
        ),
        (replace(BIG, ray=5 * GIB), GIB, "that Ray has here"),
        (replace(BIG, file=GIB), GIB // 2, "ulimit -f"),
        (replace(BIG, address_space=GIB), GIB // 2, "ulimit -v"),
    ],
)
def test_a_default_keeps_below_the_tightest_limit(
    machine: MachineLimits, nbytes: int, why: str
) -> None:
    found = capacity_for(machine, None)
    assert found.nbytes == nbytes
    assert re.search(why, found.why)
    assert str(nbytes >> 20) in found.why


@pytest.mark.parametrize(
    "limit", [{"memory": GIB}, {"container": GIB}, {"file": GIB}, {"address_space": GIB}]
)
def test_what_cannot_be_given_is_refused_with_the_numbers(limit: dict[str, int]) -> None:
    machine = replace(BIG, **limit)  # type: ignore[arg-type]
    with pytest.raises(ArenaError, match=r"LMKV_CAPACITY is 2048 MiB, but .* is 1024 MiB"):
        capacity_for(machine, 2 * GIB)
    assert capacity_for(machine, GIB).nbytes == GIB, "what is set is taken as it is"


def test_a_machine_without_room_says_which_limit_it_is() -> None:
    with pytest.raises(ArenaError, match=r"free there .* 4 MiB are the least"):
        capacity_for(replace(BIG, free=GIB, object_store=2 * GIB), None)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "3221225472\n", "memory.high": "max\n"}, 3 * GIB),
        ("0::/a/b\n", {"memory.max": "max\n", "a/memory.high": "1073741824\n"}, GIB),
        ("0::/a/b\n", {"a/memory.max": f"{2 * GIB}\n", "a/b/memory.max": f"{3 * GIB}\n"}, 2 * GIB),
        ("0::/../other\n", {"memory.max": f"{GIB}\n"}, GIB),
        (
            "12:cpu:/x\n5:memory:/docker/abc\n",
            {"memory/memory.limit_in_bytes": f"{3 * GIB}\n"},
            3 * GIB,
        ),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("5:memory:/\n0::/\n", {"unified/memory.max": f"{GIB}\n"}, GIB),
        ("nonsense\n", {}, None),
    ],
)
def test_cgroups_of_both_versions(
    own: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    """Limits of groups above count too; a container sees its own group as the root."""
    root = tree(tmp_path, {"own": own, **{f"mount/{name}": text for name, text in files.items()}})
    assert cgroup_limit(root / "own", root / "mount") == limit


def test_memory_is_what_meminfo_says(tmp_path: Path) -> None:
    root = tree(tmp_path, {"meminfo": "MemFree: 1 kB\nMemTotal:       2048 kB\n", "bad": "x\n"})
    assert memory(root / "meminfo") == 2 << 20
    assert memory(root / "bad") == memory(root / "nowhere") > 2 << 20


def test_this_machine() -> None:
    limits = machine_limits(Path("/dev/shm"), object_store=5)
    assert limits.object_store == 5
    assert capacity_for(limits, None).nbytes <= limits.memory // 5
    assert machine_limits(Path("/proc"), object_store=5).object_store == 0, "not /dev/shm's"
    with pytest.raises(ArenaError, match="LMKV_ARENA_DIR"):
        machine_limits(Path("/nowhere"))
