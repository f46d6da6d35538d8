"""The process of NIXL as its parent sees it: how it may fail to start, and what a call may cost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lmkv_ray.arena import ArenaWriter
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.transports import Helper, NixlServer, Transports, all_transports
from lmkv_ray.transports.nixl import helper as helper_module
from lmkv_ray.transports.nixl.helper import HelperError
from lmkv_ray.transports.nixl.wire import AT_ONCE, Register, Registered
from tests.transports.harness import Here, LocalPeer, until

SECONDS = 60.0
COMMAND = Register(extents=[])


@pytest.fixture
def here() -> Iterator[Here]:
    here = Here()
    yield here
    here.writer.close()


@pytest.fixture
def writer(here: Here) -> ArenaWriter:
    return here.writer


@pytest.mark.parametrize("program", ["lmkv_ray.no_such_program", "tests.transports.stuck"])
async def test_a_process_that_cannot_start_is_an_obstacle_for_a_while(
    writer: ArenaWriter, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(helper_module, "PROGRAM", program)
    monkeypatch.setattr(helper_module, "START_SECONDS", 1.0)
    helper = Helper(writer, SYSTEM_CLOCK)
    with pytest.raises(HelperError, match="did not start"):
        await helper.call(Register(extents=[]), time.monotonic() + SECONDS)
    assert (helper.problem, helper.pid) == ("the NIXL process did not start", None)
    monkeypatch.setattr(helper_module, "RETRY_SECONDS", 0.0)
    assert helper.problem is None
    await helper.close()


async def test_a_process_that_ends_before_it_did_anything_is_an_obstacle(
    writer: ArenaWriter,
) -> None:
    helper = Helper(writer, SYSTEM_CLOCK)
    helper.start()
    await until(lambda: helper.agent is not None)
    pid = helper.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: helper.pid is None)
    assert helper.problem == "the NIXL process did not carry out its first command"
    await helper.close()


async def test_a_machine_with_too_many_processes_is_an_obstacle(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Reserver temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    peer = LocalPeer()
    elsewhere = replace(peer.info(), host="another")
    server = NixlServer(
        peer.store.reader,
        Helper(peer.store.writer, SYSTEM_CLOCK),
        peer.store.writer.set_checksum,
        SYSTEM_CLOCK,
    )
    offer = server.offer("another")
    assert "Reserver temporarily unavailable" in str(offer.obstacle)
    transports = Transports(
        all_transports(here.writer, here.helper, SYSTEM_CLOCK), "auto", SYSTEM_CLOCK
    )
    assert transports.choose(elsewhere).name == "object_store"
    monkeypatch.setattr(helper_module, "RETRY_SECONDS", 0.0)
    assert server.offer("").obstacle is None
    await peer.close()


async def test_a_parent_may_have_thousands_of_files_open(writer: ArenaWriter) -> None:
    helper, files = Helper(writer, SYSTEM_CLOCK), [os.dup(0) for _ in range(1100)]
    try:
        assert isinstance(await helper.call(COMMAND, time.monotonic() + SECONDS), Registered)
    finally:
        await helper.close()
        for file in files:
            os.close(file)


async def test_calls_that_are_late_leave_the_turns_to_others(writer: ArenaWriter) -> None:
    helper = Helper(writer, SYSTEM_CLOCK)
    for _ in range(AT_ONCE):
        with pytest.raises(HelperError, match="deadline") as raised:
            await helper.call(COMMAND, time.monotonic())
        assert raised.value.late
    assert isinstance(await helper.call(COMMAND, time.monotonic() + SECONDS), Registered)
    await helper.close()
