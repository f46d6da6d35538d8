"""Chunks encrypted at rest: AES-256-GCM, a key for each space.

The master key is the content of a file. HKDF-SHA256 derives from it a key for each space (so
tenants have different keys: see ``tenants``) and a short id that names the master key without
revealing it. Nonces are random; one key may seal 2**32 chunks (NIST SP 800-38D, 8.3), which is
8 PiB of chunks of 2 MiB written for one space. Key, space and size are authenticated with the
payload, so no chunk can be passed off as another. Not hidden: names (digests of text), sizes and
times.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmkv_ray.clock import Clock
from lmkv_ray.errors import ConfigError, UnsupportedError
from lmkv_ray.ownership import trouble_with_secret
from lmkv_ray.tiers.format import Label

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
MIN_KEY_BYTES = 32
MAX_FILE_BYTES = 1 << 16
PLAIN = "plain1"
"""The suite without encryption."""
NONCE_BYTES = 12
MAX_NBYTES = (1 << 31) - 1 - 16
"""What one call of the library can seal."""


class Cipher(Protocol):
    """Turns chunks into what is stored, and back."""

    suite: str
    """Part of names: what has another suite (another master key) is not ours to read."""
    overhead: int
    """Bytes by which what is stored is longer."""

    def seal(
        self, label: Label, nonce: bytes, chunk: npt.NDArray[np.uint8], out: memoryview
    ) -> None:
        """Encrypt into ``out``, ``overhead`` longer than the chunk."""
        ...

    def open(self, label: Label, nonce: bytes, stored: memoryview, out: memoryview) -> bool:
        """Decrypt; False if it is not what was sealed, and ``out`` holds garbage."""
        ...


class AesGcm:
    """See the module.

    Args:
        master: at least 32 bytes.

    Raises:
        UnsupportedError: the package ``cryptography`` is missing or too old.
    """

    overhead = 16

    def __init__(self, master: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise _missing(f"cannot be imported ({error})") from error
        if not hasattr(AESGCM, "decrypt_into"):
            raise _missing("is too old")

        def derive(purpose: bytes, length: int) -> bytes:
            return HKDF(SHA256(), length, salt=None, info=b"lmkv_ray disk 1 " + purpose).derive(
                master
            )

        self._invalid = InvalidTag
        self._of_space = lru_cache(maxsize=1024)(
            lambda space: AESGCM(derive(b"space " + space.to_bytes(8, "little"), 32))
        )
        self.suite = f"aes1-{derive(b'id', 8).hex()}"

    def seal(
        self, label: Label, nonce: bytes, chunk: npt.NDArray[np.uint8], out: memoryview
    ) -> None:
        """See ``Cipher``."""
        bound = label.bound(self.overhead)
        self._of_space(label.space).encrypt_into(nonce, chunk.data, bound, out)

    def open(self, label: Label, nonce: bytes, stored: memoryview, out: memoryview) -> bool:
        """See ``Cipher``."""
        bound = label.bound(self.overhead)
        try:
            self._of_space(label.space).decrypt_into(nonce, stored, bound, out)
        except self._invalid:
            return False
        return True


def load_cipher(key_file: Path | None) -> Cipher | None:
    """The cipher of a master key file; None without one.

    Raises:
        ConfigError: the file cannot be read, is too short to hold a key, or others can read it.
        UnsupportedError: as ``AesGcm``.
    """
    if key_file is None:
        return None
    try:
        # What is no file must not make us wait: a pipe that has no writer.
        with os.fdopen(os.open(key_file, _READ), "rb") as file:
            status = os.fstat(file.fileno())
            trouble = trouble_with_secret(status, key_file)
            regular = stat.S_ISREG(status.st_mode)
            master = file.read(MAX_FILE_BYTES).strip() if regular else b""
    except OSError as error:
        raise ConfigError(
            f"The key file {key_file} cannot be read: {error.strerror}.", next_step=_MAKE_KEY
        ) from error
    if trouble is not None:
        raise ConfigError(f"The key file {key_file} {trouble[0]}.", next_step=f"{trouble[1]}.")
    if not any(master):  # a file of zeros is what a crash leaves of one that was being written
        master = b""
    if len(master) < MIN_KEY_BYTES:
        raise ConfigError(
            f"The key file {key_file} has {len(master)} bytes; a key has {MIN_KEY_BYTES} or more.",
            next_step=_MAKE_KEY,
        )
    return AesGcm(master)


def suite_of(cipher: Cipher | None) -> str:
    """What chunks are called that were stored with it."""
    return cipher.suite if cipher else PLAIN


def new_nonce(clock: Clock) -> bytes:
    """Random, as several processes may seal with one key."""
    return clock.random_bytes(NONCE_BYTES)


_MAKE_KEY = (
    "make one with 'openssl rand -hex 32 > FILE', readable for this user only, and set "
    "LMKV_ENCRYPTION_KEY_FILE to it on every node."
)


def _missing(how: str) -> UnsupportedError:
    return UnsupportedError(
        f"encryption_key_file is set, but the package cryptography {how}.",
        next_step="pip install 'lmkv-ray[encryption]', or unset LMKV_ENCRYPTION_KEY_FILE.",
    )
