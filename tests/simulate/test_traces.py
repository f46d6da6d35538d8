from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmkv_ray.errors import TraceError
from lmkv_ray.simulate import read_trace

BAILIAN = [
    {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 70, "type": "text"},
    {"chat_id": 9, "parent_chat_id": 7, "timestamp": 60.0, "input_length": 99, "type": "search"},
    {"chat_id": 8, "parent_chat_id": 9, "timestamp": 62.0, "input_length": 99, "type": "text"},
]


def write(path: Path, lines: list[dict[str, object]], ids: list[int]) -> Path:
    path.write_text("".join(json.dumps({**line, "hash_ids": ids}) + "\n" for line in lines))
    return path


def test_mooncake(mooncake: Path) -> None:
    trace = read_trace(mooncake)
    assert len(trace) == 120
    assert trace.chunk_tokens == 512
    assert [request.at for request in trace.requests][:3] == [0.0, 1.0, 2.0]
    first, second = trace.requests[:2]
    assert first.tokens == 2048
    assert first.keys[:2] == second.keys[:2]
    assert first.keys[2] != second.keys[2]


def test_bailian(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", BAILIAN, [1, 2, 3, 4, 5]), chunk_tokens=20)
    assert trace.chunk_tokens == 32, "whole blocks of 16"
    assert [request.at for request in trace.requests] == [60.0, 61.5, 62.0], "in order of time"
    assert {len(request.keys) for request in trace.requests} == {2}, "the rest is no chunk"
    assert trace.requests[0].keys == [n.to_bytes(16, "little") for n in (2, 4)]
    assert [request.session for request in trace.requests] == ["7", "7", "7"]
    assert [request.category for request in trace.requests] == ["search", "text", "text"]


@pytest.mark.parametrize("line", ["{", '{"timestamp": 1}', '{"timestamp":1,"input_length":"x"}'])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t"
    path.write_text('{"timestamp": 1, "input_length": 1, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(TraceError, match="Line 2"):
        read_trace(path)


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="empty"):
        read_trace(tmp_path / "empty")
