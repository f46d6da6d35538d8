"""Answers datagrams, and asks others for answers (``Host.remote``)."""

from __future__ import annotations

import socket
import threading
import time

PORT = 7


class Echo:
    """An echo server in a thread."""

    def __init__(self) -> None:
        self._server = socket.socket(type=socket.SOCK_DGRAM)
        self._server.bind(("", PORT))
        threading.Thread(target=self._serve, daemon=True).start()

    def ping(self, ip: str, timeout: float = 2.0) -> float | None:
        """Seconds until an answer came; None: none came in time."""
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(timeout)
            began = time.monotonic()
            client.sendto(b"x", (ip, PORT))
            try:
                client.recv(8)
            except TimeoutError:
                return None
            return time.monotonic() - began

    def hears(self, ip: str, timeout: float = 0.3) -> bool:
        """Whether an answer comes."""
        return self.ping(ip, timeout) is not None

    def send(self, ip: str, port: int, data: bytes) -> None:
        """Send bytes by TCP."""
        with socket.create_connection((ip, port), timeout=1) as connection:
            connection.sendall(data)

    def listen(self, port: int) -> None:
        """Be ready to ``receive`` there."""
        self._listener = socket.create_server(("", port))

    def receive(self) -> bytes:
        """All that one connection sends."""
        connection, _ = self._listener.accept()
        with connection:
            parts = []
            while part := connection.recv(1 << 20):
                parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """End."""

    def _serve(self) -> None:
        while True:
            data, sender = self._server.recvfrom(64)
            self._server.sendto(data, sender)
