"""The stores of this folder's tests: a real S3 server, a directory, and one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv_ray.tiers.remote.objects import open_objects
from tests.tiers.harness import secret
from tests.tiers.remote.store import (
    FaultyObjects,
)
from tests.tiers.s3 import options, s3_server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        objects = open_objects("s3://lmkv-bucket", options(address))
        asyncio.run(objects.put("made", [b"1"], 10))
        yield address


@pytest.fixture(params=["s3", "directory", "encrypted"])
def where(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, dict[str, str], Path | None]:
    if request.param == "s3":
        # One bucket: this server reserves a volume of disk space for each.
        url = f"s3://lmkv-bucket/{tmp_path.name}"
        return url, options(request.getfixturevalue("s3")), None
    key_file = None
    if request.param == "encrypted":
        key_file = secret(tmp_path / "key", "0123456789abcdef" * 4)
    return f"file://{tmp_path}/store", {}, key_file


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyObjects:
    return FaultyObjects(tmp_path)
