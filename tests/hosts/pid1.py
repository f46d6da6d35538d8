"""Process 1 of a host. Run by ``Host`` in new namespaces, with a socket as standard input.

Imports the standard library only: it runs before the host has anything else.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MTU = 60_000
"""Large frames: the switch is a Python program, and works by the frame."""


def main(name: str, mac: str, address: str, shm: str, key: str, *needed: str) -> None:
    """Become a host; end when the socket closes, and with us all processes of the host."""
    parent = socket.socket(fileno=0)
    socket.sethostname(name)
    isolate_files(shm, needed)
    tap = plug_in(mac, address)
    with Path("/etc/hosts").open("a") as file:
        file.write(f"{address} {name}\n")
    if key:
        start_sshd(key)
    socket.send_fds(parent, [b"ready"], [tap])
    os.close(tap)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are ours: do not keep their zombies
    while parent.recv(1):
        pass


def isolate_files(shm: str, needed: tuple[str, ...]) -> None:
    """See this machine's files, and keep what is written to oneself, in memory."""
    run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
    for part in ("changes", "work", "root"):
        Path("/mnt", part).mkdir()
    options = "lowerdir=/,upperdir=/mnt/changes,workdir=/mnt/work"
    run("mount", "-t", "overlay", "overlay", "-o", options, "/mnt/root")
    for path in ("/dev", "/sys", *needed):
        # An overlay shows one file system, without what is mounted on it.
        if os.stat(path).st_dev != os.stat("/").st_dev:  # noqa: PTH116
            run("mount", "--rbind", path, f"/mnt/root{path}")
    run("mount", "-t", "proc", "proc", "/mnt/root/proc")
    run("mount", "-t", "tmpfs", "-o", f"size={shm}", "tmpfs", "/mnt/root/dev/shm")
    os.chdir("/mnt/root")
    run("pivot_root", ".", "mnt")
    os.chdir("/")
    run("umount", "--lazy", "/mnt")
    for path in ("/tmp/ray", "/root/.ray", "/root/.ssh"):
        run("rm", "-rf", path)


def plug_in(mac: str, address: str) -> int:
    """Make the network card; its cable is the file descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "set", "eth0", "address", mac, "mtu", str(MTU), "up")
    run("ip", "address", "add", f"{address}/24", "dev", "eth0")
    # Leads nowhere; but programs find their own address by asking which one it would be used with.
    run("ip", "route", "add", "default", "dev", "eth0")
    return tap


def start_sshd(key: str) -> None:
    """Let the owner of a key in, as root."""
    ssh = Path("/root/.ssh")
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text(key)
    Path("/run/sshd").mkdir(exist_ok=True)
    run("rm", "-f", "/etc/ssh/ssh_host_host_key")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_host_key")
    settings = ("HostKey=/etc/ssh/ssh_host_host_key", "UsePAM=no", "PermitRootLogin=yes")
    run("/usr/sbin/sshd", "-f", "/dev/null", *(word for s in settings for word in ("-o", s)))


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
