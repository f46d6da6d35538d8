"""The header names the replica."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_apps.pinned_router import PinnedRouter

REPLICAS: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "ab"]


async def routed(headers: dict[str, str]) -> list[Any]:
    router = PinnedRouter.__new__(PinnedRouter)
    request: Any = SimpleNamespace(args=[object(), SimpleNamespace(headers=headers)])
    return [r for rank in await router.choose_replicas(REPLICAS, request) for r in rank]


@pytest.mark.parametrize("index", [0, 1])
async def test_a_request_goes_where_it_says(index: int) -> None:
    assert await routed({"x-replica": "ab"[index]}) == [REPLICAS[index]]


async def test_a_replica_that_is_not_there_is_waited_for() -> None:
    assert await routed({"x-replica": "gone"}) == []
