"""What only a disk does, while it works."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from typing import Any

from lmkv_ray.fetch import Failure
from tests.tiers.disk.conftest import present
from tests.tiers.harness import COUNT, DiskHarness, arrived, chunk, fetch, slots, some_keys, store

KEYS = some_keys()


async def test_every_flipped_byte_is_noticed(disk: DiskHarness) -> None:
    tier = await disk.open()
    into = slots(1)
    for offset in (0, 9, 20, 40, 50, 60, 4090, 4096, 30_000, 68_631):
        assert await store(tier, KEYS[:1]) == [True]
        disk.flip(KEYS[0].tobytes(), offset)
        assert (await fetch(tier, KEYS[:1], into))[0].failure == Failure.CORRUPT
    await tier.close()


async def test_a_file_under_another_files_name_is_noticed(disk: DiskHarness) -> None:
    tier = await disk.open()
    assert all(await store(tier, KEYS[:2]))
    shutil.copy(disk.file(KEYS[0].tobytes()), disk.file(KEYS[1].tobytes()))
    outcomes = await fetch(tier, KEYS[:2], slots(2))
    assert [outcome.failure for outcome in outcomes] == [None, Failure.CORRUPT]
    await tier.close()


async def test_without_o_direct_it_does_the_same(disk: DiskHarness, monkeypatch: Any) -> None:
    really_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    tier = await disk.open()
    into = slots(COUNT)
    assert all(await store(tier, KEYS))
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, into))
    assert all(arrived(slot, key) for slot, key in zip(into, KEYS, strict=True))
    assert tier.status().problem is None
    await tier.close()


async def test_closing_abandons_what_waits(disk: DiskHarness) -> None:
    tier = await disk.open(threads=2)
    release = disk.hold_writes()
    storing = asyncio.create_task(store(tier, KEYS))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing = asyncio.create_task(tier.close())
    await asyncio.sleep(0)
    release()
    await closing
    assert sum(await storing) <= 2, "one of each thread"
    assert await store(tier, KEYS) == [False] * COUNT
    assert not any(o.ok for o in await fetch(tier, KEYS, slots(COUNT)))
    again = await disk.open()
    assert await present(again, KEYS) == sum(storing.result())
    assert len(disk.all_files()) == sum(storing.result())
    await again.close()


async def test_empty_chunks_are_not_stored(disk: DiskHarness) -> None:
    tier = await disk.open()
    one = chunk(KEYS[0].tobytes())
    assert await tier.store([type(one)(one.key, 0, one.data[:0], one.intact)]) == [False]
    await tier.close()
