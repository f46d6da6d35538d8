"""Hosts are apart, their network breaks as told, and nothing of them outlives its maker."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path as File

import pytest

from tests.hosts import Host, Hosts, Path, Remote, why_not

MAKER = """
from tests.hosts import Hosts
hosts = Hosts(2)
hosts[0].run("sleep 1000 > /dev/null 2>&1 &")
print(*(host.pid1 for host in hosts), flush=True)
input()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(3) as made:
        yield made
        made.heal()


@pytest.fixture
def echoes(hosts: Hosts) -> Iterator[list[Remote]]:
    made = [host.remote("tests.hosts.echo:Echo").wait_made() for host in hosts]
    yield made
    hosts.heal()
    for echo in made:
        echo.close()


def test_hosts_share_nothing(hosts: Hosts) -> None:
    a, b, _ = hosts
    for directory in ("/tmp", "/root", "/dev/shm", "/etc"):
        a.write(f"{directory}/only-here", "x")
        assert not File(directory, "only-here").exists()
        assert "only-here" not in b.run(f"ls {directory}")
    assert a.run("hostname").strip() == "host1"
    assert int(a.run("ls -d /proc/[0-9]* | wc -l")) < 10
    with pytest.raises(AssertionError, match="host1: false failed"):
        a.run("false")


def test_a_network_that_can_be_cut(hosts: Hosts, echoes: list[Remote]) -> None:
    (a, b, c), (at_a, _, at_c) = hosts, echoes
    assert at_a.call("hears", b.ip)
    assert at_a.call("hears", c.ip)
    hosts.cut(a, b)
    assert not at_a.call("hears", b.ip)
    assert at_a.call("hears", c.ip)
    hosts.cut(a)
    assert not at_a.call("hears", c.ip)
    assert at_c.call("hears", b.ip)
    hosts.heal()
    assert at_a.call("hears", b.ip)


def test_a_cable_that_is_cut_one_way(hosts: Hosts, echoes: list[Remote]) -> None:
    a, b, _ = hosts
    echoes[1].call("listen", 700)
    hosts.cut_one_way(b, a)
    assert not echoes[0].call("hears", b.ip)  # the question arrives, the answer does not
    hosts.cut_one_way(a, b)
    with pytest.raises(TimeoutError):
        echoes[0].call("send", b.ip, 700, b"x")


def test_a_long_line(hosts: Hosts, echoes: list[Remote]) -> None:
    hosts.degrade(Path(delay=0.1))
    assert echoes[0].call("ping", hosts[1].ip) >= 0.2


def test_a_lossy_line(hosts: Hosts, echoes: list[Remote]) -> None:
    hosts.degrade(Path(loss=0.5))
    heard = [echoes[0].call("hears", hosts[1].ip, 0.05) for _ in range(40)]
    assert 0 < sum(heard) < 40


def test_a_line_that_changes_bytes(hosts: Hosts, echoes: list[Remote]) -> None:
    sent = bytes(range(256)) * 4000
    hosts.degrade(Path(damage=0.5))
    echoes[1].call("listen", 701)
    echoes[1].start("receive")
    echoes[0].call("send", hosts[1].ip, 701, sent)
    received = echoes[1].result()
    assert len(received) == len(sent), "TCP noticed it"
    assert received != sent
    assert hosts.switch.damaged > 0


def test_nothing_outlives_a_killed_maker() -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, "-c", MAKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        pids = maker.stdout.readline().split()
        assert len(pids) == 2
        maker.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if File("/proc", pid.decode()).exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def test_a_process_of_a_host_is_killed_by_its_number_there(hosts: Hosts) -> None:
    echo = hosts[0].remote("tests.hosts.echo:Echo").wait_made()
    assert isinstance(hosts[0], Host)
    assert echo.pid in hosts[0].pids("tests.hosts.remote")
    hosts[0].kill(echo.pid)
    with pytest.raises((EOFError, ConnectionError)):
        echo.call("hears", hosts[1].ip)
    echo.close()
    assert hosts[0].pids("tests.hosts.remote") == []
