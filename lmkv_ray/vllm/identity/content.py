"""What an engine's model is by content: weights, code, processors, draft model.

Reading it may take as long as reading the weights, so it is done beside the engine.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmkv_ray.arena import this_process
from lmkv_ray.config import Settings
from lmkv_ray.identity import (
    DigestMemory,
    FileDigests,
    ModelFiles,
    StoppedError,
    blob_of,
    canonical,
    changed_since,
    code_files,
    find_directory,
    processor_files,
)
from lmkv_ray.vllm.identity.model_config import draft_of

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.1
"""An engine that starts waits so long for its content: enough if nothing has to be read."""

STOP_SECONDS = 5.0
"""For the thread to end: a piece of a file is read at a time."""


class UnreadError(Exception):
    """What a model is made of cannot be read on this machine."""


@dataclass(frozen=True)
class Content:
    """See the module. Each is a digest in hex, or empty if there is no such thing."""

    weights: str
    """Begins with how it is known: ``read``, ``named`` (the setting ``weights_id``), ``dummy``, or
    ``own``: not known, so the engine shares with no other one."""
    code: str = ""
    """With the versions of the packages that it needs."""
    processor: str = ""
    """With the versions of the packages that carry it out."""
    draft: str = ""


CODE = ("transformers",)
"""Packages that code of a model is made of, where it is not vLLM's own."""

PROCESSORS = ("transformers", "mistral-common")
"""Packages whose versions decide what images and sounds become."""

CONTENT = ("weights", "code", "processor", "draft")
"""Fields of a namespace."""


