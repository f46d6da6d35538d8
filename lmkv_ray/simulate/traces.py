"""Requests of the past, from the trace formats people have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from lmkv_ray.errors import TraceError
from lmkv_ray.keys import KEY_BYTES

Format = Literal["auto", "mooncake", "bailian"]


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One prompt, as chunks."""

    at: float
    """Seconds since the trace began."""
    tokens: int
    """Length of the prompt."""
    keys: list[bytes]
    """Its chunks, head first. Equal keys are equal prefixes."""
    session: str = ""
    category: str = ""


@dataclass(frozen=True)
class Trace:
    """Requests in order of time."""

    requests: list[TracedRequest]
    chunk_tokens: int
    """Tokens in one chunk."""

    def __len__(self) -> int:
        return len(self.requests)


class _Mooncake(msgspec.Struct):
    """A line of the Mooncake format: blocks of 512 tokens, milliseconds."""

    timestamp: float
    input_length: int
    hash_ids: list[int]


class _Bailian(msgspec.Struct):
    """A line of the Qwen-Bailian format: blocks of 16 tokens, seconds."""

    timestamp: float
    input_length: int
    hash_ids: list[int]
    chat_id: int
    parent_chat_id: int = -1
    type: str = ""


BLOCK_TOKENS = {"mooncake": 512, "bailian": 16}


def read_trace(path: Path, *, format: Format = "auto", chunk_tokens: int = 256) -> Trace:
    """Read a whole trace.

    Formats: ``mooncake`` (kvcache-ai/Mooncake, FAST25 traces) and ``bailian``
    (alibaba-edu/qwen-bailian-usagetraces-anon), both JSON lines in which equal ids in ``hash_ids``
    mean equal prefixes; ``auto`` looks at the first line. Chats of Bailian traces are sessions, and
    their type is the category.

    Args:
        path: the file that holds the trace.
        format: of its lines.
        chunk_tokens: rounded up to whole blocks of the trace. A chunk of several blocks has the id
            of its last one; what is left at the end of a prompt is no chunk.

    Raises:
        TraceError: there is no such file, or a line is not what it should be.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
            file.seek(0)
            kind = format if format != "auto" else _guess(first)
            block_tokens = BLOCK_TOKENS[kind]
            blocks = -(-chunk_tokens // block_tokens)
            lines = (_decode(line, number, kind, path) for number, line in enumerate(file, 1))
            requests = list(_requests(lines, blocks))
    except OSError as error:
        raise TraceError(
            f"The trace {path} cannot be read: {error.strerror}.",
            next_step="name a file of JSON lines, for instance a Mooncake trace.",
        ) from error
    if not requests:
        raise TraceError(f"The trace {path} is empty.", next_step="name a file with requests.")
    requests.sort(key=lambda request: request.at)
    return Trace(requests, blocks * block_tokens)


def _guess(line: bytes) -> str:
    return "bailian" if b'"chat_id"' in line else "mooncake"


_DECODERS: dict[str, msgspec.json.Decoder[_Mooncake] | msgspec.json.Decoder[_Bailian]] = {
    "mooncake": msgspec.json.Decoder(_Mooncake),
    "bailian": msgspec.json.Decoder(_Bailian),
}


def _decode(line: bytes, number: int, kind: str, path: Path) -> _Mooncake | _Bailian:
    try:
        return _DECODERS[kind].decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(
            f"Line {number} of {path} is not a request of the {kind} format: {error}.",
            next_step="mend the line, or name the trace's format.",
        ) from error


def _requests(lines: Iterator[_Mooncake | _Bailian], blocks: int) -> Iterator[TracedRequest]:
    known: dict[int, bytes] = {}  # one object for each key
    root_of: dict[int, int] = {}
    for line in lines:
        ids = line.hash_ids[blocks - 1 :: blocks]
        keys = [known.get(i) or known.setdefault(i, _key(i)) for i in ids]
        if isinstance(line, _Bailian):
            root = root_of.get(line.parent_chat_id, line.chat_id)
            root_of[line.chat_id] = root
            yield TracedRequest(line.timestamp, line.input_length, keys, str(root), line.type)
        else:
            yield TracedRequest(line.timestamp / 1000, line.input_length, keys)


def _key(number: int) -> bytes:
    return (number & (1 << 8 * KEY_BYTES) - 1).to_bytes(KEY_BYTES, "little")
