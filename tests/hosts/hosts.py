"""Some hosts and the network between them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path as File
from types import TracebackType

from tests.hosts.host import Host
from tests.hosts.switch import Path, Switch


class Hosts(Sequence[Host]):
    """``with Hosts(2) as (a, b): a.run("ping -c 1 " + b.ip)``.

    Args:
        count: how many.
        shm: size of each one's /dev/shm.
        ssh: run an SSH server on each, with the key ``key_file`` for root.
    """

    def __init__(self, count: int, *, shm: str = "1g", ssh: bool = False) -> None:
        self._hosts: list[Host] = []
        self._directory = tempfile.TemporaryDirectory(prefix="hosts-")
        self.key_file = File(self._directory.name, "key")
        key = self._make_key() if ssh else ""
        self.switch = Switch()
        try:
            for number in range(1, count + 1):
                host = Host(number, shm=shm, key=key)
                self._hosts.append(host)
                self.switch.plug(number, host.tap)
        except BaseException:
            self.close()
            raise

    def cut(self, a: Host, *others: Host) -> None:
        """Nothing passes between a host and others (default: all), in either direction."""
        for b in others or self._but(a):
            self.set_paths(a, b, Path(cut=True))

    def cut_one_way(self, source: Host, target: Host) -> None:
        """Nothing passes from one host to another; the other way it does."""
        self.switch.set_path(source.number, target.number, Path(cut=True))

    def degrade(self, path: Path) -> None:
        """All cables are like this, in both directions."""
        for a in self:
            for b in self._but(a):
                self.set_paths(a, b, path)

    def set_paths(self, a: Host, b: Host, path: Path) -> None:
        """Both directions between two hosts."""
        self.switch.set_path(a.number, b.number, path)
        self.switch.set_path(b.number, a.number, path)

    def heal(self) -> None:
        """The network is good again."""
        self.switch.heal()

    def close(self) -> None:
        """End all hosts."""
        for host in self._hosts:
            host.close()
        self.switch.close()
        self._directory.cleanup()

    def _but(self, host: Host) -> list[Host]:
        return [other for other in self._hosts if other is not host]

    def _make_key(self) -> str:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key_file)]
        subprocess.run(command, check=True)
        return self.key_file.with_suffix(".pub").read_text()

    def __getitem__(self, index: int) -> Host:  # type: ignore[override]
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
