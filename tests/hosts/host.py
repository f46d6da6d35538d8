"""One host: namespaces that live as long as their process 1."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_apps.model import CHECKOUT
from tests.hosts.remote import Remote

START_SECONDS = 120.0
PACKAGES = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
SSH_PACKAGES = {"/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}


def why_not(*, ssh: bool = False) -> str | None:
    """Why this machine cannot have hosts (that can be reached by SSH); None: it can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for tool, package in (PACKAGES | (SSH_PACKAGES if ssh else {})).items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install {package}"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    attempt = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False
    )
    return None if attempt.returncode == 0 else "this container may not make namespaces"


class Host:
    """A host. Made by ``Hosts``.

    Args:
        number: 1 to 254; makes its addresses.
        shm: size of its /dev/shm, as mount takes it.
        key: a public SSH key that may log in; none: no SSH server.
    """

    def __init__(self, number: int, *, shm: str = "1g", key: str = "") -> None:
        self.number = number
        self.name = f"host{number}"
        self.ip = f"10.77.0.{number}"
        self._remotes: list[Remote] = []
        ours, theirs = socket.socketpair()
        flags = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        pid1 = [sys.executable, str(Path(__file__).with_name("pid1.py")), self.name]
        pid1 += [f"02:00:00:00:00:{number:02x}", self.ip, shm, key]
        pid1 += [str(CHECKOUT), sys.prefix, sys.base_prefix]
        self._process = subprocess.Popen(["unshare", *flags, *pid1], stdin=theirs.fileno())
        theirs.close()
        ours.settimeout(START_SECONDS)
        self._socket = ours
        ready, taps, _, _ = socket.recv_fds(ours, 16, 1)
        assert ready == b"ready", f"{self.name} did not start; its words are above"
        self.tap = taps[0]
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid1 = int(children.read_text())

    def run(
        self,
        command: Sequence[str] | str,
        *,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command (a text: in bash) and return what it says on standard output.

        Raises:
            AssertionError: it failed; the message has its words.
            subprocess.TimeoutExpired: it took too long.
        """
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            self.enter(words),
            env=environment(env or {}),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, f"on {self.name}: {command} failed: {said[-4000:]}"
        return done.stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of this host."""
        there = f"/proc/{self.pid1}/root{path}"
        Path(there).write_text(text)
        Path(there).chmod(mode)

    def remote(
        self, kind: str, *args: Any, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> Remote:
        """An object of class ``kind`` ("module:Class") in a process of this host."""
        made = Remote(self.enter, environment(env or {}), kind, args, kwargs)
        self._remotes.append(made)
        return made

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Signal a process of this host (by the pid it has there)."""
        self.run(["kill", f"-{number}", str(pid)])

    def pids(self, pattern: str) -> list[int]:
        """The host's processes whose command line matches."""
        command = self.enter(["pgrep", "--full", "--", pattern])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on this host."""
        # nsenter's own --wd is a directory of ours, not of the host.
        inside = ["nsenter", "--target", str(self.pid1), "--all", "--"]
        return [*inside, "env", "--chdir=/root", *command]

    def close(self) -> None:
        """End all processes of the host, and with them the host."""
        for remote in self._remotes:
            remote.close()
        self._socket.close()
        try:
            self._process.wait(START_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Of a host's processes: nothing of ours."""
    path = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    base = {
        "PATH": path,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(CHECKOUT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    return base | dict(more)
