"""A process beside the engine is the Ray driver; it may end or hang, and is started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from lmkv_ray.actors import cluster as joining
from lmkv_ray.actors import connect
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.courier import Courier, client
from lmkv_ray.courier.process import MOST_SHARDS, CourierProcess
from lmkv_ray.courier.wire import Find
from lmkv_ray.errors import ConnectError
from tests.vllm.conftest import wait_for

pytestmark = pytest.mark.ray

NOTHING = b"\x90"
"""An empty list, as msgpack: where no chunk is."""


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """Of a cache in a cluster of this module's own, whose driver is this process."""
    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False)
    address = ray.get_runtime_context().gcs_address
    made = load_settings({"capacity": "8MiB", "ray_address": address})
    cache = connect(settings=made)
    yield made
    cache.stop()
    ray.shutdown()


@pytest.fixture
def courier(settings: Settings) -> Iterator[Courier]:
    made = Courier(settings)
    yield made
    made.close()


def process_of(courier: Courier) -> int:
    assert courier.pid is not None
    return courier.pid


def runs(pid: int) -> bool:
    """Whether a process has not ended; of a zombie there is no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_calls_pass_and_their_errors_too(courier: Courier) -> None:
    shard = courier.shard(start=False)
    assert shard.call("where", b"").result(10) == NOTHING
    with pytest.raises(ConnectionError, match="ValidationError"):
        shard.call("exchange", b"\xc0").result(10)
    with pytest.raises(ConnectionError, match="no_such"):
        shard.call("no_such", b"").result(10)
    with pytest.raises(ConnectError, match="has no shard"):
        courier.shard(start=False, host="no such host")
    assert shard.call("where", b"").result(10) == NOTHING, "an error ended the courier"


def test_a_courier_that_is_killed_is_started_again(courier: Courier) -> None:
    shard = courier.shard(start=False)
    first = process_of(courier)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(ConnectionError):
        shard.call("where", b"").result(10)
    assert courier.shard(start=False).call("where", b"").result(10) == NOTHING
    assert process_of(courier) != first


def test_a_courier_that_hangs_is_given_up(
    courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier.shard(start=False)
    os.kill(process_of(courier), signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(client, "FIND_SECONDS", 0.5)
        with pytest.raises(ConnectError, match="did not answer"):
            courier.shard(start=False)
    assert courier.shard(start=False).call("where", b"").result(10) == NOTHING


def test_a_courier_ends_with_its_engine_which_is_no_driver(settings: Settings) -> None:
    program = (
        "import sys; from lmkv_ray.config import load_settings; from lmkv_ray.courier import "
        f"Courier\nits = Courier(load_settings({{'ray_address': {settings.ray_address!r}}}))\n"
        "its.shard(start=False).call('where', b'').result(10)\n"
        "print(its.pid, 'ray' in sys.modules, flush=True)\n"
        "import time; time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        pid, imported = engine.stdout.readline().split()
        assert imported == b"False", "the engine's side imports Ray"
        assert runs(int(pid))
        engine.kill()
    wait_for(lambda: not runs(int(pid)), 30)


def test_a_head_that_is_gone_is_an_error_within_seconds() -> None:
    courier = Courier(load_settings({"ray_address": "127.0.0.1:1"}))
    with pytest.raises(ConnectError, match="No Ray cluster answers"):
        courier.shard(start=True)
    courier.close()


def test_a_head_that_accepts_and_says_nothing_is_an_error_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ConnectError, match="No Ray cluster answers"):
            joining.cluster_id(f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() < began + 10


def test_a_note_of_a_dead_cluster_is_passed_over(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services, utils

    def heads() -> list[str]:
        return living

    heads.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(utils, "read_ray_address", lambda *_: "127.0.0.1:1")
    monkeypatch.setattr(services, "find_gcs_addresses", heads)
    living: list[str] = []
    assert joining._here() is None
    living = [str(settings.ray_address)]
    assert joining._here() == settings.ray_address


@contextmanager
def guarded_cluster(home: Path) -> Iterator[str]:
    """A cluster with a token, which lies in a home of its own; its address."""
    program = (
        "import ray, sys; ray.init(num_cpus=0, include_dashboard=False, configure_logging=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    home.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token"},
    ) as head:
        assert head.stdout is not None
        assert head.stdin is not None
        yield head.stdout.readline().decode().strip()
        head.stdin.close()


def test_the_token_of_this_machine_is_used_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with guarded_cluster(tmp_path / "theirs") as address:
        stranger = tmp_path / "stranger"
        stranger.mkdir()

        monkeypatch.setenv("HOME", str(stranger))
        with pytest.raises(ConnectError, match="token is missing or wrong"):
            cache_at(address)
        (stranger / ".ray").mkdir()
        (stranger / ".ray" / "auth_token").write_text("0" * 64)
        with pytest.raises(ConnectError, match="token is missing or wrong"):
            cache_at(address)
        monkeypatch.setenv("HOME", str(tmp_path / "theirs"))
        with pytest.raises(ConnectError, match="No cache runs"):
            cache_at(address)


def cache_at(address: str) -> None:
    """Look for a cache there; in a process of its own, as a token is read once a process."""
    courier = Courier(load_settings({"ray_address": address}))
    try:
        courier.shard(start=False)
    finally:
        courier.close()


def test_a_link_that_looks_for_ever_costs_no_memory(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        courier = CourierProcess(theirs)
        courier._settings = settings
        for _ in range(MOST_SHARDS + 2):
            monkeypatch.setattr(courier, "_still_joined", lambda: True)
            last = courier._find(Find(start=False, known="", host=None))
        assert len(courier._shards) == MOST_SHARDS
        assert last.shard in courier._shards
