"""Which files a model is made of, as vLLM's loaders choose them.

Where it is not certain that vLLM loads a file (subfolders, load formats of plugins), the file
counts: an engine may then have an identity of its own needlessly, but never another's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

STREAMED_FORMATS = frozenset({"tensorizer", "modelexpress", "ipc_cache"})
"""vLLM's load formats that take weights from elsewhere, whatever lies in the model's directory."""

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")

_BY_FORMAT = {
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors", "*.pt"),
    "fastsafetensors": ("*.safetensors", "*.pt"),
    "instanttensor": ("*.safetensors", "*.pt"),
    "mistral": ("consolidated*.safetensors", "*.pt"),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
    "runai_streamer": ("*.safetensors",),
}
"""The first pattern that matches anything is what is loaded."""

_OF_TRAINING = re.compile(
    r"(training_args|optimizer)\.bin$|(optimizer|scheduler|scaler)\.pt$|^adapter_model"
)
_NOT_A_MODEL = re.compile(r"original$|onnx$|checkpoint-|\.")
"""Subfolders that no loader looks into."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "tekken.json",
)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class ModelFiles:
    """The weights of one model."""

    directory: Path | None
    """None: not on this machine."""
    weights: tuple[Path, ...] = ()
    """In the order in which they are loaded; none: the weights are not files on this machine."""

    @classmethod
    def of(
        cls,
        model: str,
        *,
        revision: str | None = None,
        download_dir: str | None = None,
        load_format: str = "auto",
    ) -> ModelFiles:
        """Find them.

        Args:
            model: a directory, a file, or a name of Hugging Face.
            revision: the revision of the model under this name.
            download_dir: where vLLM was told to keep what it downloads.
            load_format: vLLM's.

        Raises:
            OSError: the directory cannot be read.
            ValueError: its index of weights is none.
        """
        path = Path(model)
        if path.is_file():
            return cls(path.parent, () if load_format in STREAMED_FORMATS else _pieces(path))
        directory = find_directory(model, revision, download_dir)
        if directory is None or load_format in STREAMED_FORMATS:
            return cls(directory)
        return cls(directory, tuple(_chosen(directory, load_format)))


def find_directory(
    model: str, revision: str | None = None, download_dir: str | None = None
) -> Path | None:
    """The directory of a model, be it a path or a name in a cache of Hugging Face.

    A name of ModelScope is none of Hugging Face, where another model may have it: not found.
    """
    if Path(model).is_dir():
        return Path(model)
    if os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true"):
        return None
    from huggingface_hub import constants

    for cache in (download_dir, constants.HF_HUB_CACHE):
        if cache is None:
            continue
        repository = Path(cache) / f"models--{model.replace('/', '--')}"
        reference = repository / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        if commit and (repository / "snapshots" / commit).is_dir():
            return repository / "snapshots" / commit
    return None


def processor_files(directory: Path) -> list[Path]:
    """What says how images, sounds and videos become a model's input."""
    return [file for name in PROCESSOR_FILES if (file := directory / name).is_file()]


def code_files(directory: Path) -> list[Path]:
    """The code that comes with a model."""
    return sorted(file for file in directory.rglob("*.py") if file.is_file())


def _pieces(file: Path) -> tuple[Path, ...]:
    """A file, with the others that it was cut into."""
    if (cut := re.fullmatch(r"(.+-)\d{5}(-of-\d{5}\.\w+)", file.name)) is None:
        return (file,)
    return tuple(sorted(file.parent.glob(f"{cut[1]}?????{cut[2]}")))


def _chosen(directory: Path, load_format: str) -> list[Path]:
    if load_format == "auto":
        official = any(directory.glob("consolidated*.safetensors"))
        load_format = "mistral" if official else "hf"
    patterns = _BY_FORMAT.get(load_format)
    if patterns is None:  # shards of a plugin, or of a format that is newer than this code
        found = [file for pattern in WEIGHT_PATTERNS for file in directory.glob(pattern)]
    else:
        matches = (list(directory.glob(pattern)) for pattern in patterns)
        found = next((files for files in matches if files), [])
    name = "consolidated" if load_format == "mistral" else "model"
    indexed = _indexed(directory / f"{name}.safetensors.index.json") if patterns else None
    if indexed and any(file.name in indexed for file in found):
        found = [file for file in found if file.name in indexed]
    inside = [
        file
        for folder in directory.iterdir()
        if folder.is_dir() and not _NOT_A_MODEL.match(folder.name)
        for pattern in WEIGHT_PATTERNS
        for file in folder.glob(pattern)
    ]
    return sorted(file for file in found + inside if not _OF_TRAINING.search(file.name))


def _indexed(index: Path) -> set[str] | None:
    if not index.is_file():
        return None
    try:
        return set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except msgspec.MsgspecError as error:
        raise ValueError(f"{index} is not an index of weights: {error}") from error
