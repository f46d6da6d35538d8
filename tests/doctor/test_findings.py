"""What the doctor makes of a cache's status, and of this machine. Without a cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmkv_ray.cli import app
from lmkv_ray.config import load_settings
from lmkv_ray.doctor.cluster import cluster_findings
from lmkv_ray.doctor.finding import Finding, Level
from lmkv_ray.doctor.machine import machine_findings
from lmkv_ray.messages import Kin
from lmkv_ray.status import CacheStatus, DirectoryStatus, ShardStatus, TierStatus

PART = DirectoryStatus(part=0, nodes=2, unsynced=0, chunks=10, capacity=1000)
WELL = ShardStatus("a" * 56, 1, host="one", version="1", wall=1000.0)
OTHER = ShardStatus("b" * 56, 1, host="two", version="1", wall=1001.0)


def of_cache(
    *nodes: ShardStatus, silent: tuple[str, ...] = (), directory: tuple[DirectoryStatus, ...] = ()
) -> list[Finding]:
    status = CacheStatus([*nodes], [*silent], [*(directory or (PART,))])
    return list(cluster_findings(status))


def changed(**fields: object) -> ShardStatus:
    return ShardStatus(**({"node_id": "b" * 56, "pid": 1, "host": "two"} | fields))  # type: ignore[arg-type]


def kin(**fields: str) -> list[Kin]:
    return [Kin(model="m", space=hash(str(fields)) & 0xFFFF, fields=fields)]


def test_a_cache_that_is_well() -> None:
    [finding] = of_cache(WELL, OTHER)
    assert finding.level is Level.GOOD
    assert "2 nodes" in finding.what


@pytest.mark.parametrize(
    ("node", "level", "words"),
    [
        (changed(problem="No room. Next step: make some."), Level.BAD, "make some"),
        (changed(refusals=["Chunks too large. Next step: enlarge."]), Level.BAD, "enlarge"),
        (
            changed(tiers=[TierStatus("disk", 0, 0, 0, "Full. Next step: empty it.", {})]),
            Level.BAD,
            "empty it",
        ),
        (
            changed(tiers=[TierStatus("disk", 0, 0, 0, None, {"read_corrupt": 3})]),
            Level.NOTE,
            "3 chunks were damaged",
        ),
        (changed(version="2"), Level.NOTE, "2 on two"),
        (changed(wall=1060.0), Level.NOTE, "60 s apart"),
        (changed(kin=kin(dtype="bfloat16") + kin(dtype="float16")), Level.NOTE, "dtype"),
    ],
)
def test_what_is_wrong_with_a_node(node: ShardStatus, level: Level, words: str) -> None:
    [finding] = of_cache(WELL, node)
    assert finding.level is level
    assert words in f"{finding.what} {finding.next_step}"
    assert finding.next_step


def test_a_silent_node_and_a_directory_that_is_behind_and_full() -> None:
    part = DirectoryStatus(part=1, nodes=2, unsynced=1, chunks=950, capacity=1000)
    found = of_cache(WELL, silent=("c" * 56,), directory=(PART, part))
    assert [f.about for f in found] == ["node cccccccccccc", "directory 1", "directory 1"]
    assert [f.level for f in found] == [Level.BAD, Level.NOTE, Level.NOTE]


def found_here(**settings: object) -> dict[str, Finding]:
    return {f.about: f for f in machine_findings(load_settings(settings))}


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    found = found_here(
        disk_dir=disk, remote_url=f"file://{tmp_path}/remote", encryption_key_file=key
    )
    assert [about for about, f in found.items() if f.level is Level.BAD] == []
    assert {"disk", "remote store", "encryption", "memory"} <= found.keys()
    assert list(disk.iterdir()) == []  # the doctor leaves nothing
    assert [path for path in (tmp_path / "remote").rglob("*") if path.is_file()] == []


def test_what_is_wrong_with_a_machine(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    disk.chmod(0o777)
    in_the_way = tmp_path / "remote"
    in_the_way.write_text("no directory")
    found = found_here(
        disk_dir=disk,
        remote_url=f"file://{in_the_way}/below",
        encryption_key_file=tmp_path / "none",
        capacity=1 << 50,
        arena_dir="/dev/shm",
    )
    wrong = {about for about, finding in found.items() if finding.level is Level.BAD}
    assert wrong == {"disk", "remote store", "encryption", "memory"}
    assert all(found[about].next_step for about in wrong)
    assert "chmod" in found["disk"].next_step


def test_a_wrong_setting_and_a_missing_cluster_are_findings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    findings = [json.loads(line) for line in result.output.splitlines()]
    assert findings[-1]["level"] == "bad"
    assert "127.0.0.1:1" in findings[-1]["what"]
    monkeypatch.setenv("LMKV_CAPACITY", "much")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "Next step" in result.output
