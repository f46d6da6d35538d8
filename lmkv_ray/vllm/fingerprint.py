"""Which weights these are, without reading them all.

A path or a name does not say it: a directory can be overwritten by another fine-tune, two nodes can
hold different revisions under one name. So a little of *every tensor* is hashed (a fine-tune that
touches only some modules is seen too), which takes milliseconds even for large models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 512
OTHER_FILE_SAMPLES = 64
"""Samples of a file whose tensors cannot be told apart (anything but safetensors)."""

_OTHER_SUFFIXES = (".gguf", ".bin", ".pt", ".pth")


def weights_fingerprint(model: str, revision: str | None = None) -> str:
    """A hex digest of the weights of ``model``, a path or a Hugging Face name.

    Where no weight file is found on this machine (streamed weights), the name and the revision
    stand in, and a warning says so.
    """
    digest = blake2b(digest_size=16)
    files = _weight_files(_local_path(model, revision))
    if not files:
        logger.warning(
            "The weight files of %s are not on this machine: chunks are shared by its name and "
            "revision alone.",
            model,
        )
        digest.update(msgspec.json.encode(["unseen", model, revision]))
    for file in files:
        digest.update(file.name.encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()


def _local_path(model: str, revision: str | None) -> Path | None:
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _weight_files(path: Path | None) -> list[Path]:
    if path is None:
        return []
    if path.is_file():
        return [path]
    safetensors = sorted(path.glob("*.safetensors"))
    return safetensors or sorted(f for f in path.iterdir() if f.suffix in _OTHER_SUFFIXES)


def _samples(file: Path) -> Iterator[bytes]:
    fd = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        yield size.to_bytes(8, "little")
        if file.suffix != ".safetensors":
            for i in range(OTHER_FILE_SAMPLES):
                yield os.pread(fd, SAMPLE_BYTES, size * i // OTHER_FILE_SAMPLES)
            return
        header_bytes = int.from_bytes(os.pread(fd, 8, 0), "little")
        header = os.pread(fd, header_bytes, 8)
        yield header
        for name, tensor in sorted(msgspec.json.decode(header).items()):
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                for at in (begin, (begin + end) // 2):
                    yield os.pread(fd, min(SAMPLE_BYTES, end - at), 8 + header_bytes + at)
    finally:
        os.close(fd)
