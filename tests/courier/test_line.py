"""Whatever a courier says or leaves unsaid, the engine's side goes on; without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from lmkv_ray.child import start_child
from lmkv_ray.config import load_settings
from lmkv_ray.courier import Courier, client
from tests.courier.puppet import SLOW_SECONDS
from tests.vllm.conftest import wait_for

PUPPET = "tests.courier.puppet"
Make = Callable[[str], Courier]


@pytest.fixture
def make_courier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(client, "PROGRAM", PUPPET)
    made: list[Courier] = []

    def make(how: str) -> Courier:
        monkeypatch.setenv("PUPPET", how)
        made.append(Courier(load_settings()))
        return made[-1]

    yield make
    for courier in made:
        courier.close()


def runs(pid: int) -> bool:
    """Whether a process has not ended; of a zombie there is no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.parametrize("how", ["garbage", "length", "half", "mute"])
def test_a_courier_that_is_not_understood_is_replaced(make_courier: Make, how: str) -> None:
    courier = make_courier(how)
    shard, first = courier.shard(start=False), courier.pid
    assert first is not None
    with pytest.raises(ConnectionError):
        shard.call("where", b"").result(5)
    wait_for(lambda: not runs(first))
    assert courier.shard(start=False)
    assert courier.pid not in (None, first)


def test_a_courier_may_be_stopped_between_any_two_messages(
    make_courier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIND_SECONDS", 0.5)
    courier = make_courier("plain")
    for calls in range(4):
        shard = courier.shard(start=False)
        assert courier.pid is not None
        for _ in range(calls):
            assert shard.call("where", b"x").result(5) == b"x"
        os.kill(courier.pid, signal.SIGSTOP)
        answer = shard.call("where", b"x")
        with pytest.raises(Exception, match="did not answer within"):
            courier.shard(start=False)
        with pytest.raises(ConnectionError):
            answer.result(5)


def test_a_courier_whose_pipe_is_full_is_given_up(
    make_courier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SEND_SECONDS", 1)
    courier = make_courier("plain")
    shard, first = courier.shard(start=False), courier.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    answers: list[Future[bytes]] = []
    while not answers or not answers[-1].done():
        assert len(answers) < 100, "a pipe without a bound"
        answers.append(shard.call("where", bytes(1 << 20)))
    for answer in answers:
        with pytest.raises(ConnectionError):
            answer.result(5)
    wait_for(lambda: not runs(first))
    assert courier.shard(start=False).call("where", b"x").result(5) == b"x"


def test_a_search_is_given_up_for_its_own_slowness_only(
    make_courier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of eight nodes are looked for by one courier, one after the other."""
    monkeypatch.setattr(client, "FIND_SECONDS", 4 * SLOW_SECONDS)
    courier = make_courier("slow")
    courier.shard(start=False)
    first, found = courier.pid, []
    links = [
        threading.Thread(target=lambda: found.append(courier.shard(start=False)), daemon=True)
        for _ in range(8)
    ]
    for link in links:
        link.start()
    for link in links:
        link.join(60)
    assert len(found) == 8
    assert courier.pid == first


def test_a_courier_ends_with_its_engine_though_a_fork_of_it_lives(tmp_path: Path) -> None:
    program = (
        "import os, time\nfrom lmkv_ray.config import load_settings\n"
        f"from lmkv_ray.courier import Courier, client\nclient.PROGRAM = {PUPPET!r}\n"
        "its = Courier(load_settings()); its.shard(start=False)\n"
        "fork = os.fork()\n"
        "if fork: print(its.pid, fork, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PUPPET": "plain"},
    ) as engine:
        assert engine.stdout is not None
        courier, fork = map(int, engine.stdout.readline().split())
        engine.kill()
        try:
            wait_for(lambda: not runs(courier), 10)
            assert runs(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_no_module_of_the_working_directory_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are started in /tmp, where other users put files."""
    for module in ("pickle", "queue", "socket", "msgspec", "ray"):
        (tmp_path / f"{module}.py").write_text("open('planted', 'w')\nraise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PUPPET", "plain")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    process, link = start_child(PUPPET, [str(os.getpid())])
    link.close()
    assert process.wait(20) == 0
    assert not (tmp_path / "planted").exists()