class ContentThread:
    """Reads the content beside the engine.

    Args:
        config: vLLM's, of an engine that has loaded its weights by now.
        settings: the engine's own settings.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        self._config = config
        self._weights_id = settings.weights_id
        self._digests = FileDigests(DigestMemory.of_user())
        self._began = began_to_load()
        self._thread: threading.Thread | None = None

    def begin(self, learn: Callable[..., None]) -> None:
        """Start. What was read by an earlier engine is known when this returns.

        Args:
            learn: is called with the fields of the content, on the thread.
        """
        self._thread = threading.Thread(
            target=self._run, args=(learn,), name="lmkv-content", daemon=True
        )
        self._thread.start()
        self._thread.join(PATIENCE_SECONDS)

    def stop(self) -> None:
        """End it."""
        self._digests.stop()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _run(self, learn: Callable[..., None]) -> None:
        began = time.monotonic()
        try:
            content = read_content(
                self._config,
                weights_id=self._weights_id,
                digests=self._digests,
                began=self._began,
            )
        except StoppedError:
            return
        except Exception:
            logger.exception("lmkv_ray: what the model is made of cannot be read")
            content = Content(weights=f"own {uuid.uuid4().hex}")
        logger.info(
            "lmkv_ray: knows which weights it has: %s (%.2f GB read in %.1f s)",
            content.weights,
            self._digests.bytes_read / 1e9,
            time.monotonic() - began,
        )
        learn(**asdict(content))


def read_content(
    config: Any, *, weights_id: str | None, digests: FileDigests, began: float
) -> Content:
    """Read all files that decide the KV of an engine.

    Args:
        config: vLLM's, of the engine.
        weights_id: see the setting.
        digests: of files.
        began: when the engine had not begun to load, seconds since 1970: files that were changed or
            exchanged later may not be what it has.

    Raises:
        StoppedError: the engine ends.
    """
    reader = _Reader(digests, weights_id, began)
    model = config.model_config
    return Content(
        weights=reader.weights(model, config.load_config),
        code=reader.code(model),
        processor=reader.processor(config),
        draft=reader.draft(config),
    )


def began_to_load() -> float:
    """A time, in seconds since 1970, before which the engine has read no file.

    Of a process that vLLM has made for an engine, that is when it was made. Any other one may have
    written the files itself before it made its engine, which has been loaded by now.
    """
    if multiprocessing.parent_process() is None:
        return time.time()
    since_boot = this_process().start / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


class _Reader:
    def __init__(self, digests: FileDigests, weights_id: str | None, began: float) -> None:
        self._digests = digests
        self._weights_id = weights_id
        self._began = began

    def weights(self, model: Any, load: Any) -> str:
        load_format = str(load.load_format)
        if load_format == "dummy":
            return f"dummy {model.seed}"
        try:
            return f"read {_digest(self._weights_of(model, load))}"
        except (UnreadError, OSError, ValueError) as error:
            if self._weights_id is not None:
                return f"named {_digest([model.model, self._weights_id])}"
            return _own(f"the weights of {model.model} ({error})", "Set weights_id")

    def code(self, model: Any) -> str:
        """What comes with a model, and the version of the library that it is, or is built on."""
        its_own = self._own_code(model)
        borrows = getattr(model, "using_transformers_backend", bool)
        return f"{its_own} {_versions(CODE)}" if its_own or borrows() else ""

    def _own_code(self, model: Any) -> str:
        if not getattr(model, "trust_remote_code", False):
            return ""
        try:
            directories = [_directory(model)]
            for reference in _remote_code(model.hf_config.to_dict()):
                name, revision = reference, getattr(model, "code_revision", None)
                if (directory := find_directory(name, revision)) is None:
                    raise UnreadError(f"the code of {name} is not here")
                directories.append(directory)
            return self._named(
                (str(file.relative_to(each)), file)
                for each in directories
                for file in code_files(each)
            )
        except (UnreadError, OSError) as error:
            return _own(f"the code of {model.model} ({error})", "Keep it in the model's directory")

    def processor(self, config: Any) -> str:
        multimodal = getattr(config.model_config, "multimodal_config", None)
        if multimodal is None:
            return ""
        model = config.model_config
        try:
            files = [(file.name, file) for file in processor_files(_directory(model))]
            if scales := getattr(multimodal, "mm_encoder_fp8_scale_path", None):
                files.append(("scales", Path(scales)))
            return f"{self._named(files)} {_versions(PROCESSORS)}"
        except (UnreadError, OSError) as error:
            return _own(f"the processor of {model.model} ({error})", "Serve it from a directory")

    def draft(self, config: Any) -> str:
        if (draft := draft_of(config)) is None:
            return ""
        load = getattr(config.speculative_config, "draft_load_config", None) or config.load_config
        return _digest([self.weights(draft, load), self.code(draft)])

    def _weights_of(self, model: Any, load: Any) -> list[str]:
        if streamed := getattr(model, "model_weights", ""):
            raise UnreadError(f"they come from {streamed}")
        names = [(model.model, getattr(model, "revision", None))]
        # Ultravox is put together from models of other names.
        parts = (getattr(model.hf_config, f"{part}_model_id", None) for part in ("audio", "text"))
        names += [(part, None) for part in parts if isinstance(part, str)]
        found: list[str] = []
        for name, revision in names:
            files = ModelFiles.of(
                name,
                revision=revision,
                download_dir=getattr(load, "download_dir", None),
                load_format=str(load.load_format),
            ).weights
            _check_commit(model, name, files)
            if not files:
                raise UnreadError(f"no weight files of {name} are on this machine")
            found += self._read(files)
        return found

    def _named(self, files: Iterable[tuple[str, Path]]) -> str:
        """Of files whose names matter."""
        listed = sorted(files)
        digests = self._read([file for _, file in listed])
        named = [(name, value) for (name, _), value in zip(listed, digests, strict=True)]
        return _digest(named) if named else ""

    def _read(self, files: Sequence[Path]) -> list[str]:
        digests = self._digests.of(files)
        for file in files:
            # What a cache of Hugging Face has linked never changes; vLLM may have fetched it now.
            if blob_of(file) is None and (other := changed_since(file, self._began)) is not None:
                raise UnreadError(f"{other} changed after the engine began to load {file.name}")
        return digests


def _directory(model: Any) -> Path:
    found = ModelFiles.of(model.model, revision=getattr(model, "revision", None)).directory
    if found is None:
        raise UnreadError("its directory is not on this machine")
    _check_commit(model, model.model, [found / "any"])
    return found


def _check_commit(model: Any, name: str, files: Sequence[Path]) -> None:
    """Of a branch of a name of Hugging Face, there may be another commit by now.

    Raises:
        UnreadError: the files are not of the commit that vLLM has read the configuration of.
    """
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is None or name != model.model or Path(name).exists():
        return
    if any(commit not in file.parts for file in files):
        raise UnreadError(f"another commit of it was fetched than {commit}")


def _remote_code(fields: Any, inside: bool = False) -> set[str]:
    """Names of the models whose code a model uses besides its own.

    Args:
        fields: of the model's configuration.
        inside: whether they say where code is.
    """
    if isinstance(fields, str):
        return {fields.partition("--")[0]} if inside and "--" in fields else set()
    if isinstance(fields, dict):
        found = [_remote_code(value, inside or key == "auto_map") for key, value in fields.items()]
        return set[str]().union(*found)
    if isinstance(fields, list | tuple):
        return set[str]().union(*(_remote_code(value, inside) for value in fields))
    return set()


def _versions(packages: Sequence[str]) -> str:
    """Of those packages that are installed."""
    found = []
    for name in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return " ".join(found)


def _own(what: str, advice: str) -> str:
    logger.warning(
        "lmkv_ray: %s cannot be read on this machine, so this engine shares chunks with no other "
        "engine, nor with itself after a restart. %s to share (docs/identity.md).",
        what,
        advice,
    )
    return f"own {uuid.uuid4().hex}"


def _digest(value: Any) -> str:
    return blake2b(canonical(value, "content").encode(), digest_size=16).hexdigest()
