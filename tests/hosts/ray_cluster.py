"""Ray on hosts, started as a user starts it."""

from __future__ import annotations

from tests.hosts.host import Host

PORT = 6379
OBJECT_STORE = 100 << 20
START_SECONDS = 120.0
ATTEMPTS = 3
"""Ray gives a raylet 30 s to start, which on a machine that is busy enough is too little."""


def address(head: Host) -> str:
    """Of the cluster whose head runs on a host."""
    return f"{head.ip}:{PORT}"


def start_head(host: Host, **env: str) -> None:
    """``ray start --head``."""
    _start(host, f"--head --port={PORT} --include-dashboard=false", env)


def join(host: Host, head: Host, **env: str) -> None:
    """``ray start --address``."""
    _start(host, f"--address={address(head)}", env)


def stop(host: Host) -> None:
    """``ray stop``, at once."""
    host.run("ray stop --force --grace-period 0")


def _start(host: Host, role: str, env: dict[str, str]) -> None:
    options = f"--node-ip-address={host.ip} --num-cpus=1 --object-store-memory={OBJECT_STORE}"
    options += " --disable-usage-stats"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            host.run(f"ray start {role} {options}", timeout=START_SECONDS, env=env)
            return
        except AssertionError:
            if attempt == ATTEMPTS:
                raise
            stop(host)
