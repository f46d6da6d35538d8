"""Encryption at rest."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lmkv_ray.errors import ConfigError, TierError, UnsupportedError
from lmkv_ray.fetch import Failure
from lmkv_ray.ownership import trouble_with_secret
from lmkv_ray.tiers.cipher import AesGcm, load_cipher
from lmkv_ray.tiers.format import ChunkHeader, Label
from tests.tiers.harness import (
    COUNT,
    SECONDS,
    DiskHarness,
    content_of,
    fetch,
    secret,
    slots,
    some_keys,
    store,
)

KEYS = some_keys()
LABEL = Label(b"k" * 16, 5, 1000)
CHUNK = content_of(b"k" * 16, 1000)
NONCE = bytes(range(12))


def sealed(cipher: AesGcm, label: Label = LABEL) -> memoryview:
    out = memoryview(bytearray(len(CHUNK) + cipher.overhead))
    cipher.seal(label, NONCE, CHUNK, out)
    return out


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return secret(tmp_path / "key", "ab" * 32 + "\n")


def test_only_the_same_key_and_label_open_it() -> None:
    cipher = AesGcm(b"m" * 32)
    stored = sealed(cipher)
    out = np.zeros(1000, np.uint8)
    assert AesGcm(b"m" * 32).open(LABEL, NONCE, stored, out.data)
    assert (out == CHUNK).all()
    for label in (Label(b"K" * 16, 5, 1000), Label(b"k" * 16, 6, 1000)):
        assert not cipher.open(label, NONCE, stored, out.data)
    assert not cipher.open(LABEL, bytes(12), stored, out.data)
    assert not AesGcm(b"n" * 32).open(LABEL, NONCE, stored, out.data)
    stored[500] ^= 1
    assert not cipher.open(LABEL, NONCE, stored, out.data)


def test_spaces_have_different_keys_and_nothing_repeats() -> None:
    cipher = AesGcm(b"m" * 32)
    here, there = sealed(cipher), sealed(cipher, Label(LABEL.key, 6, 1000))
    assert bytes(here[:1000]) != bytes(there[:1000])
    assert cipher.suite == AesGcm(b"m" * 32).suite != AesGcm(b"n" * 32).suite


async def test_nothing_readable_is_on_the_disk(disk: DiskHarness, key_file: Path) -> None:
    tier = await disk.open(key_file=key_file)
    assert all(await store(tier, KEYS))
    files = [disk.file(key.tobytes()).read_bytes() for key in KEYS]
    for key, file in zip(KEYS, files, strict=True):
        assert content_of(key.tobytes(), 64).tobytes() not in file
        header = ChunkHeader.unpack(file[:4096])
        assert header is not None
        assert header.checksum == 0, "which would say which text it is"
    nonces = {ChunkHeader.unpack(file[:4096]).nonce for file in files}  # type: ignore[union-attr]
    assert len(nonces) == COUNT
    await tier.close()


@pytest.mark.parametrize("before", ["other key", "no key"])
async def test_with_another_key_the_tier_is_refused_and_nothing_is_removed(
    disk: DiskHarness, key_file: Path, before: str
) -> None:
    other = secret(key_file.with_name("other"), "cd" * 32)
    options = {"key_file": other if before == "other key" else None}
    tier = await disk.open(**options)
    assert all(await store(tier, KEYS))
    await tier.close()
    with pytest.raises(TierError, match=rf"{COUNT} chunks.*LMKV_ENCRYPTION_KEY_FILE"):
        await disk.open(key_file=key_file)
    tier = await disk.open(**options)
    assert all(outcome.ok for outcome in await fetch(tier, KEYS, slots(COUNT)))
    await tier.close()


async def test_a_file_that_only_claims_to_be_of_this_key_is_corrupt(
    disk: DiskHarness, key_file: Path
) -> None:
    other = secret(key_file.with_name("other"), "cd" * 32)
    tier = await disk.open(key_file=other)
    assert all(await store(tier, KEYS[:1]))
    await tier.close()
    file = disk.file(KEYS[0].tobytes())
    cipher = load_cipher(key_file)
    assert cipher is not None
    file.rename(file.with_suffix(f".{cipher.suite}"))
    tier = await disk.open(key_file=key_file)
    into = slots(1)
    assert (await fetch(tier, KEYS[:1], into))[0].failure == Failure.CORRUPT
    await tier.close()


@pytest.mark.parametrize("content", [None, b"", b"short", b"\n" * 64, bytes(64)])
def test_a_key_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        secret(path, content.decode())
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        load_cipher(path)


def test_a_key_file_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "key"
    os.mkfifo(pipe, 0o600)
    # A daemon, for where it waits for ever.
    loading = threading.Thread(target=_refused, args=(pipe,), daemon=True)
    loading.start()
    loading.join(SECONDS)
    assert not loading.is_alive()


def _refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        load_cipher(path)


def test_without_the_package_the_extra_is_named(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(UnsupportedError, match=r"lmkv-ray\[encryption\]"):
        load_cipher(key_file)


def status(uid: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))


def test_a_key_file_that_others_can_read_is_refused(key_file: Path) -> None:
    for mode in (0o640, 0o604, 0o620, 0o601):
        key_file.chmod(mode)
        with pytest.raises(ConfigError, match=f"chmod go= {key_file}"):
            load_cipher(key_file)
    key_file.chmod(0o400)
    assert load_cipher(key_file) is not None


@pytest.mark.parametrize(
    ("uid", "mode", "refused"),
    [
        (1000, 0o600, False),
        (1000, 0o640, True),
        (0, 0o640, False),
        (0, 0o644, True),
        (0, 0o660, True),
        (1001, 0o600, True),
    ],
)
def test_whose_secrets_are_used(
    uid: int, mode: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the superuser, which a group may read: so secrets are mounted."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (trouble_with_secret(status(uid, mode), Path("key")) is not None) == refused
