"""What a chunk is called: namespaces and chunk keys.

A *namespace* carries everything that changes the bytes of a chunk but is not in the text: the model
and its weights, data types, memory layout, block and chunk size, parallel shape. A *chunk key* is
16 bytes: a digest of the namespace, the engine's own hash of the chunk's last block (chained over
the whole prefix, and covering LoRA, images and salts) and the KV group. Tokens are never hashed a
second time.

Keys travel as NumPy arrays of shape (n, 2) and dtype uint64 (``KeyArray``), and as bytes of length
16*n on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import msgspec
import numpy as np
import numpy.typing as npt

KEY_BYTES = 16

SHORT_TEXT = 64
"""Characters of a field's value as it is told to others."""

KeyArray = npt.NDArray[np.uint64]
"""Chunk keys, shape (n, 2), C-contiguous."""


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Everything besides the text that decides the bytes of a chunk.

    Two engines share chunks exactly when all of these fields are equal.
    """

    model: str
    """Architecture and shape of the model, as a digest of its configuration."""
    weights: str = ""
    """Digest of the weights (see ``lmkv_ray.vllm.identity.content``, also for the next three)."""
    code: str = ""
    """Digest of the code that comes with the model, if it is run."""
    processor: str = ""
    """Digest of what makes images, sounds and videos into the model's input."""
    draft: str = ""
    """Digest of the draft model whose KV is in the chunks too."""
    quantization: str = ""
    """How weights are quantized while they are loaded."""
    length: str = ""
    """The longest text, where that changes what shorter ones are computed to."""
    options: dict[str, str] = {}
    """Other settings of the engine that change bytes, by their names."""
    dtype: str
    """Activation data type, for instance ``torch.bfloat16``."""
    cache_dtype: str
    """Data type of the KV cache, for instance ``auto`` or ``fp8_e4m3``."""
    layout: str
    """Digest of the engine's page layout: name, strides, page bytes, layers, ISA packing."""
    block_tokens: int
    """Tokens in one engine block."""
    chunk_tokens: int
    """Tokens in one chunk, a multiple of ``block_tokens``."""
    hash_algorithm: str
    """The engine's block hash and its seed."""
    parallel: str
    """Tensor, pipeline and context parallel sizes: how a chunk is cut over ranks."""
    engine: str
    """The engine and the version of its KV format, for instance ``vllm 0.32``."""
    generation: str = ""
    """Of weights that changed in memory: a name of what they are now; "": as they were loaded."""
    salt: str = ""
    """Separates tenants that must not share even equal text."""
    format: int = 2
    """Version of lmkv_ray's own chunk format."""

    def digest(self) -> bytes:
        """16 bytes that identify this namespace, equal in every process and on every host."""
        return blake2b(msgspec.json.encode(self, order="sorted"), digest_size=16).digest()

    def fields(self) -> dict[str, str]:
        """All fields by name, options by theirs, as short texts: those of two engines that share
        nothing tell why. The salt is only told as a digest.
        """
        listed = {name: str(getattr(self, name)) for name in self.__struct_fields__}
        del listed["options"]
        # Which ranks these are is no reason why engines would not share.
        listed["parallel"] = self.parallel.partition(" ranks ")[0]
        if self.salt:
            listed["salt"] = blake2b(self.salt.encode(), digest_size=8).hexdigest()
        return {name: _short(text) for name, text in (listed | self.options).items()}


def _short(text: str) -> str:
    if len(text) <= SHORT_TEXT:
        return text
    return blake2b(text.encode(), digest_size=16).hexdigest()


def within(namespace: bytes, part: bytes) -> bytes:
    """16 bytes that are to keys of one part of a namespace what ``namespace`` is to all others.

    Args:
        namespace: a digest.
        part: for instance the digest of a LoRA adapter; empty: no part.
    """
    return blake2b(part, digest_size=16, key=namespace).digest() if part else namespace


def chunk_key(namespace: bytes, block_hash: bytes, group: int = 0) -> bytes:
    """The key of the chunk whose last block has ``block_hash`` in KV group ``group``."""
    return blake2b(
        block_hash, digest_size=KEY_BYTES, key=namespace, salt=group.to_bytes(4, "little")
    ).digest()


def key_array(keys: Iterable[bytes] | bytes) -> KeyArray:
    """Keys (an iterable of 16-byte strings, or one string of them joined) as a ``KeyArray``."""
    joined = keys if isinstance(keys, bytes) else b"".join(keys)
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


def key_list(keys: KeyArray) -> list[bytes]:
    """The rows of a ``KeyArray`` as 16-byte strings."""
    joined = keys.tobytes()
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def parts_of(keys: KeyArray, parts: int) -> npt.NDArray[np.intp]:
    """Which part of a directory that is cut into ``parts`` knows each key, intp[n]."""
    return (keys[:, 1] % np.uint64(parts)).astype(np.intp)
