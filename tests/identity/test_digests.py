"""Digests of files: all bytes, read once, and believed only while the file is the same."""

from __future__ import annotations

import os
import stat
import time
from hashlib import sha256
from pathlib import Path

import pytest

from lmkv_ray.identity import DigestMemory, FileDigests, StoppedError
from lmkv_ray.identity import digests as module


def later() -> float:
    """A clock for which files that were just written have settled."""
    return time.time() + 60


@pytest.fixture
def memory(tmp_path: Path) -> DigestMemory:
    return DigestMemory(tmp_path / "cache" / "digests")


def reader(memory: DigestMemory | None) -> FileDigests:
    return FileDigests(memory, now=later)


def write(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return sha256(content).hexdigest()


def test_every_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    files = [tmp_path / str(i) for i in range(5)]
    wanted = [write(file, os.urandom(1000 * i + i)) for i, file in enumerate(files)]
    assert reader(None).of(files) == wanted


def test_a_second_start_reads_nothing(tmp_path: Path, memory: DigestMemory) -> None:
    file = tmp_path / "w"
    wanted = write(file, b"weights")
    first, second = reader(memory), reader(memory)
    assert [first.of([file]), second.of([file])] == [[wanted], [wanted]]
    assert (first.bytes_read, second.bytes_read) == (7, 0)


def test_a_file_that_was_changed_is_read_again_even_if_its_mtime_was_set_back(
    tmp_path: Path, memory: DigestMemory
) -> None:
    file = tmp_path / "w"
    write(file, b"weights")
    reader(memory).of([file])
    seen = file.stat()
    while file.stat().st_ctime_ns == seen.st_ctime_ns:  # until the file system's clock has ticked
        other = write(file, b"WEIGHTS")
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert file.stat().st_mtime_ns == seen.st_mtime_ns
    assert reader(memory).of([file]) == [other]


def test_a_file_in_the_place_of_another_is_read(tmp_path: Path, memory: DigestMemory) -> None:
    file, other = tmp_path / "w", tmp_path / "other"
    write(file, b"weights")
    reader(memory).of([file])
    wanted = write(other, b"WEIGHTS")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert reader(memory).of([file]) == [wanted]


@pytest.mark.parametrize(("kind", "read"), [("ext4", 0), ("squashfs", 7), ("erofs", 7)])
def test_what_lies_on_an_image_without_times_of_its_own_is_not_remembered(
    kind: str, read: int, tmp_path: Path, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mounts = tmp_path / "w", tmp_path / "mountinfo"
    write(file, b"weights")
    device = file.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts.write_text(
        f"36 35 0:999 / /x rw - squashfs a rw\n37 35 {number} / /m ro shared:1 - {kind} /dev/l ro\n"
    )
    monkeypatch.setattr("lmkv_ray.identity.memory.MOUNTS", mounts)
    for _ in range(2):
        digests = reader(memory)
        digests.of([file])
    assert digests.bytes_read == read


def test_a_file_that_is_still_young_is_not_remembered(tmp_path: Path, memory: DigestMemory) -> None:
    file = tmp_path / "w"
    write(file, b"weights")
    FileDigests(memory, now=lambda: file.stat().st_mtime + 0.1).of([file])
    again = reader(memory)
    again.of([file])
    assert again.bytes_read == 7


def test_a_file_that_changes_while_it_is_read_has_no_digest(
    tmp_path: Path, memory: DigestMemory
) -> None:
    file = tmp_path / "w"
    write(file, b"weights")

    def grows() -> float:
        with file.open("ab") as opened:
            opened.write(b"!")
        return later()

    with pytest.raises(OSError, match="changed while it was read"):
        FileDigests(memory, now=grows).of([file])
    again = reader(memory)
    again.of([file])
    assert again.bytes_read == 8


def test_notes_are_private_and_bounded(
    tmp_path: Path, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv_ray.identity.memory.MAX_REMEMBERED", 8)
    files = [tmp_path / str(i) for i in range(20)]
    for file in files:
        write(file, file.name.encode())
    reader(memory).of(files)
    notes = list((tmp_path / "cache" / "digests").iterdir())
    assert 1 <= len(notes) <= 8
    assert {stat.S_IMODE(note.stat().st_mode) for note in notes} == {0o600}
    assert stat.S_IMODE(notes[0].parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("forge", ["owner", "others_may_write", "link", "garbage"])
def test_notes_that_others_could_have_written_are_not_believed(
    forge: str, tmp_path: Path, memory: DigestMemory
) -> None:
    file = tmp_path / "w"
    wanted = write(file, b"weights")
    reader(memory).of([file])
    [note] = (tmp_path / "cache" / "digests").iterdir()
    note.write_bytes(note.read_bytes().replace(wanted.encode(), b"0" * 64))
    assert reader(memory).of([file]) == ["0" * 64], "the test's forgery is none"
    if forge == "owner":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(note, 12345, 12345)
    elif forge == "others_may_write":
        note.chmod(0o666)
    elif forge == "link":
        note.rename(tmp_path / "elsewhere")
        note.symlink_to(tmp_path / "elsewhere")
    else:
        note.write_bytes(b"{")
    assert reader(memory).of([file]) == [wanted]


def test_a_directory_that_others_can_write_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    file = tmp_path / "w"
    wanted = write(file, b"weights")
    assert reader(DigestMemory(shared)).of([file]) == [wanted]
    assert not list(shared.iterdir())
    assert "only this user can write" in caplog.text


def blob(cache: Path, content: bytes, name: str) -> Path:
    """A file of a cache of Hugging Face, by the link that models are loaded through."""
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "blobs" / name).write_bytes(content)
    link = cache / "snapshots" / "1" / "model.safetensors"
    link.symlink_to(Path("../../blobs") / name)
    return link


def test_a_cache_that_names_files_by_their_sha256_is_believed(tmp_path: Path) -> None:
    name = sha256(b"weights").hexdigest()
    link, copy = blob(tmp_path / "hub", b"weights", name), tmp_path / "copy"
    digests = reader(None)
    assert digests.of([link]) == [name]
    assert digests.bytes_read == 0
    write(copy, b"weights")
    assert digests.of([copy]) == [name], "the same weights in a directory are the same"


def test_a_blob_that_was_written_after_it_was_linked_is_read(tmp_path: Path) -> None:
    link = blob(tmp_path / "hub", b"weights", sha256(b"weights").hexdigest())
    seen = link.lstat().st_mtime_ns
    link.write_bytes(b"a fine-tune")
    os.utime(link, ns=(seen + 1, seen + 1))
    assert reader(None).of([link]) == [sha256(b"a fine-tune").hexdigest()]


def test_a_blob_that_was_written_and_set_back_is_read(tmp_path: Path) -> None:
    link = blob(tmp_path / "hub", b"weights", sha256(b"weights").hexdigest())
    seen = link.stat()
    while link.stat().st_ctime_ns <= link.lstat().st_ctime_ns:  # until the clock has ticked
        link.write_bytes(b"WEIGHTS")
        os.utime(link, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert reader(None).of([link]) == [sha256(b"WEIGHTS").hexdigest()]


def test_a_blob_with_another_kind_of_name_is_read(tmp_path: Path) -> None:
    link = blob(tmp_path / "hub", b"config", "0" * 40)
    assert reader(None).of([link]) == [sha256(b"config").hexdigest()]


def test_reading_ends_when_the_engine_does(tmp_path: Path) -> None:
    file = tmp_path / "w"
    write(file, b"weights")
    digests = reader(None)
    digests.stop()
    with pytest.raises(StoppedError):
        digests.of([file])
