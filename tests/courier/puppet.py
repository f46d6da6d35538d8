"""A courier without Ray that does what the variable ``PUPPET`` says."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

from lmkv_ray.child import watch
from lmkv_ray.courier.wire import Answer, Begin, Call, Find, FoundShard, Reply, Request
from lmkv_ray.framing import Incoming, framed

SLOW_SECONDS = 0.4


def serve(link: socket.socket, how: str) -> None:
    """Answer one request after the other until the engine is gone."""
    requests = Incoming(Request)
    while data := link.recv(1 << 18):
        for request in requests.feed(data):
            match request.command:
                case Begin():
                    continue
                case Find():
                    if how == "slow":
                        time.sleep(SLOW_SECONDS)
                    answer = framed(Answer(request.number, FoundShard(shard=1, cluster="c")))
                case Call(payload=payload):
                    answer = framed(Answer(request.number, Reply(payload=payload)))
                    match how:
                        case "garbage":
                            answer = b"\x03\x00\x00\x00\xc1\xc1\xc1" + answer
                        case "length":
                            answer = b"\xff\xff\xff\xff" + answer
                        case "half":
                            answer = answer[: len(answer) // 2]
                        case "mute":  # it can be heard no more, and does not end
                            link.shutdown(socket.SHUT_WR)
                            threading.Event().wait()
            link.sendall(answer)
            if how == "half":
                return


if __name__ == "__main__":
    link = socket.socket(fileno=int(sys.argv[2]))
    watch(int(sys.argv[1]), link)
    serve(link, os.environ["PUPPET"])
